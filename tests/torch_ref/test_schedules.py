"""Learning-rate schedules against transformers' own."""

from __future__ import annotations

from typing import Any

import pytest

from tests.schedules import KINDS, PEAK, TOTAL, name, rates_of_transformers
from tests.torch_ref.support import settings
from torch_ref.optim import Schedule, learning_rate_schedule


def schedule(kind: str, total: int, warmup: int, given: dict[str, Any] | None = None) -> Schedule:
    keys = {"lr_scheduler_type": kind, "lr_scheduler_kwargs": given or {}, "warmup_steps": warmup}
    return learning_rate_schedule(settings(learning_rate=PEAK, **keys), total)


@pytest.mark.parametrize(("kind", "given"), KINDS, ids=name)
@pytest.mark.parametrize("warmup", [0, 1, 8])
def test_schedules_are_those_of_transformers(kind: str, given: dict[str, Any], warmup: int) -> None:
    ours = schedule(kind, TOTAL, warmup, given)
    for step, rate in enumerate(rates_of_transformers(kind, warmup, given)):
        assert ours(step) == pytest.approx(rate, abs=1e-15)


def test_a_decay_of_unknown_length_is_a_tenth_of_the_run_rounded_up() -> None:
    tenth = schedule("warmup_stable_decay", 41, 4)
    assert tenth(36) == PEAK > tenth(37) and tenth(41) == pytest.approx(0.0, abs=1e-18)


def test_a_decay_is_never_longer_than_what_warm_up_leaves() -> None:
    longer = schedule("warmup_stable_decay", 40, 30, {"num_decay_steps": 20})
    assert longer(30) == PEAK > longer(31) and longer(40) == pytest.approx(0.0, abs=1e-18)
