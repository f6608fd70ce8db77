"""The SimPO objective against the original's check values, PyTorch's formulas, and its own bookkeeping."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_simpo.objectives import Responses, SimPO
from jax_simpo.ops.responses import sum_responses
from tests.objectives.support import of_means

CHOSEN, REJECTED = jnp.array([-0.5, -1.0, -0.8]), jnp.array([-0.9, -0.7, -0.8])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.898123, 2.237822, 1.600413]),
        ({"label_smoothing": 0.1}, [0.860623, 2.025322, 1.462913]),
        ({"loss_type": "hinge"}, [1.375, 3.125, 2.375]),
    ],
)
def test_losses_are_those_of_the_original_code(settings: dict, expected: list[float]) -> None:
    losses = SimPO(beta=2.5, gamma_beta_ratio=0.55, **settings).losses(of_means(CHOSEN), of_means(REJECTED))
    np.testing.assert_allclose(losses, expected, atol=5e-7)


@given(st.lists(st.tuples(st.floats(-30, 0), st.floats(-30, 0)), min_size=1, max_size=5), st.floats(0, 0.4))
def test_losses_and_gradients_are_torchs_far_into_the_tails(logps: list[tuple[float, float]], smoothing: float) -> None:
    import torch
    import torch.nn.functional as F

    chosen, rejected = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in zip(*logps, strict=True))
    z = 10.0 * (chosen - rejected - 0.3)
    oracle = -(1 - smoothing) * F.logsigmoid(z) - smoothing * F.logsigmoid(-z)
    oracle.sum().backward()

    objective = SimPO(beta=10.0, gamma_beta_ratio=0.3, label_smoothing=smoothing)

    def ours(c: jax.Array, r: jax.Array) -> jax.Array:
        return objective.losses(of_means(c), of_means(r)).sum()

    inputs = [jnp.asarray(x.detach().numpy(), jnp.float32) for x in (chosen, rejected)]
    value, gradients = jax.value_and_grad(ours, (0, 1))(*inputs)
    np.testing.assert_allclose(value, oracle.sum().item(), rtol=2e-5, atol=2e-5)
    for gradient, x in zip(gradients, (chosen, rejected), strict=True):
        np.testing.assert_allclose(gradient, x.grad.numpy(), rtol=1e-4, atol=1e-4)


def test_an_unknown_loss_type_is_refused() -> None:
    objective = SimPO(beta=2.0, gamma_beta_ratio=0.5, loss_type="ipo")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'ipo' is neither"):
        objective.losses(of_means(CHOSEN), of_means(REJECTED))


def test_targets_are_added_up_by_response_and_padding_is_thrown_away() -> None:
    logps = jnp.array([[-1.0, -2.0, -4.0, -8.0, -16.0]])
    responses = sum_responses(logps, jnp.array([[1, 0, 1, 3, 3]]), slots=3)
    np.testing.assert_array_equal(responses.sum, [[-2.0, -5.0, 0.0]])
    np.testing.assert_array_equal(responses.length, [[1, 2, 0]])
    means = Responses(responses.sum, responses.length, jnp.zeros((1, 3))).mean
    np.testing.assert_array_equal(means, [[-2.0, -2.5, 0.0]])
