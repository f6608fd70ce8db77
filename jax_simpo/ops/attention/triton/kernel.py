"""Flash attention under a `key_end` mask for NVIDIA GPUs from Ampere on, by Pallas' Triton lowering.

Hidden blocks are never loaded, in the forward, in dQ and in dK/dV; the mask is evaluated only in blocks that are
visible in part. Which blocks those are is found once per batch (`bounds.py`). Why there is a second set of kernels:
docs/decisions/007-attention-on-other-gpus.md.

Precision: products sum in float32. Those of bfloat16 arrays run on the tensor cores, and the weights are rounded to
bfloat16 for the product with the values. Those of float32 arrays are full float32 products, which do not.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jax_simpo.ops.attention.backends import ScoreRule
from jax_simpo.ops.attention.blocks import whole_blocks
from jax_simpo.ops.attention.triton.backward import Inputs, key_value_gradients, query_gradient
from jax_simpo.ops.attention.triton.bounds import BlockBounds
from jax_simpo.ops.attention.triton.forward import forward
from jax_simpo.ops.attention.triton.sizes import BLOCK, tilings
from jax_simpo.ops.numerics import SAVED_ATTENTION


class _Static(NamedTuple):
    rule: ScoreRule
    block: int
    interpret: bool


def attention(
    q: Float[Array, "B L H Dh"],
    k: Float[Array, "B L K Dh"],
    v: Float[Array, "B L K Dh"],
    key_end: Int[Array, "B L"],
    positions: Int[Array, "B L"],
    bounds: BlockBounds,
    rule: ScoreRule,
    *,
    block: int = BLOCK,
    interpret: bool = False,
) -> Float[Array, "B L H Dh"]:
    """Computes grouped-query attention with gradients for q, k and v; the result has q's dtype, bfloat16 or float32.

    Args:
        q: queries; head `h` reads key/value head `h // (H / K)`.
        k: keys.
        v: values.
        key_end: int32, see `mask.visible_at`.
        positions: int32, the unit of the window.
        bounds: of `find_block_bounds`, with the same `key_end`, `positions`, window and `block`.
        rule: scale, window and cap of the scores.
        block: other than the default in tests with `interpret` only.
        interpret: run the kernels on the CPU, for tests.
    """
    length = q.shape[1]
    q, k, v, key_end, positions = (whole_blocks(x, block) for x in (q, k, v, key_end, positions))
    return _attention(_Static(rule, block, interpret), q, k, v, key_end, positions, bounds)[:, :length]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    static: _Static, q: Array, k: Array, v: Array, key_end: Array, positions: Array, bounds: BlockBounds
) -> Array:
    return _forward(static, q, k, v, key_end, positions, bounds)[0]


def _forward(
    static: _Static, q: Array, k: Array, v: Array, key_end: Array, positions: Array, bounds: BlockBounds
) -> tuple[Array, tuple[Any, ...]]:
    rule, block, interpret = static
    tiles = tilings(q.shape[3], q.dtype, q.shape[2] // k.shape[2], block).forward
    lists = bounds.queries.blocks, bounds.queries.tiles[..., 1:]
    out, lse = forward(q, k, v, key_end, positions, *lists, rule=rule, tiles=tiles, interpret=interpret)
    out = checkpoint_name(out, SAVED_ATTENTION)
    lse = checkpoint_name(lse, SAVED_ATTENTION)
    return out, (q, k, v, key_end, positions, bounds, out, lse)


def _backward(static: _Static, saved: tuple[Any, ...], dout: Array) -> tuple[Array | None, ...]:
    rule, block, interpret = static
    q, k, v, key_end, positions, bounds, out, lse = saved
    # sum_s weights[s] * dweights[s] equals dout . out (FlashAttention-2, section 3.1.1).
    delta = jnp.einsum("blhd,blhd->bhl", dout.astype(jnp.float32), out.astype(jnp.float32))
    inputs = Inputs(q, k, v, dout, lse, delta, key_end, positions)
    tiles = tilings(q.shape[3], q.dtype, q.shape[2] // k.shape[2], block)
    lists = bounds.queries.blocks, bounds.queries.tiles[..., 1:]
    dq = query_gradient(inputs, *lists, rule=rule, tiles=tiles.dq, interpret=interpret)
    lists = bounds.keys.blocks, bounds.keys.tiles[..., 1:]
    dk, dv = key_value_gradients(inputs, *lists, rule=rule, tiles=tiles.dk_dv, interpret=interpret)
    return dq, dk, dv, None, None, None


_attention.defvjp(_forward, _backward)
