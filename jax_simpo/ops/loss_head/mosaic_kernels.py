"""The kernel of `mosaic`, which adds up the exponentials of all logits.

A step of the grid adds to the products of a piece, `ROWS` states by `COLUMNS` entries of the vocabulary, which are
summed over the features in vector memory. With the last features a piece becomes logits, a few rows at a time. The
kernel goes through the vocabulary with an online softmax of 128 lanes for each state: every lane has the maximum and
the sum of its own columns, so no lane waits for another. They are put together afterwards.

What lies beyond the last state or entry is read as anything and masked, or written nowhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from jax_simpo.ops.loss_head.blocks import LANES
from jax_simpo.ops.loss_head.tile import capped
from jax_simpo.ops.numerics import LOWEST, matmul_precision

# States and entries of a piece, features in a step of the grid at most, and rows that become logits at a time. A step
# multiplies 512 times for each number that it reads: more than a v5e or v5p needs to be kept busy, nearly as often as a
# v6e. How fast they are has not been measured.
ROWS, COLUMNS, STEP, SLICE = 1024, 1024, 512, 64

Ref = Any  # a reference to memory inside a kernel; jax has no public type for it


def sums(
    states: Float[Array, "N D"],
    head: Float[Array, "V D"],
    live: Int[Array, ""],
    softcap: float | None,
    *,
    interpret: bool,
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """Returns a maximum of each state's logits and the sum of their exponentials, less that maximum.

    States from number `live` on get `LOWEST` and 0; pieces of them alone are not computed.
    """
    count, vocabulary = len(states), len(head)

    def kernel(live: Ref, states: Ref, head: Ref, top: Ref, total: Ref, products: Ref) -> None:
        piece = Piece.here()

        @pl.when((piece.column == 0) & piece.begins)
        def _() -> None:
            top[...] = jnp.full(top.shape, LOWEST, jnp.float32)
            total[...] = jnp.zeros(total.shape, jnp.float32)

        def one_slice(rows: Any) -> None:
            logits, _ = capped(products[rows, :], softcap)
            entry = piece.column + lax.broadcasted_iota(jnp.int32, logits.shape, 1)
            logits = jnp.where(entry < vocabulary, logits, LOWEST)
            by_lane = [logits[:, start : start + LANES] for start in range(0, COLUMNS, LANES)]
            old_top, new_top = top[rows, :], top[rows, :]
            for lanes in by_lane:
                new_top = jnp.maximum(new_top, lanes)
            added = total[rows, :] * jnp.exp(old_top - new_top)
            for lanes in by_lane:
                added += jnp.exp(lanes - new_top)
            top[rows, :], total[rows, :] = new_top, added

        @pl.when(piece.row < live[0])
        def _() -> None:
            piece.multiply(states, head, products, one_slice)

    step = _step_of(states.shape[1])

    def if_live(row: Any, live: Ref, *place: Any) -> tuple[Any, ...]:
        """Returns a place for the pieces that are computed; the others stay at one, so nothing is fetched for them."""
        return tuple(jnp.where(row * ROWS < live[0], number, 0) for number in place)

    lanes = pl.BlockSpec((ROWS, LANES), lambda row, column, step, live: (row, 0))
    shape = jax.ShapeDtypeStruct((count, LANES), jnp.float32)
    tops, totals = pl.pallas_call(
        kernel,
        name="loss_head_sums",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(count, ROWS), pl.cdiv(vocabulary, COLUMNS), states.shape[1] // step),
            in_specs=[
                pl.BlockSpec((ROWS, step), lambda row, column, step, live: if_live(row, live, row, step)),
                pl.BlockSpec((COLUMNS, step), lambda row, column, step, live: if_live(row, live, column, step)),
            ],
            out_specs=[lanes, lanes],
            scratch_shapes=[pltpu.VMEM((ROWS, COLUMNS), jnp.float32)],
        ),
        out_shape=[shape, shape],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        interpret=interpret,
    )(live[None], states, head)
    is_live = jnp.arange(count) < live
    top = jnp.where(is_live, tops.max(1), LOWEST)
    # A lane whose columns all lie beyond the vocabulary has a maximum of `LOWEST`, and so a weight of 0.
    return top, jnp.where(is_live, (totals * jnp.exp(tops - top[:, None])).sum(1), 0.0)


class Piece(NamedTuple):
    """A piece, at one of its steps. It is read outside branches, where the interpreter knows its place in the grid."""

    row: jax.Array  # its first state
    column: jax.Array  # its first entry
    begins: jax.Array  # True at its first step
    ends: jax.Array  # True at its last one

    @classmethod
    def here(cls) -> Piece:
        """Returns the piece that the kernel is at."""
        row, column, step = (pl.program_id(axis) for axis in range(3))
        return cls(row * ROWS, column * COLUMNS, step == 0, step == pl.num_programs(2) - 1)

    def multiply(self, states: Ref, weights: Ref, products: Ref, one_slice: Callable[[Any], None]) -> None:
        """Adds a step's products to the piece's; with the last ones, hands over `one_slice` of its rows at a time."""

        @pl.when(self.begins)
        def _() -> None:
            products[...] = jnp.zeros(products.shape, jnp.float32)

        products[...] += lax.dot_general(
            states[...],
            weights[...],
            (((1,), (1,)), ((), ())),
            precision=matmul_precision(states.dtype),
            preferred_element_type=jnp.float32,
        )

        @pl.when(self.ends)
        def _() -> None:
            def body(n: jax.Array, _: None) -> None:
                one_slice(pl.ds(pl.multiple_of(n * SLICE, SLICE), SLICE))

            lax.fori_loop(0, ROWS // SLICE, body, None)


def _step_of(width: int) -> int:
    """Returns the features of a step: the most that divide the width and fill whole lanes."""
    return next((step for step in range(STEP, 0, -LANES) if width % step == 0), width)
