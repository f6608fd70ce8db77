"""Attention under a `key_end` mask: one switch over its implementations, and the dense oracle."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jax_simpo.ops.attention import blockwise
from jax_simpo.ops.attention.mask import Mask, visible
from jax_simpo.ops.numerics import matmul_precision
from jax_simpo.sharding import RULES


def attention(
    q: Float[Array, "B L H Dh"],
    k: Float[Array, "B L K Dh"],
    v: Float[Array, "B L K Dh"],
    mask: Mask,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Float[Array, "B L H Dh"]:
    """Grouped-query attention; query head `h` reads key/value head `h // (H / K)`.

    Scores are scaled, then soft-capped (`softcap * tanh(s / softcap)`), then masked; the softmax is float32, the result
    has q's dtype. Under the mesh of `jax.set_mesh` rows are split over `batch` and heads over `heads`, and every device
    works on its own rows and heads alone.
    """
    local = partial(_local, scale=scale, window=window, softcap=softcap)
    if jax.sharding.get_abstract_mesh().empty:
        return local(q, k, v, mask)
    by_head = P(RULES["batch"], None, RULES["heads"], None)
    sharded = jax.shard_map(
        local, in_specs=(by_head, by_head, by_head, P(RULES["batch"])), out_specs=by_head, check_vma=False
    )
    return sharded(q, k, v, mask)


def _local(
    q: Array, k: Array, v: Array, mask: Mask, *, scale: float, window: int | None, softcap: float | None
) -> Array:
    """What one device does. Kernels are imported where they are taken: each needs libraries that not all have."""
    if mask.implementation == "dense":
        return _dense(q, k, v, mask, scale=scale, window=window, softcap=softcap)
    table = mask.tables[mask.windows.index(window)]
    arrays = q, k, v, mask.key_end, mask.positions, table
    if mask.implementation == "blockwise":
        return blockwise.attention(*arrays, scale=scale, window=window, softcap=softcap)
    if mask.implementation == "splash":
        from jax_simpo.ops.attention import splash

        kernel: Any = splash.attention
    elif mask.implementation == "pallas":
        from jax_simpo.ops.attention.pallas import kernel

        kernel = kernel.attention
    else:
        from jax_simpo.ops.attention import cudnn

        kernel = cudnn.attention
    return kernel(*arrays, scale=scale, window=window, softcap=softcap, interpret=mask.interpret)


def _dense(
    q: Array, k: Array, v: Array, mask: Mask, *, scale: float, window: int | None, softcap: float | None
) -> Array:
    """The oracle: all L x L scores, float32 softmax."""
    rows, length, heads, width = q.shape
    groups = heads // k.shape[2]
    precision = matmul_precision(q.dtype)
    grouped = q.reshape(rows, length, k.shape[2], groups, width)
    scores = scale * jnp.einsum(
        "bqkgd,bskd->bkgqs", grouped, k, precision=precision, preferred_element_type=jnp.float32
    )
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    see = visible(mask.key_end, mask.positions, window)[:, None, None]
    # A row of -inf has no softmax: such queries get finite scores here and zero weights below.
    alive = see.any(-1, keepdims=True)
    weights = jax.nn.softmax(jnp.where(see | ~alive, scores, -jnp.inf), axis=-1)
    weights = jnp.where(alive, weights, 0.0).astype(v.dtype)
    out = jnp.einsum("bkgqs,bskd->bqkgd", weights, v, precision=precision, preferred_element_type=jnp.float32)
    return out.reshape(q.shape).astype(q.dtype)
