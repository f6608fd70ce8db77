"""Attention on TPUs by tokamax's splash kernel, with a mask of its own for every row.

The kernel takes a dense boolean mask per row and makes its tables of live blocks from it (`prepare`, once per batch);
forward and backward pass then visit live blocks only, and read the mask only in those that are visible in part. The
tables hold the mask twice, as int8: 2 L^2 bytes a row and a window, 34 MB at 4,096 tokens and 537 MB at 16,384.

A row that large blocks do not divide is padded for the kernel. A block of padding sees itself alone, so it costs
little; small blocks would cost more: of a row of 9,344 tokens the kernel would visit up to 73 x 74 / 2 blocks of 128,
where 19 x 20 / 2 of 512 do.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_simpo.ops.attention.backends import Backend, Place, ScoreRule
from jax_simpo.ops.attention.mask import Mask, visible_at
from jax_simpo.ops.numerics import SAVED_ATTENTION

_LANES = 128  # a block is a multiple of it
_LARGEST_BLOCK = 512
# With grouped queries the kernel adds dK and dV of one head to those it wrote for the one before. With one block a row
# it reads them back before they are written, and the gradients are wrong; four leave room for its prefetching too.
_FEWEST_BLOCKS = 4
_MOST_PADDING = 1 / 8  # of a row, for larger blocks; the tables of the mask grow by twice as much


class Tables(NamedTuple):
    """tokamax's `MaskInfo` of the forward and of the backward pass; every array has the rows first."""

    forward: Any
    backward: Any


def prepare(mask: Mask, window: int | None) -> Tables:
    """Makes the kernel's tables for every row; see `Backend.prepare`.

    Here padding sees itself: the kernel would never visit a block of queries that sees nothing, and its part of the
    result would be whatever lay in memory. `attend` sets those queries to zero.
    """
    splash = _kernels()
    block, length = _block_and_padded(mask.key_end.shape[1])
    padding = ((0, 0), (0, length - mask.key_end.shape[1]))
    key_ends, positions = jnp.pad(mask.key_end, padding), jnp.pad(mask.positions, padding)
    index = jnp.arange(length)
    config = _config(block)

    def one_row(row: tuple[Int[Array, " L"], Int[Array, " L"]]) -> Tables:
        key_end, position = row
        key_end = jnp.maximum(key_end, index + 1)
        visible = visible_at(
            index[:, None], index[None, :], key_end[None, :], position[:, None], position[None, :], window
        )
        kernel = splash.make_dynamic_splash_mha(visible, config=config)
        return Tables(kernel.fwd_mask_info, kernel.dkv_mask_info)

    return jax.lax.map(one_row, (key_ends, positions))


def attend(
    q: Float[Array, "B L H Dh"],
    k: Float[Array, "B L K Dh"],
    v: Float[Array, "B L K Dh"],
    mask: Mask,
    rule: ScoreRule,
) -> Float[Array, "B L H Dh"]:
    """Computes attention row by row; see `Backend.attend`. With `mask.interpret` it runs without a TPU, for tests."""
    splash = _kernels()
    length = q.shape[1]
    block, padded = _block_and_padded(length)
    padding = ((0, 0), (0, padded - length), (0, 0), (0, 0))
    config = _config(block, rule.softcap, mask.interpret)
    q = (q.astype(jnp.float32) * rule.scale).astype(q.dtype)  # the kernel has no factor on the scores
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

    out = jax.vmap(one_row)(q, k, v, mask.table(rule.window)).swapaxes(1, 2)[:, :length]
    return jnp.where(mask.real[:, :, None, None], out, jnp.zeros((), out.dtype))


def _kernels() -> Any:
    """Imports tokamax's kernels; here, because the package is optional and `obstacle` answers without it."""
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel

    return splash_attention_kernel


def _block_and_padded(length: int) -> tuple[int, int]:
    """Returns the largest block, up to 512, that pads a row by no more than an eighth, and the length it pads to.

    That large blocks are fast, and what padding they are worth, is not measured.
    """
    for block in range(_LARGEST_BLOCK, 0, -_LANES):
        padded = max(length + -length % block, _FEWEST_BLOCKS * block)
        if block == _LANES or padded <= (1 + _MOST_PADDING) * length:
            return block, padded
    raise AssertionError(f"{_LARGEST_BLOCK} is no multiple of {_LANES}")


def _config(block: int, softcap: float | None = None, interpret: bool = False) -> Any:
    """Makes the kernel's config for blocks of this size."""
    from jax.experimental.pallas import tpu

    return _kernels().SplashConfig(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        dq_reduction_steps=3,  # the kernel's setting for a mask made at run time
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=SAVED_ATTENTION,
        interpret=tpu.InterpretParams() if interpret else False,
    )


def obstacle(place: Place) -> str | None:
    """Says why splash cannot run there; see `Backend.obstacle`."""
    if place.platform != "tpu":
        return f"needs a TPU, and this is a {place.kind}"
    if place.dtype != "bfloat16":
        return f"computes in bfloat16, and `dtype` is {place.dtype}"
    if find_spec("tokamax") is None:
        return "needs the package tokamax (`pip install 'jax-simpo[tpu]'`)"
    return None


BACKEND = Backend(prepare, attend, obstacle)
