"""Learning-rate schedules against transformers' own."""

from __future__ import annotations

from typing import Any

import pytest

from jax_simpo.training.schedules import count_warmup_steps, learning_rate_schedule

TOTAL = 37
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("cosine", {}),
    ("linear", {}),
    ("constant", {}),
    ("constant_with_warmup", {}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ("cosine_with_min_lr", {"min_lr": 1e-5}),
    ("polynomial", {}),
    ("polynomial", {"lr_end": 1e-5, "power": 2.0}),
    ("warmup_stable_decay", {"num_decay_steps": 10}),
    ("warmup_stable_decay", {"num_decay_steps": 12, "min_lr_ratio": 0.2, "decay_type": "linear"}),
    ("warmup_stable_decay", {"num_decay_steps": 5, "decay_type": "1-sqrt"}),
]


def name(value: Any) -> str:
    return ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize(("kind", "settings"), KINDS, ids=name)
@pytest.mark.parametrize("warmup", [0, 1, 8])
def test_schedules_are_those_of_transformers(kind: str, settings: dict[str, Any], warmup: int) -> None:
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=3e-4)
    oracle = get_scheduler(
        kind, optimizer, num_warmup_steps=warmup, num_training_steps=TOTAL, scheduler_specific_kwargs=settings
    )
    ours = learning_rate_schedule(kind, 3e-4, TOTAL, warmup, settings)
    for step in range(TOTAL):
        assert float(ours(step)) == pytest.approx(oracle.get_last_lr()[0], abs=1e-10)
        optimizer.step()
        oracle.step()


def test_a_decay_of_unknown_length_is_a_tenth_of_the_run_and_never_longer_than_what_warm_up_leaves() -> None:
    tenth = learning_rate_schedule("warmup_stable_decay", 1.0, 40, 4)
    assert float(tenth(36)) == 1.0 and float(tenth(37)) < 1.0 and float(tenth(40)) == pytest.approx(0.0, abs=1e-7)
    longer = learning_rate_schedule("warmup_stable_decay", 1.0, 40, 30, {"num_decay_steps": 20})
    assert float(longer(30)) == 1.0 and float(longer(31)) < 1.0 and float(longer(40)) == pytest.approx(0.0, abs=1e-7)


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="'inverse_sqrt'"):
        learning_rate_schedule("inverse_sqrt", 1.0, TOTAL, 0)


def test_warmup_steps_win_over_the_ratio_which_is_rounded_up() -> None:
    assert count_warmup_steps(469, 0, 0.1) == 47
    assert count_warmup_steps(469, 5, 0.1) == 5
