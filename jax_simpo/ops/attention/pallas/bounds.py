"""Lists, once per batch, the blocks of the attention matrix that the `pallas` kernels visit.

A block of queries by keys is dead (no query of it sees a key of it: it is never loaded), full (every query sees every
key: the mask is not evaluated) or mixed. A kernel works on tiles of `BLOCK` queries, or keys, and each tile gets the
list of its live blocks on the other side, the full ones first.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jax_simpo.ops.attention.mask import visible_at

BLOCK = 128  # rows of a tile: two warpgroups work on 64 each


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


class BlockBounds(NamedTuple):
    """The lists of a batch: a list's name says whose tiles it is for, and how many rows a block has on the other side.

    Kernels whose steps are half a tile long read the finer lists.
    """

    queries: BlockLists  # tiles of queries, blocks of `BLOCK` keys
    queries_halves: BlockLists  # tiles of queries, blocks of half as many keys
    keys_halves: BlockLists  # tiles of keys, blocks of half as many queries


def find_block_bounds(
    key_end: Int[Array, "B L"],
    positions: Int[Array, "B L"],
    window: int | None,
    block: int = BLOCK,
    *,
    heavy_first: bool = True,
) -> BlockBounds:
    """Returns the lists of a batch. They are exact, by the mask's own rule.

    One query block is looked at after the other, so memory is linear in L. A row whose length is not a multiple of the
    block is taken to end with keys that no query sees.
    """
    padding = ((0, 0), (0, -key_end.shape[1] % block))
    key_end, positions = jnp.pad(key_end, padding), jnp.pad(positions, padding)
    rows, length = key_end.shape
    tiles, half = length // block, block // 2
    key = jnp.arange(length)

    def one_tile(i: Int[Array, ""]) -> tuple[Bool[Array, "B 2 N"], Bool[Array, "B 2 N"]]:
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
        by_half = visible.reshape(rows, 2, half, 2 * tiles, half)
        return by_half.any((2, 4)), by_half.all((2, 4))

    live, full = jax.lax.map(one_tile, jnp.arange(tiles))
    live, full = (x.swapaxes(0, 1).reshape(rows, 2 * tiles, 2 * tiles) for x in (live, full))

    def lists(query_halves: int, key_halves: int, by_keys: bool = False) -> BlockLists:
        shape = rows, 2 * tiles // query_halves, query_halves, 2 * tiles // key_halves, key_halves
        some, every = live.reshape(shape).any((2, 4)), full.reshape(shape).all((2, 4))
        if by_keys:
            some, every = some.swapaxes(1, 2), every.swapaxes(1, 2)
        return _listed(some, every, heavy_first)

    return BlockBounds(lists(2, 2), lists(2, 1), lists(1, 2, by_keys=True))


def _listed(live: Bool[Array, "B Q N"], full: Bool[Array, "B Q N"], heavy_first: bool) -> BlockLists:
    blocks = jnp.argsort(jnp.where(full, 0, jnp.where(live, 1, 2)), axis=-1, stable=True)
    place = jnp.broadcast_to(jnp.arange(live.shape[1]), live.shape[:2])
    tiles = jnp.stack([place, full.sum(-1), live.sum(-1)], axis=-1)
    if heavy_first:
        order = jnp.argsort(-tiles[..., 2], axis=-1, stable=True)[..., None]
        tiles, blocks = (jnp.take_along_axis(x, order, axis=1) for x in (tiles, blocks))
    return BlockLists(tiles.astype(jnp.int32), blocks.astype(jnp.int32))
