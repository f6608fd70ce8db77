"""Every objective against TRL's own code, or against a transcription of its paper where TRL has none.

Losses and gradients are compared in float32 with the oracle in float64.
"""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_simpo.config.objectives import OBJECTIVE_KEYS, WITH_REFERENCE
from jax_simpo.objectives import OBJECTIVES, WeightedSum, make_objective
from tests.objectives.oracles import CASES, NAMES, Oracle, extreme_numbers, random_numbers, theirs
from tests.objectives.support import losses_and_gradients


@pytest.mark.parametrize(("name", "settings", "oracle"), CASES, ids=NAMES)
def test_losses_and_gradients_are_those_of_the_oracle(name: str, settings: dict[str, Any], oracle: Oracle) -> None:
    objective, n = make_objective({name: 1.0}, settings), random_numbers()
    (losses, gradients), (expected, expected_gradients) = (
        losses_and_gradients(objective, n),
        theirs(oracle, settings, n),
    )
    # Relative where a loss or a gradient is above 1: float32 itself has seven digits.
    np.testing.assert_allclose(losses, expected, rtol=1e-6, atol=1e-6)
    for gradient, its in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, its, rtol=1e-6, atol=1e-6)
    assert np.abs(expected_gradients).max() > 1e-3


@pytest.mark.parametrize(("name", "settings", "oracle"), CASES, ids=NAMES)
def test_extreme_log_ratios_give_finite_losses_and_gradients(name: str, settings: dict, oracle: Oracle) -> None:
    n = extreme_numbers()
    losses, gradients = losses_and_gradients(make_objective({name: 1.0}, settings), n)
    assert np.isfinite(losses).all()
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    expected, _ = theirs(oracle, settings, n)
    within = np.abs(expected) < 1e30  # beyond, AlphaPO's power has left the range of float32
    np.testing.assert_allclose(losses[within], expected[within], rtol=1e-6, atol=1e-6)
    assert within.mean() >= 0.5


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_has_an_oracle_and_reads_the_keys_that_its_config_has(name: str) -> None:
    assert name in {case[0] for case in CASES}
    own = {field.name for field in fields(OBJECTIVES[name])}
    keys = set(OBJECTIVE_KEYS[name])
    assert keys <= own
    assert own - keys <= {"beta", "sft_weight", "sft_over", "group_loss", "compare_weights", "mean_over"}
    assert OBJECTIVES[name].needs_reference == (name in WITH_REFERENCE)
    assert ("beta" in keys) == (name not in ("simper", "slic"))


def test_an_objective_says_whether_it_needs_a_reference() -> None:
    n = random_numbers(8)
    other = n | {key: values + 7 for key, values in n.items() if key == "chosen_reference"}
    for name, settings, _ in CASES:
        objective = make_objective({name: 1.0}, settings)
        moves = not np.array_equal(losses_and_gradients(objective, n)[0], losses_and_gradients(objective, other)[0])
        assert moves == objective.needs_reference, name


def test_a_weighted_sum_adds_losses_and_logs_the_rewards_of_the_first() -> None:
    settings = {"beta": 0.2, "label_smoothing": 0.1, "sft_weight": 0.3}
    objective, n = make_objective({"ipo": 0.5, "apo_zero": 2.0}, settings), random_numbers(8)
    assert isinstance(objective, WeightedSum) and objective.needs_reference
    assert objective.sft_weight == 0.3 and objective.beta == 0.2
    parts = [losses_and_gradients(make_objective({name: 1.0}, settings), n)[0] for name in ("ipo", "apo_zero")]
    np.testing.assert_allclose(losses_and_gradients(objective, n)[0], 0.5 * parts[0] + 2.0 * parts[1], rtol=1e-6)


def test_log1mexp_keeps_its_digits_at_both_ends() -> None:
    from jax_simpo.objectives.orpo import log1mexp

    x = -np.geomspace(1e-7, 80, 400)
    exact = [math.log1p(-math.exp(v)) if v < -1 else math.log(-math.expm1(v)) for v in np.float32(x).tolist()]
    np.testing.assert_allclose(log1mexp(jnp.asarray(x, jnp.float32)), exact, rtol=2e-6)
    assert np.isfinite(jax.grad(log1mexp)(0.0))
