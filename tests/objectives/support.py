"""Responses with given numbers, and the losses and gradients of an objective of the JAX side."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_simpo.objectives import Objective, Responses
from tests.objectives.oracles import Numbers


def of_means(means: Any) -> Responses:
    """Responses of one token, so that sums and means are the same."""
    return Responses(jnp.asarray(means), jnp.ones_like(means), jnp.zeros_like(means))


def responses_of(n: Numbers) -> tuple[Responses, Responses]:
    """The chosen and the rejected responses."""
    columns = [[n[f"{side}_{name}"] for name in ("sum", "length", "reference")] for side in ("chosen", "rejected")]
    chosen, rejected = (Responses(*map(jnp.asarray, of_side)) for of_side in columns)
    return chosen, rejected


def losses_and_gradients(objective: Objective, n: Numbers) -> tuple[np.ndarray, list[np.ndarray]]:
    """Losses, and the gradients of their sum by the sums of chosen and rejected."""
    chosen, rejected = responses_of(n)

    def total(chosen_sum: jax.Array, rejected_sum: jax.Array) -> tuple[jax.Array, jax.Array]:
        losses = objective.losses(chosen._replace(sum=chosen_sum), rejected._replace(sum=rejected_sum))
        return losses.sum(), losses

    gradients, losses = jax.grad(total, (0, 1), has_aux=True)(chosen.sum, rejected.sum)
    return np.asarray(losses), [np.asarray(g) for g in gradients]
