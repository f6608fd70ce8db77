"""Flash attention under a `key_end` mask for NVIDIA Hopper GPUs (H100, H200), by Pallas' Mosaic GPU lowering.

Hidden blocks are never loaded, in the forward, in dQ and in dK/dV; the mask is evaluated only in blocks that are
visible in part. Which blocks those are is found once per batch (`bounds.py`). Why Mosaic GPU, and what it was measured
to need: docs/decisions/003-attention-on-gpu.md.

Precision: products are bfloat16 with float32 sums, the softmax is float32, the weights are rounded to bfloat16 for the
product with the values. A float32 array (the results and the weights too) is taken as the sum of two bfloat16 arrays,
three products for one: 16 bits of mantissa, relative errors around 1e-5. TF32 would have 10 bits.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jax_simpo.ops.attention.backends import ScoreRule
from jax_simpo.ops.attention.blocks import whole_blocks
from jax_simpo.ops.attention.pallas.backward import Inputs, key_value_gradients, query_gradient
from jax_simpo.ops.attention.pallas.bounds import BLOCK, BlockBounds
from jax_simpo.ops.attention.pallas.forward import forward
from jax_simpo.ops.attention.pallas.switches import DEFAULTS, Switches
from jax_simpo.ops.attention.pallas.warpgroup import SHARED_MEMORY, Tiles, mask_vectors
from jax_simpo.ops.numerics import SAVED_ATTENTION


class _Tilings(NamedTuple):
    """The tiles of each kernel, static. `gradients` lists what each dK/dV kernel computes, and its tiles."""

    forward: Tiles
    dq: Tiles
    gradients: tuple[tuple[tuple[str, ...], Tiles], ...]


class _Static(NamedTuple):
    rule: ScoreRule
    switches: Switches
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
    switches: Switches = DEFAULTS,
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
        switches: variants of the kernels.
        block: other than the default in tests with `interpret` only.
        interpret: run the kernels on the CPU, step by step, for tests.

    Raises:
        ValueError: the scale is not positive.
    """
    if rule.scale <= 0:  # the largest score would not be the largest product
        raise ValueError(f"attention: the scale is {rule.scale}, not a positive number")
    length = q.shape[1]
    q, k, v, key_end, positions = (whole_blocks(x, block) for x in (q, k, v, key_end, positions))
    return _attention(_Static(rule, switches, block, interpret), q, k, v, key_end, positions, bounds)[:, :length]


def _tilings(width: int, parts: int, block: int, interpret: bool) -> _Tilings:
    """Returns tiles that fit into the registers and shared memory of Hopper (`benchmarks/kernel_report.py` shows both).

    Args:
        width: features of a head.
        parts: bfloat16 arrays that a matrix consists of.
        block: rows of a tile.
        interpret: take fewer stages, to test that a ring is used again.
    """

    def tiles(step: int, resident: int, vectors: int) -> Tiles:
        """Returns as many stages as fit beside `resident` matrices that stay in memory.

        `vectors` travel with the first ring's matrix. That ring is released last, so that it gains most by two stages.
        """
        workers, rows = 2, block // 2
        row_bytes = width * 2 * parts
        free = SHARED_MEMORY - resident * workers * rows * row_bytes
        first, second = step * (row_bytes + 4 * vectors), step * row_bytes
        choices = ((2, 2), (2, 1)) if interpret else ((4, 4), (3, 3), (2, 2), (2, 1))
        return Tiles(workers, rows, step, next((m, n) for m, n in choices if m * first + n * second <= free))

    whole, half = block, block // 2  # no less than half a block: the tensor cores contract 64 at a time
    narrow = width * parts <= 128
    # An accumulator takes width / 2 registers a lane, scores and their gradients step / 2 each; there are 240.
    if narrow:
        gradients: tuple[tuple[tuple[str, ...], Tiles], ...] = ((("dk", "dv"), tiles(half, 2, 4)),)
    else:
        gradients = ((("dk",), tiles(half, 2, 4)), (("dv",), tiles(half, 1, 4)))
    return _Tilings(tiles(whole if narrow else half, 1, 2), tiles(half, 2, 2), gradients)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    static: _Static, q: Array, k: Array, v: Array, key_end: Array, positions: Array, bounds: BlockBounds
) -> Array:
    return _forward(static, q, k, v, key_end, positions, bounds)[0]


def _forward(
    static: _Static, q: Array, k: Array, v: Array, key_end: Array, positions: Array, bounds: BlockBounds
) -> tuple[Array, tuple[Any, ...]]:
    rule, switches, block, interpret = static
    tiles = _tilings(q.shape[-1], _part_count(q.dtype), block, interpret).forward
    out, lse = forward(
        _to_parts(q),
        _to_parts(k),
        _to_parts(v),
        *mask_vectors(key_end, positions, rule.window),
        bounds.queries if tiles.step == block else bounds.queries_halves,
        rule=rule,
        tiles=tiles,
        switches=switches,
        interpret=interpret,
    )
    out = checkpoint_name(_from_parts(out, q.dtype), SAVED_ATTENTION)
    lse = checkpoint_name(lse, SAVED_ATTENTION)
    return out, (q, k, v, key_end, positions, bounds, out, lse)


def _backward(static: _Static, saved: tuple[Any, ...], dout: Array) -> tuple[Array | None, ...]:
    rule, switches, block, interpret = static
    q, k, v, key_end, positions, bounds, out, lse = saved
    # sum_s weights[s] * dweights[s] equals dout . out (FlashAttention-2, section 3.1.1).
    delta = jnp.einsum("blhd,blhd->bhl", dout.astype(jnp.float32), out.astype(jnp.float32))
    tilings = _tilings(q.shape[-1], _part_count(q.dtype), block, interpret)
    matrices = (_to_parts(q), _to_parts(k), _to_parts(v), _to_parts(dout))
    inputs = Inputs(*matrices, jnp.stack([lse, delta], axis=2), *mask_vectors(key_end, positions, rule.window))
    choices: dict[str, Any] = {"rule": rule, "switches": switches, "interpret": interpret}
    dq = query_gradient(inputs, bounds.queries_halves, tiles=tilings.dq, **choices)
    gradients: dict[str, Array] = {}
    for wanted, tiles in tilings.gradients:
        computed = key_value_gradients(inputs, bounds.keys_halves, wanted=wanted, tiles=tiles, **choices)
        gradients.update(zip(wanted, computed, strict=True))
    dq, dk, dv = (_from_parts(x, q.dtype) for x in (dq, gradients["dk"], gradients["dv"]))
    return dq, dk, dv, None, None, None


_attention.defvjp(_forward, _backward)


def _part_count(dtype: Any) -> int:
    return 1 if jnp.dtype(dtype) == jnp.bfloat16 else 2


def _to_parts(x: Float[Array, "B L H Dh"]) -> Float[Array, "B L H parts Dh"]:
    """Takes an array apart into bfloat16 ones that sum up to it."""
    parts = []
    for _ in range(_part_count(x.dtype)):
        # XLA may drop a cast to bfloat16 and back, and with it the whole second part. It may not drop this.
        parts.append(lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7))
        x = x - parts[-1]
    return jnp.stack(parts, axis=3).astype(jnp.bfloat16)


def _from_parts(x: Float[Array, "B L H parts Dh"], dtype: Any) -> Float[Array, "B L H Dh"]:
    return x.astype(dtype).sum(axis=3)
