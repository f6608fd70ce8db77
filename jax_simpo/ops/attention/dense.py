"""Attention with all L x L scores in memory: the oracle that every other backend is compared with.

It runs anywhere; its memory grows with the square of the row length, so it serves tests and tiny rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_simpo.ops.attention.backends import Backend, ScoreRule, runs_anywhere
from jax_simpo.ops.attention.mask import Mask
from jax_simpo.ops.numerics import matmul_precision


def prepare(mask: Mask, window: int | None) -> tuple[()]:
    """Prepares nothing: `attend` writes the mask out in every layer."""
    return ()


def attend(
    q: Float[Array, "B L H Dh"],
    k: Float[Array, "B L K Dh"],
    v: Float[Array, "B L K Dh"],
    mask: Mask,
    rule: ScoreRule,
) -> Float[Array, "B L H Dh"]:
    """Computes attention in the plainest way, with a float32 softmax; see `Backend.attend`."""
    rows, length, heads, width = q.shape
    groups = heads // k.shape[2]
    precision = matmul_precision(q.dtype)
    grouped = q.reshape(rows, length, k.shape[2], groups, width)
    scores = rule.scale * jnp.einsum(
        "bqkgd,bskd->bkgqs", grouped, k, precision=precision, preferred_element_type=jnp.float32
    )
    if rule.softcap is not None:
        scores = rule.softcap * jnp.tanh(scores / rule.softcap)
    visible = mask.visible(rule.window)[:, None, None]
    # A row of -inf has no softmax: queries that see no key get finite scores here and zero weights below.
    sees_any = visible.any(-1, keepdims=True)
    weights = jax.nn.softmax(jnp.where(visible | ~sees_any, scores, -jnp.inf), axis=-1)
    weights = jnp.where(sees_any, weights, 0.0).astype(v.dtype)
    out = jnp.einsum("bkgqs,bskd->bqkgd", weights, v, precision=precision, preferred_element_type=jnp.float32)
    return out.reshape(q.shape).astype(q.dtype)


BACKEND = Backend(prepare, attend, obstacle=runs_anywhere)
