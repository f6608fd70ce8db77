"""Responses with given numbers, for tests of objectives."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jax_simpo.objectives import Responses


def of_means(means: Any) -> Responses:
    """Responses of one token, so that sums and means are the same."""
    return Responses(jnp.asarray(means), jnp.ones_like(means), jnp.zeros_like(means))
