"""Scores in base 2, with which a weight is one `exp2`, an instruction of GPUs."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jax_simpo.ops.attention.backends import ScoreRule

LOG2E = math.log2(math.e)


def logits(products: jax.Array, rule: ScoreRule) -> tuple[jax.Array, jax.Array | None]:
    """Returns scaled, capped scores times log2(e), and the derivative of the cap (None where there is no cap)."""
    if rule.softcap is None:
        return products * (rule.scale * LOG2E), None
    # tanh by exp2: the GPU's own approximation is off by 5e-4, which a cap of 50 would turn into 0.02.
    tanh = 1.0 - 2.0 / (1.0 + jnp.exp2(products * (2.0 * LOG2E * rule.scale / rule.softcap)))
    return tanh * (rule.softcap * LOG2E), 1.0 - tanh * tanh
