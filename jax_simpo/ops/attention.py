"""Attention under a `key_end` mask: one switch over the implementations, and the dense oracle they are tested against.

Key `k` of a row is visible to query `q` iff `k <= q < key_end[k]`; a sliding window adds
`positions[q] - positions[k] < window`. That one rule is causality, branch isolation (chosen from rejected), isolation
of packed pairs and padding. A query that sees no key (padding) gets zeros, in values and gradients.

Which implementation a run takes is decided in `attention_choice.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jax_simpo.ops import blockwise
from jax_simpo.ops.attention_choice import IMPLEMENTATIONS, resolve_implementation
from jax_simpo.sharding import RULES

__all__ = ["IMPLEMENTATIONS", "Mask", "attention", "prepare_mask", "resolve_implementation", "visible"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("key_end", "positions", "tables"),
    meta_fields=("windows", "implementation", "interpret"),
)
@dataclass(frozen=True)
class Mask:
    """The mask of a batch in the form its implementation wants, made once per batch by `prepare_mask`.

    `tables` holds, for each of `windows`, what the implementation's module made of the mask: lists of live blocks, or
    where the tokens of each response lie. Every array has the rows first, so that the mask shards with the batch.
    """

    key_end: Int[Array, "B L"]
    positions: Int[Array, "B L"]
    tables: tuple[Any, ...]
    windows: tuple[int | None, ...]
    implementation: str
    interpret: bool


def prepare_mask(
    key_end: Int[Array, "B L"],
    positions: Int[Array, "B L"],
    windows: tuple[int | None, ...] = (None,),
    implementation: str = "blockwise",
    *,
    sequences: int | None = None,
    interpret: bool = False,
) -> Mask:
    """Does, once per batch and outside the layer scan, all that attention needs to know of the mask.

    Args:
        key_end: int32, see the module docstring; padding is 0.
        positions: int32 RoPE positions, each in its own response's sequence.
        windows: the distinct sliding windows (in positions) of the model's layers; `None` is full attention.
        implementation: one of `IMPLEMENTATIONS`.
        sequences: at most so many responses in a row; `cudnn` needs it, the others do not look at it.
        interpret: run `splash`, `pallas` and `cudnn` without their hardware, slowly, for tests.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention implementation {implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if implementation == "cudnn" and sequences is None:
        raise ValueError("attention implementation 'cudnn' must be told `sequences`, how many responses a row may hold")

    def local(key_end: Array, positions: Array) -> tuple[Any, ...]:
        if implementation == "dense":
            return ()
        if implementation == "cudnn":
            from jax_simpo.ops import cudnn

            assert sequences is not None
            return (cudnn.prepare(key_end, positions, sequences=sequences),) * len(windows)
        if implementation == "blockwise":
            prepare: Any = blockwise.find_live_blocks
        elif implementation == "splash":
            from jax_simpo.ops import splash

            prepare = splash.prepare
        else:
            from jax_simpo.ops import pallas_gpu

            prepare = pallas_gpu.prepare
        return tuple(prepare(key_end, positions, window) for window in windows)

    by_row = P(RULES["batch"])
    if not jax.sharding.get_abstract_mesh().empty:
        local = jax.shard_map(local, in_specs=(by_row, by_row), out_specs=by_row, check_vma=False)
    return Mask(key_end, positions, local(key_end, positions), windows, implementation, interpret)


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


def visible(
    key_end: Int[Array, "B L"], positions: Int[Array, "B L"], window: int | None = None
) -> Bool[Array, "B L L"]:
    """The whole mask, `[row, query, key]`: the rule of the module docstring written out."""
    index = jnp.arange(key_end.shape[-1])
    query, key = index[:, None], index[None, :]
    see = (key <= query) & (query < key_end[:, None, :])
    if window is not None:
        see &= positions[:, :, None] - positions[:, None, :] < window
    return see


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
        from jax_simpo.ops import splash

        kernel: Any = splash.attention
    elif mask.implementation == "pallas":
        from jax_simpo.ops import pallas_gpu

        kernel = pallas_gpu.attention
    else:
        from jax_simpo.ops import cudnn

        kernel = cudnn.attention
    return kernel(*arrays, scale=scale, window=window, softcap=softcap, interpret=mask.interpret)


def _dense(
    q: Array, k: Array, v: Array, mask: Mask, *, scale: float, window: int | None, softcap: float | None
) -> Array:
    """The oracle: all L x L scores, float32 softmax."""
    rows, length, heads, width = q.shape
    groups = heads // k.shape[2]
    precision = blockwise.matmul_precision(q.dtype)
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
