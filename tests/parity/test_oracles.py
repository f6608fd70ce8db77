"""Both sides' losses against the numbers of the original code, and against each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jax_simpo.config import objective_weights
from jax_simpo.config.objectives import OBJECTIVE_KEYS
from jax_simpo.objectives import Objective, SimPO, make_objective
from tests.objectives import support as jax_side
from tests.objectives.oracles import CASES, NAMES, Numbers, Oracle, extreme_numbers, random_numbers
from tests.torch_ref import support as torch_side
from torch_ref.objectives import Objective as TorchObjective
from torch_ref.objectives import Settings

BETA, RATIO = 2.5, 0.55
CHOSEN, REJECTED = [-0.5, -1.0, -0.8], [-0.9, -0.7, -0.8]
# From the code that the published numbers come from, run on the log-probs above.
CHECK_VALUES = [
    ("sigmoid", 0.0, [0.898123, 2.237822, 1.600413]),
    ("sigmoid", 0.1, [0.860623, 2.025322, 1.462913]),
    ("hinge", 0.0, [1.375, 3.125, 2.375]),
]


@pytest.mark.parametrize(("loss_type", "smoothing", "values"), CHECK_VALUES)
def test_losses_are_those_of_the_original_code(loss_type: Any, smoothing: float, values: list[float]) -> None:
    objective = SimPO(beta=BETA, gamma_beta_ratio=RATIO, loss_type=loss_type, label_smoothing=smoothing)
    jax_losses = objective.losses(*(jax_side.of_means(np.float32(means)) for means in (CHOSEN, REJECTED)))
    settings = {"beta": BETA, "gamma_beta_ratio": RATIO, "loss_type": loss_type, "label_smoothing": smoothing}
    torch_losses = torch_side.objective_of("simpo", **settings).losses(*map(torch_side.of_means, (CHOSEN, REJECTED)))
    np.testing.assert_allclose(np.asarray(jax_losses), values, atol=1e-6)
    np.testing.assert_allclose(torch_losses.numpy(), values, atol=1e-6)


def both_sides(weights: dict[str, float], settings: dict[str, Any]) -> tuple[Objective, TorchObjective]:
    return make_objective(weights, settings), TorchObjective(weights, Settings(**settings))


def assert_equal(ours: Any, theirs: Any) -> None:
    # Relative where a number is above 1: float32 itself has seven digits.
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("numbers", [random_numbers, extreme_numbers])
@pytest.mark.parametrize(("name", "settings", "_"), CASES, ids=NAMES)
def test_losses_and_gradients_are_the_same_on_both_sides(
    name: str, settings: dict[str, Any], _: Oracle, numbers: Callable[[], Numbers]
) -> None:
    ours, theirs = both_sides({name: 1.0}, settings)
    losses, gradients = jax_side.losses_and_gradients(ours, numbers())
    torch_losses, torch_gradients = torch_side.losses_and_gradients(theirs, numbers())
    assert_equal(losses, torch_losses)
    for gradient, torch_gradient in zip(gradients, torch_gradients, strict=True):
        assert_equal(gradient, torch_gradient)


@pytest.mark.parametrize("name", OBJECTIVE_KEYS)
def test_the_objective_of_a_config_logs_the_same_on_both_sides(name: str) -> None:
    smoothed = {"label_smoothing": 0.1}
    for objective, keys in (
        (name, {}),
        ({"simpo": 0.5, name: 2.0, "sft": 0.1}, smoothed),
        ({name: 2.0, "dpo": 0.5}, smoothed),
    ):
        config = torch_side.settings(objective=objective, **keys)
        ours, theirs = make_objective(objective_weights(config.objective), vars(config)), TorchObjective.of(config)
        assert (ours.beta, ours.sft_weight, ours.sft_over) == (theirs.beta, theirs.sft_weight, theirs.sft_over)
        assert (ours.needs_reference, ours.reads_prompts) == (theirs.needs_reference, theirs.reads_prompts)
        assert ours.metrics == theirs.metrics
        n = random_numbers(20)
        assert_equal(jax_side.losses_and_gradients(ours, n)[0], torch_side.losses_and_gradients(theirs, n)[0])
        for jax_responses, torch_responses in zip(jax_side.responses_of(n), torch_side.responses_of(n), strict=True):
            assert_equal(ours.score(jax_responses), theirs.score(torch_responses))
            assert_equal(ours.logps(jax_responses), theirs.logps(torch_responses))
