"""Lists, once per batch, the blocks of the attention matrix that the kernels of `pallas` and `triton` visit.

A block of queries by keys is dead (no query of it sees a key of it: it is never loaded), full (every query sees every
key: the mask is not evaluated) or mixed. A kernel works on tiles of queries, or of keys, and each tile gets the list of
its live blocks on the other side, the full ones first.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from jax_simpo.ops.attention.mask import visible_at


class BlockLists(NamedTuple):
    """The live blocks of the tiles of one side, Q tiles a row; a tile has N blocks on the other side.

    `tiles[b, i]` is the place of a tile in its row, the number of its full blocks and of its live ones.
    `blocks[b, i]` begins with its full blocks, then come the mixed ones; the rest is dead. With heavy tiles first, `i`
    counts the tiles of a row by the number of their live blocks; without, it is the place.
    """

    tiles: Int[Array, "B Q 3"]
    blocks: Int[Array, "B Q N"]

    @property
    def size(self) -> int:
        """Rows of a tile in blocks of the other side."""
        return self.blocks.shape[2] // self.blocks.shape[1]


def whole_blocks(x: Shaped[Array, "B L *rest"], block: int) -> Shaped[Array, "B M *rest"]:
    """Fills the rows up to a whole number of blocks with zeros; as `key_end` these are keys that no query sees."""
    padding = -x.shape[1] % block
    return jnp.pad(x, [(0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)]) if padding else x


def live_and_full(
    key_end: Int[Array, "B L"], positions: Int[Array, "B L"], window: int | None, block: int
) -> tuple[Bool[Array, "B Q Q"], Bool[Array, "B Q Q"]]:
    """Says which blocks of queries (first) by keys are live, and which are full. It is exact, by the mask's own rule.

    One block of queries is looked at after the other, so memory is linear in L, a multiple of `block`.
    """
    rows, length = key_end.shape
    key = jnp.arange(length)

    def one_block(i: Int[Array, ""]) -> tuple[Bool[Array, "B Q"], Bool[Array, "B Q"]]:
        query = i * block + jnp.arange(block)
        query_positions = jax.lax.dynamic_slice_in_dim(positions, i * block, block, axis=1)
        visible = visible_at(
            query[:, None],
            key,
            key_end[:, None, :],
            query_positions[:, :, None],
            positions[:, None, :],
            window,
        )
        by_block = visible.reshape(rows, block, length // block, block)
        return by_block.any((1, 3)), by_block.all((1, 3))

    live, full = jax.lax.map(one_block, jnp.arange(length // block))
    return live.swapaxes(0, 1), full.swapaxes(0, 1)


def listed(live: Bool[Array, "B Q N"], full: Bool[Array, "B Q N"], *, heavy_first: bool) -> BlockLists:
    """Makes the lists of the tiles on the first side."""
    blocks = jnp.argsort(jnp.where(full, 0, jnp.where(live, 1, 2)), axis=-1, stable=True)
    place = jnp.broadcast_to(jnp.arange(live.shape[1]), live.shape[:2])
    tiles = jnp.stack([place, full.sum(-1), live.sum(-1)], axis=-1)
    if heavy_first:
        order = jnp.argsort(-tiles[..., 2], axis=-1, stable=True)[..., None]
        tiles, blocks = (jnp.take_along_axis(x, order, axis=1) for x in (tiles, blocks))
    return BlockLists(tiles.astype(jnp.int32), blocks.astype(jnp.int32))
