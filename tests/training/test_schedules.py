"""Learning-rate schedules against transformers' own."""

from __future__ import annotations

from typing import Any

import pytest

from jax_simpo.training.schedules import count_warmup_steps, learning_rate_schedule
from tests.schedules import KINDS, PEAK, TOTAL, name, rates_of_transformers


@pytest.mark.parametrize(("kind", "settings"), KINDS, ids=name)
@pytest.mark.parametrize("warmup", [0, 1, 8])
def test_schedules_are_those_of_transformers(kind: str, settings: dict[str, Any], warmup: int) -> None:
    ours = learning_rate_schedule(kind, PEAK, TOTAL, warmup, settings)
    for step, rate in enumerate(rates_of_transformers(kind, warmup, settings)):
        assert float(ours(step)) == pytest.approx(rate, abs=1e-10)


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
