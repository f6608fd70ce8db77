"""Attention under a `key_end` mask: one switch over the implementations, and the dense oracle they are tested against.

Key `k` of a row is visible to query `q` iff `k <= q < key_end[k]`; a sliding window adds
`positions[q] - positions[k] < window`. That one rule is causality, branch isolation (chosen from rejected), isolation
of packed pairs and padding. A query that sees no key (padding) gets zeros, in values and gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jax_simpo.errors import ConfigError
from jax_simpo.ops import blockwise
from jax_simpo.sharding import RULES

IMPLEMENTATIONS = ("dense", "blockwise")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("key_end", "positions", "live_blocks"),
    meta_fields=("windows", "implementation"),
)
@dataclass(frozen=True)
class Mask:
    """The mask of a batch in the form its implementation wants, made once per batch by `prepare_mask`.

    `live_blocks` holds, for each of `windows`, which key blocks each query block has to visit (blockwise only). Every
    array has the rows first, so that the mask shards with the batch.
    """

    key_end: Int[Array, "B L"]
    positions: Int[Array, "B L"]
    live_blocks: tuple[blockwise.LiveBlocks, ...]
    windows: tuple[int | None, ...]
    implementation: str


def resolve_implementation(name: str) -> tuple[str, str]:
    """The implementation that a config's `attention` stands for, and why.

    Raises:
        ConfigError: the implementation does not exist in this version.
    """
    if name == "auto":
        return "blockwise", "memory linear in the row length, on any device"
    if name not in IMPLEMENTATIONS:
        raise ConfigError(f"`attention: {name}` is not in this version; choose auto, {', '.join(IMPLEMENTATIONS)}")
    return name, "as configured"


def prepare_mask(
    key_end: Int[Array, "B L"],
    positions: Int[Array, "B L"],
    windows: tuple[int | None, ...] = (None,),
    implementation: str = "blockwise",
) -> Mask:
    """Does, once per batch and outside the layer scan, all that attention needs to know of the mask.

    Args:
        key_end: int32, see the module docstring; padding is 0.
        positions: int32 RoPE positions, each in its own response's sequence.
        windows: the distinct sliding windows (in positions) of the model's layers; `None` is full attention.
        implementation: one of `IMPLEMENTATIONS`.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention implementation {implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    live: tuple[blockwise.LiveBlocks, ...] = ()
    if implementation == "blockwise":
        live = tuple(blockwise.find_live_blocks(key_end, positions, window) for window in windows)
    return Mask(key_end, positions, live, windows, implementation)


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
    if mask.implementation == "dense":
        local = partial(_dense, scale=scale, window=window, softcap=softcap)
    else:
        local = partial(_blockwise, scale=scale, window=window, softcap=softcap)
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


def _blockwise(
    q: Array, k: Array, v: Array, mask: Mask, *, scale: float, window: int | None, softcap: float | None
) -> Array:
    live = mask.live_blocks[mask.windows.index(window)]
    return blockwise.attention(q, k, v, mask.key_end, mask.positions, live, scale=scale, window=window, softcap=softcap)
