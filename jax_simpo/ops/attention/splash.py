"""Attention on TPU: tokamax's splash kernel with a mask of its own for every row.

The kernel wants a dense boolean mask per row and makes its tables of live blocks from it (`prepare`, once per batch);
forward and backward then visit live blocks only and read the mask only in mixed ones. The tables hold the mask twice,
as int8: 2 L^2 bytes a row and a window, 34 MB at 4,096 tokens and 537 MB at 16,384.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int
from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel as splash

from jax_simpo.ops.numerics import SAVED

_LANES = 128  # a block is a multiple of it
_LARGEST_BLOCK = 512
# With grouped queries the kernel adds dK and dV of one head to what it wrote for the last. With one block a row it
# reads them back before they are written, and the gradients are wrong; four leave room for its prefetching too.
_FEWEST_BLOCKS = 4


class Tables(NamedTuple):
    """tokamax's `MaskInfo` of the forward and of the backward pass; every array has the rows first."""

    forward: Any
    backward: Any


def prepare(key_end: Int[Array, "B L"], positions: Int[Array, "B L"], window: int | None) -> Tables:
    """The tables of every row.

    Padding sees itself here: a block of queries that sees nothing would never be visited, and its part of the result
    would be whatever lay in memory. `attention` sets those queries to zero.
    """
    length = _padded(key_end.shape[1])
    padding = ((0, 0), (0, length - key_end.shape[1]))
    key_end, positions = jnp.pad(key_end, padding), jnp.pad(positions, padding)
    index = jnp.arange(length)
    config = _config(length)

    def one_row(row: tuple[Array, Array]) -> Tables:
        end, at = row
        end = jnp.maximum(end, index + 1)
        see = (index[None, :] <= index[:, None]) & (index[:, None] < end[None, :])
        if window is not None:
            see &= at[:, None] - at[None, :] < window
        kernel = splash.make_dynamic_splash_mha(see, config=config)
        return Tables(kernel.fwd_mask_info, kernel.dkv_mask_info)

    return jax.lax.map(one_row, (key_end, positions))


def attention(
    q: Float[Array, "B L H Dh"],
    k: Float[Array, "B L K Dh"],
    v: Float[Array, "B L K Dh"],
    key_end: Int[Array, "B L"],
    positions: Int[Array, "B L"],
    tables: Tables,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    interpret: bool = False,
) -> Float[Array, "B L H Dh"]:
    """Grouped-query attention; the result has q's dtype.

    Args:
        q: queries; head `h` reads key/value head `h // (H / K)`.
        k: keys.
        v: values.
        key_end: int32, the end (exclusive) of the queries that see each key; 0 marks padding.
        positions: not used; `tables` hold the mask.
        tables: of `prepare`.
        scale: factor on the scores; the kernel has none, so the queries take it.
        window: not used, as `positions`.
        softcap: `softcap * tanh(score / softcap)` before the mask, `None` for none.
        interpret: run the kernel without a TPU, for tests.
    """
    length = q.shape[1]
    padding = ((0, 0), (0, _padded(length) - length), (0, 0), (0, 0))
    config = _config(_padded(length), softcap, interpret)
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    q, k, v = (jnp.pad(x, padding).swapaxes(1, 2) for x in (q, k, v))

    def one_row(q: Array, k: Array, v: Array, tables: Tables) -> Array:
        kernel = splash.SplashAttentionKernel(
            *tables,
            config=config,
            is_mqa=False,
            save_residuals=False,
            mask_value=splash.base.DEFAULT_MASK_VALUE,
            mask_function=None,
            fwd_mask_sparsity=1.0,
            dkv_mask_sparsity=1.0,
        )
        return kernel(q, k, v)

    out = jax.vmap(one_row)(q, k, v, tables).swapaxes(1, 2)[:, :length]
    return jnp.where((key_end > 0)[:, :, None, None], out, jnp.zeros((), out.dtype))


def _padded(length: int) -> int:
    return max(length + -length % _LANES, _FEWEST_BLOCKS * _LANES)


def _config(length: int, softcap: float | None = None, interpret: bool = False) -> splash.SplashConfig:
    """Blocks as large as divide the row, up to 512: chosen, not measured, for want of a TPU."""
    sizes = range(_LANES, min(_LARGEST_BLOCK, length // _FEWEST_BLOCKS) + 1, _LANES)
    block = max(size for size in sizes if length % size == 0)
    return splash.SplashConfig(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        dq_reduction_steps=3,  # the one that goes with a mask made at run time
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=SAVED,
        interpret=pltpu.InterpretParams() if interpret else False,
    )
