"""The mathematics of a tile inside the kernels: from products to logits, and to their gradient.

Rows of a tile are states, columns are entries of the vocabulary. Numbers of a state come as columns of width 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax


def capped(products: jax.Array, softcap: float | None) -> tuple[jax.Array, jax.Array | None]:
    """Returns the logits, and the derivative of the cap (None where there is no cap)."""
    if softcap is None:
        return products, None
    # tanh by exp: a GPU's own approximation is off by 5e-4, which a cap of 30 would turn into 0.015.
    tanh = 1.0 - 2.0 / (1.0 + jnp.exp(products * (2.0 / softcap)))
    return softcap * tanh, 1.0 - tanh * tanh


def gradient(
    products: jax.Array,
    tokens: Sequence[jax.Array],
    dlogps: Sequence[jax.Array],
    lse: jax.Array,
    first: jax.Array,
    uncounted: jax.Array,
    softcap: float | None,
) -> jax.Array:
    """Returns the gradient of the products, float32; see `Backend`.

    Args:
        products: of states and head, before the cap.
        tokens: the targets of each state.
        dlogps: the gradients of their log-probs.
        lse: log-sum-exp of each state.
        first: number of the first column among the entries that the tokens are counted from.
        uncounted: columns before this number are not the block's own, and get 0.
        softcap: the cap.
    """
    logits, slope = capped(products, softcap)
    entry = first + lax.broadcasted_iota(jnp.int32, products.shape, 1)
    # Padding has an infinite log-sum-exp, and so probabilities of 0.
    result = -sum(dlogps[1:], dlogps[0]) * jnp.exp(logits - lse)
    for token, dlogp in zip(tokens, dlogps, strict=True):
        result += jnp.where(entry == token, dlogp, 0.0)
    result = result if slope is None else result * slope
    return jnp.where(entry >= uncounted, result, 0.0)
