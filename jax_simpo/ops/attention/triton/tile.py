"""The building blocks of the kernels: how arrays are cut into tiles, a tile's walk over its live blocks, the mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jax_simpo.ops.attention.backends import ScoreRule
from jax_simpo.ops.attention.mask import visible_at
from jax_simpo.ops.attention.triton.sizes import Tiles
from jax_simpo.ops.numerics import matmul_precision

Ref = Any  # a reference to memory inside a kernel; jax has no public type for it
Index = Any  # a traced int32 inside a kernel


class Walk(NamedTuple):
    """The steps of one tile over its live blocks.

    With `heads` > 1 every step is repeated for each query head of the group.
    """

    blocks: Ref  # the tile's list of live blocks, [Q]
    full: Index  # steps over full blocks, which come first and need no mask
    live: Index  # all steps
    heads: int
    tiles: Tiles

    @classmethod
    def of(cls, blocks: Ref, counts: Ref, tiles: Tiles, heads: int = 1) -> Walk:
        """Reads the numbers of steps from the counts of full and of live blocks, [2]."""
        per_block = heads * (tiles.block // tiles.step)
        return cls(blocks, counts[0] * per_block, counts[1] * per_block, heads, tiles)

    def each(self, body: Callable[..., Any], state: Any) -> Any:
        """Runs `state = body(start, head, state, mixed)` over all steps; `mixed` is static, False for full blocks.

        `start` is the index in the row at which the step starts, `head` the query head of the group that it is for.
        """

        def steps(first: Index, last: Index, state: Any, mixed: bool) -> Any:
            return lax.fori_loop(first, last, lambda t, s: body(*self._place(t), s, mixed), state)

        return steps(self.full, self.live, steps(0, self.full, state, False), True)

    def _place(self, t: Index) -> tuple[Index, Index]:
        block, step = self.tiles.block, self.tiles.step
        t, head = _divide(t, self.heads)
        index, part = _divide(t, block // step)
        return self.blocks[index] * block + part * step, head


def _divide(t: Index, by: int) -> tuple[Index, Index]:
    return (t, 0) if by == 1 else (lax.div(t, by), lax.rem(t, by))


class Side(NamedTuple):
    """The queries or the keys of the scores: for each, what the mask asks of it."""

    place: jax.Array  # index in the row
    position: jax.Array | None  # where there is a window
    key_end: jax.Array | None = None  # of keys

    def along(self, axis: int) -> list[jax.Array | None]:
        """Returns the vectors as matrices that lie along an axis of the scores."""
        return [None if vector is None else jnp.expand_dims(vector, 1 - axis) for vector in self]


def masked(scores: jax.Array, queries: Side, keys: Side, rule: ScoreRule, *, query_axis: int) -> jax.Array:
    """Sets scores to -inf where the query does not see the key."""
    query, query_position, _ = queries.along(query_axis)
    key, key_position, key_end = keys.along(1 - query_axis)
    assert query is not None and key is not None and key_end is not None
    visible = visible_at(query, key, key_end, query_position, key_position, rule.window)
    return jnp.where(visible, scores, -jnp.inf)


class QueryTiles:
    """The tiles of a kernel that has one for each block of queries, and how its arrays are cut for them.

    A row of a tile is one query of one head. The heads of a query lie next to each other, as in memory.

    Attributes:
        rows: rows of a tile.
        grid: tiles of a row, tiles of a query's heads, rows of the batch.
        matrix: cuts `[B, L, H, Dh]` into `[block, heads, Dh]`, the tile's own.
        vector: cuts `[B, H, L]` into `[heads, block]`, the tile's own.
        keys: cuts `[B, L, K, Dh]` into `[L, Dh]`, of the row and the key/value head that the tile reads.
        row: cuts `[B, L]` into `[L]`.
        blocks: cuts `[B, Q, Q]` into `[Q]`, the tile's own list.
        counts: cuts `[B, Q, 2]` into `[2]`.
    """

    def __init__(self, shape: tuple[int, ...], kv_heads: int, tiles: Tiles) -> None:
        rows, length, heads, width = shape
        block, group = tiles.block, heads // kv_heads
        self._tiles = tiles
        self.rows = block * tiles.heads
        self.grid = (length // block, heads // tiles.heads, rows)
        self.matrix = pl.BlockSpec((None, block, tiles.heads, width), lambda tile, head, row: (row, tile, head, 0))
        self.vector = pl.BlockSpec((None, tiles.heads, block), lambda tile, head, row: (row, head, tile))
        self.keys = pl.BlockSpec(
            (None, length, None, width), lambda tile, head, row: (row, 0, lax.div(head * tiles.heads, group), 0)
        )
        self.row = pl.BlockSpec((None, length), lambda tile, head, row: (row, 0))
        self.blocks = pl.BlockSpec((None, None, length // block), lambda tile, head, row: (row, tile, 0))
        self.counts = pl.BlockSpec((None, None, 2), lambda tile, head, row: (row, tile, 0))

    def stack(self, matrix: jax.Array) -> jax.Array:
        """Lays the heads of each query under each other, `[rows, Dh]`."""
        return matrix.reshape(self.rows, matrix.shape[-1])

    def unstack(self, matrix: jax.Array) -> jax.Array:
        """Undoes `stack`."""
        return matrix.reshape(self._tiles.block, self._tiles.heads, matrix.shape[-1])

    def stack_vector(self, vector: jax.Array) -> jax.Array:
        """Does what `stack` does with numbers of queries, `[heads, block]`."""
        return vector.T.reshape(self.rows)

    def unstack_vector(self, vector: jax.Array) -> jax.Array:
        """Undoes `stack_vector`."""
        return vector.reshape(self._tiles.block, self._tiles.heads).T

    def queries(self, positions: Ref, rule: ScoreRule) -> Side:
        """Returns the queries of the tile's rows."""
        block, heads = self._tiles.block, self._tiles.heads
        start = pl.program_id(0) * block

        def each_head(vector: jax.Array) -> jax.Array:
            return lax.broadcast_in_dim(vector, (block, heads), [0]).reshape(self.rows)

        windowed = rule.window is not None
        place = start + lax.iota(jnp.int32, block)
        return Side(each_head(place), each_head(positions[pl.ds(start, block)]) if windowed else None)


def side_at(start: Index, length: int, positions: Ref, rule: ScoreRule, key_end: Ref | None = None) -> Side:
    """Returns `length` queries or keys of the row from `start` on."""
    span = pl.ds(start, length)
    return Side(
        start + lax.iota(jnp.int32, length),
        positions[span] if rule.window is not None else None,
        key_end[span] if key_end is not None else None,
    )


def product(a: jax.Array, b: jax.Array, *, transpose_b: bool = False) -> jax.Array:
    """Returns `a @ b` or `a @ b.T`, summed in float32."""
    contracted = ((1,), (1 if transpose_b else 0,))
    return lax.dot_general(
        a, b, (contracted, ((), ())), precision=matmul_precision(a.dtype), preferred_element_type=jnp.float32
    )


def launch(
    kernel: Callable[..., None],
    *,
    name: str,
    grid: tuple[int, ...],
    inputs: Sequence[pl.BlockSpec],
    outputs: Sequence[pl.BlockSpec],
    shapes: Sequence[jax.ShapeDtypeStruct],
    tiles: Tiles,
    interpret: bool,
) -> Callable[..., Any]:
    """Makes the call of a kernel that runs once for every place of the grid."""
    return pl.pallas_call(
        kernel,
        name=name,
        grid=grid,
        in_specs=inputs,
        out_specs=outputs,
        out_shape=shapes,
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
    )
