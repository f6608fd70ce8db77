"""Flash attention under a `key_end` mask for NVIDIA Hopper GPUs (H100, H200), by Pallas' Mosaic GPU lowering.

Blocks nobody sees are never loaded, in the forward, in dQ and in dK/dV; the mask is evaluated only in blocks that are
seen in part. Which blocks those are is found once per batch (`prepare`). Why Mosaic GPU, and what it was measured to
need: docs/decisions/003-attention-on-gpu.md.

Precision: products are bfloat16 with float32 sums, the softmax is float32, the weights are rounded to bfloat16 for the
product with the values. float32 arrays, the results too, are taken as the sum of two bfloat16 numbers each (and so are
the weights), three products for one: 16 bits of mantissa, relative errors around 1e-5. TF32 would have 10 bits.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jax_simpo.errors import ConfigError
from jax_simpo.ops.attention.choice import PALLAS_HEADS
from jax_simpo.ops.attention.pallas import bounds
from jax_simpo.ops.attention.pallas.backward import Inputs, key_value_gradients, query_gradient
from jax_simpo.ops.attention.pallas.bounds import BLOCK, BlockBounds
from jax_simpo.ops.attention.pallas.forward import forward
from jax_simpo.ops.attention.pallas.warpgroup import SHARED_MEMORY, Rule, Tiles
from jax_simpo.ops.numerics import SAVED

prepare = bounds.find


class _Plan(NamedTuple):
    """How the kernels are cut up, static. `gradients` lists what each dK/dV kernel computes, and how."""

    forward: Tiles
    dq: Tiles
    gradients: tuple[tuple[tuple[str, ...], Tiles], ...]


def attention(
    q: Float[Array, "B L H Dh"],
    k: Float[Array, "B L K Dh"],
    v: Float[Array, "B L K Dh"],
    key_end: Int[Array, "B L"],
    positions: Int[Array, "B L"],
    bounds: BlockBounds,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    block: int = BLOCK,
    interpret: bool = False,
) -> Float[Array, "B L H Dh"]:
    """Grouped-query attention with gradients for q, k and v; the result has q's dtype.

    Args:
        key_end: key `k` is visible to query `q` iff `k <= q < key_end[k]`.
        positions: a window adds `positions[q] - positions[k] < window`.
        bounds: what `prepare` made of the same `key_end`, `positions`, `window` and `block`.
        scale: scores are scaled, then capped (`softcap * tanh(s / softcap)`), then masked.
        block: other than the default for tests in interpret mode only.
        interpret: run the kernels on the CPU, step by step, for tests.

    Raises:
        ConfigError: the head size or dtype is not supported.
    """
    if str(q.dtype) not in PALLAS_HEADS:
        raise ConfigError(f"`attention: pallas` computes in bfloat16 or float32, not {q.dtype}; set `dtype`")
    sizes = PALLAS_HEADS[str(q.dtype)]
    if not interpret and q.shape[-1] not in sizes:
        raise ConfigError(
            f"`attention: pallas` has {q.dtype} kernels for head sizes {', '.join(map(str, sizes))}, and this model's "
            f"is {q.shape[-1]}; choose `attention: blockwise`"
        )
    rule = Rule(float(scale), window, softcap)
    length = q.shape[1]
    padding = -length % block
    if padding:
        q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v))
        key_end, positions = (jnp.pad(x, ((0, 0), (0, padding))) for x in (key_end, positions))
    return _attention((rule, block, interpret), q, k, v, key_end, positions, bounds)[:, :length]


def _plan(width: int, parts: int, block: int, interpret: bool) -> _Plan:
    """Tiles that fit into the registers and the shared memory of Hopper (`benchmarks/kernel_report.py` shows both)."""

    def tiles(step: int, held: int) -> Tiles:
        """As many stages as fit beside `held` matrices that stay; four at most, two to see a ring go round."""
        workers, rows = 2, block // 2
        line = width * 2 * parts  # bytes of a row of a matrix
        free = SHARED_MEMORY - held * workers * rows * line
        fit = free // (2 * step * (line + 8))  # two matrices with up to two vectors each
        return Tiles(block, workers, rows, step, min(2 if interpret else 4, fit))

    wide, half = block, block // 2  # no less than half a block: the tensor cores contract 64 at a time
    narrow = width * parts <= 128
    # An accumulator takes width / 2 registers a lane, scores and their gradients step / 2 each; there are 240.
    if narrow:
        gradients: tuple[tuple[tuple[str, ...], Tiles], ...] = ((("dk", "dv"), tiles(half, 2)),)
    else:
        gradients = ((("dk",), tiles(half, 2)), (("dv",), tiles(half, 1)))
    return _Plan(tiles(wide if narrow else half, 1), tiles(half, 2), gradients)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    static: tuple[Rule, int, bool], q: Array, k: Array, v: Array, key_end: Array, positions: Array, bounds: BlockBounds
) -> Array:
    return _forward(static, q, k, v, key_end, positions, bounds)[0]


def _forward(
    static: tuple[Rule, int, bool], q: Array, k: Array, v: Array, key_end: Array, positions: Array, bounds: BlockBounds
) -> tuple[Array, tuple[Any, ...]]:
    rule, block, interpret = static
    out, lse = forward(
        _taken_apart(q),
        _taken_apart(k),
        _taken_apart(v),
        key_end,
        positions,
        bounds.key_blocks,
        bounds.key_counts,
        rule=rule,
        tiles=_plan(q.shape[-1], _parts(q.dtype), block, interpret).forward,
        interpret=interpret,
    )
    out, lse = checkpoint_name(_joined(out, q.dtype), SAVED), checkpoint_name(lse, SAVED)
    return out, (q, k, v, key_end, positions, bounds, out, lse)


def _backward(static: tuple[Rule, int, bool], saved: tuple[Any, ...], dout: Array) -> tuple[Array | None, ...]:
    rule, block, interpret = static
    q, k, v, key_end, positions, bounds, out, lse = saved
    # sum_s weights[s] * dweights[s] equals dout . out (FlashAttention-2, section 3.1.1).
    delta = jnp.einsum("blhd,blhd->bhl", dout.astype(jnp.float32), out.astype(jnp.float32))
    plan = _plan(q.shape[-1], _parts(q.dtype), block, interpret)
    matrices = (_taken_apart(q), _taken_apart(k), _taken_apart(v), _taken_apart(dout))
    inputs = Inputs(*matrices, lse, delta, key_end, positions)
    dq = query_gradient(inputs, bounds.key_blocks, bounds.key_counts, rule=rule, tiles=plan.dq, interpret=interpret)
    gradients: dict[str, Array] = {}
    for wanted, tiles in plan.gradients:
        found = key_value_gradients(
            inputs,
            bounds.query_blocks,
            bounds.query_counts,
            wanted=wanted,
            rule=rule,
            tiles=tiles,
            interpret=interpret,
        )
        gradients.update(zip(wanted, found, strict=True))
    dq, dk, dv = (_joined(x, q.dtype) for x in (dq, gradients["dk"], gradients["dv"]))
    return dq, dk, dv, None, None, None


_attention.defvjp(_forward, _backward)


def _parts(dtype: Any) -> int:
    return 1 if jnp.dtype(dtype) == jnp.bfloat16 else 2


def _taken_apart(x: Float[Array, "B L H Dh"]) -> Float[Array, "B L H parts Dh"]:
    """bfloat16 numbers that sum up to the given ones."""
    pieces = []
    for _ in range(_parts(x.dtype)):
        # XLA may drop a cast to bfloat16 and back, and with it the whole second part; this it may not.
        pieces.append(lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7))
        x = x - pieces[-1]
    return jnp.stack(pieces, axis=3).astype(jnp.bfloat16)


def _joined(x: Float[Array, "B L H parts Dh"], dtype: Any) -> Float[Array, "B L H Dh"]:
    return x.astype(dtype).sum(axis=3)
