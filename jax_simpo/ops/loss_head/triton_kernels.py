"""The kernels of `triton`: one for the sums of all tiles, one for the gradient of a tile's logits.

A program computes a piece of a tile, `ROWS` states by `COLUMNS` entries of the vocabulary, which stays in registers. Of
a piece's logits the forward kernel writes two numbers for each state, their largest and the sum of their exponentials;
the pieces of a state are put together afterwards, so no program waits for another. The backward kernel writes the
gradient in the states' dtype, which two plain matrix products read.

Programs that run at the same time read the same states and entries, so that most of what they read comes from the
second-level cache: `_TOGETHER` pieces lie side by side along the states, then the next entries follow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from jax_simpo.ops.loss_head.backends import Wanted
from jax_simpo.ops.loss_head.states import SHARED
from jax_simpo.ops.loss_head.tile import capped, gradient
from jax_simpo.ops.numerics import LOWEST, matmul_precision

# Chosen by compiling (benchmarks/loss_head_kernels.py): operands of four passes take 96 KiB of shared memory, within
# the 99 KiB of Ada, the least of all GPUs from Ampere on. How fast they are has not been measured.
ROWS, COLUMNS, STEP = 128, 256, 32  # states and entries of a piece, and features in a pass of the loop
_WARPS, _STAGES = 8, 4
_TOGETHER = 16

Ref = Any  # a reference to memory inside a kernel; jax has no public type for it
Index = Any  # a traced int32 inside a kernel


def sums(
    states: Float[Array, "N D"],
    head: Float[Array, "V D"],
    live: Int[Array, ""],
    softcap: float | None,
    *,
    interpret: bool,
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """Returns a maximum of each state's logits and the sum of their exponentials, less that maximum.

    States from number `live` on are not computed; they get `LOWEST` and 0.
    """
    count, vocabulary = len(states), len(head)

    def kernel(states: Ref, head: Ref, live: Ref, top: Ref, total: Ref) -> None:
        row, piece, column = _place()

        @pl.when(row < live[0])
        def _() -> None:
            logits, _ = capped(_products(states, row, head, column), softcap)
            entry = column + lax.broadcasted_iota(jnp.int32, logits.shape, 1)
            logits = jnp.where(entry < vocabulary, logits, LOWEST)
            largest = logits.max(axis=1)
            added = jnp.exp(logits - largest[:, None]).sum(axis=1)
            rows = row + jnp.arange(ROWS)
            plgpu.store(top.at[piece, rows], largest, mask=rows < count)
            plgpu.store(total.at[piece, rows], added, mask=rows < count)

    pieces = pl.cdiv(vocabulary, COLUMNS)
    shape = jax.ShapeDtypeStruct((pieces, count), jnp.float32)
    tops, totals = _launch(kernel, "loss_head_sums", count, vocabulary, [shape, shape], interpret)(
        states, head, live[None]
    )
    is_live = jnp.arange(count) < live
    top = jnp.where(is_live, tops.max(0), LOWEST)
    total = jnp.where(is_live, (totals * jnp.exp(tops - top)).sum(0), 0.0)
    return top, total


def dlogits(
    states: Float[Array, "C D"],
    weights: Float[Array, "S D"],
    wanted: Wanted,
    uncounted: Int[Array, ""],
    softcap: float | None,
    *,
    interpret: bool,
) -> Float[Array, "C S"]:
    """Returns the gradient of the products of states and weights, in the states' dtype.

    Args:
        states: of the tile.
        weights: the block's part of the head.
        wanted: targets are counted from the block's first entry.
        uncounted: the number of entries that the block begins with and that are another's.
        softcap: the cap.
        interpret: run the kernel on the CPU, for tests.
    """
    count, size = len(states), len(weights)

    def kernel(states: Ref, weights: Ref, token: Ref, dlogp: Ref, lse: Ref, uncounted: Ref, out: Ref) -> None:
        row, _, column = _place()
        rows, columns = row + jnp.arange(ROWS), column + jnp.arange(COLUMNS)
        own = jnp.minimum(rows, count - 1)

        def of_each(ref: Ref) -> list[jax.Array]:
            return [ref[n, own][:, None] for n in range(SHARED)]

        products = _products(states, row, weights, column)
        result = gradient(
            products, of_each(token), of_each(dlogp), lse[own][:, None], column, uncounted[0], softcap
        ).astype(out.dtype)
        inside = (rows < count)[:, None] & (columns < size)[None, :]
        plgpu.store(out.at[rows[:, None], columns[None, :]], result, mask=inside)

    shape = jax.ShapeDtypeStruct((count, size), states.dtype)
    (result,) = _launch(kernel, "loss_head_dlogits", count, size, [shape], interpret)(
        states, weights, wanted.token.T, wanted.dlogp.T, wanted.lse, uncounted[None]
    )
    return result


def _place() -> tuple[Index, Index, Index]:
    """Returns a program's first state, and the number and the first entry of its piece of the vocabulary."""
    row = (pl.program_id(2) * pl.num_programs(0) + pl.program_id(0)) * ROWS
    piece = pl.program_id(1)
    return row, piece, piece * COLUMNS


def _products(states: Ref, row: Index, weights: Ref, column: Index) -> jax.Array:
    """Returns the products of a piece's states and entries, float32. Beyond the last ones it repeats them."""
    width = states.shape[1]
    step = STEP if width % STEP == 0 else width  # the latter for the interpreter alone
    rows = jnp.minimum(row + jnp.arange(ROWS), states.shape[0] - 1)
    columns = jnp.minimum(column + jnp.arange(COLUMNS), weights.shape[0] - 1)

    def add(k: Index, total: jax.Array) -> jax.Array:
        features = pl.ds(k * step, step)
        a, b = states[rows, features], weights[columns, features]
        return total + lax.dot_general(
            a, b, (((1,), (1,)), ((), ())), precision=matmul_precision(a.dtype), preferred_element_type=jnp.float32
        )

    return lax.fori_loop(0, width // step, add, jnp.zeros((ROWS, COLUMNS), jnp.float32))


def _launch(
    kernel: Callable[..., None],
    name: str,
    states: int,
    entries: int,
    shapes: Sequence[jax.ShapeDtypeStruct],
    interpret: bool,
) -> Callable[..., Any]:
    """Makes the call of a kernel that runs once for every piece of `states` by `entries`."""
    rows = pl.cdiv(states, ROWS)
    together = min(_TOGETHER, rows)
    return pl.pallas_call(
        kernel,
        name=name,
        grid=(together, pl.cdiv(entries, COLUMNS), pl.cdiv(rows, together)),
        out_shape=shapes,
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
        interpret=interpret,
    )
