"""Learning-rate schedules against transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import get_scheduler

from tests.torch_ref.support import settings
from torch_ref.optim import Schedule, learning_rate_schedule

TOTAL, PEAK = 37, 3e-4
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("cosine", {}),
    ("linear", {}),
    ("constant", {}),
    ("constant_with_warmup", {}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ("cosine_with_min_lr", {"min_lr": 1e-5}),
    ("cosine_with_min_lr", {"min_lr": 0.0}),
    ("polynomial", {}),
    ("polynomial", {"lr_end": 1e-5, "power": 2.0}),
    ("warmup_stable_decay", {"num_decay_steps": 10}),
    ("warmup_stable_decay", {"num_decay_steps": 12, "min_lr_ratio": 0.2, "decay_type": "linear"}),
    ("warmup_stable_decay", {"num_decay_steps": 5, "decay_type": "1-sqrt"}),
]


def schedule(kind: str, total: int, warmup: int, given: dict[str, Any] | None = None) -> Schedule:
    keys = {"lr_scheduler_type": kind, "lr_scheduler_kwargs": given or {}, "warmup_steps": warmup}
    return learning_rate_schedule(settings(learning_rate=PEAK, **keys), total)


def name(value: Any) -> str:
    return ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize(("kind", "given"), KINDS, ids=name)
@pytest.mark.parametrize("warmup", [0, 1, 8])
def test_schedules_are_those_of_transformers(kind: str, given: dict[str, Any], warmup: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=PEAK)
    oracle = get_scheduler(
        kind, optimizer, num_warmup_steps=warmup, num_training_steps=TOTAL, scheduler_specific_kwargs=given
    )
    ours = schedule(kind, TOTAL, warmup, given)
    for step in range(TOTAL):
        assert ours(step) == pytest.approx(oracle.get_last_lr()[0], abs=1e-15)
        optimizer.step()
        oracle.step()


def test_a_decay_of_unknown_length_is_a_tenth_of_the_run_rounded_up() -> None:
    tenth = schedule("warmup_stable_decay", 41, 4)
    assert tenth(36) == PEAK > tenth(37) and tenth(41) == pytest.approx(0.0, abs=1e-18)


def test_a_decay_is_never_longer_than_what_warm_up_leaves() -> None:
    longer = schedule("warmup_stable_decay", 40, 30, {"num_decay_steps": 20})
    assert longer(30) == PEAK > longer(31) and longer(40) == pytest.approx(0.0, abs=1e-18)
