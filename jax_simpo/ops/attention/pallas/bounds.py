"""Lists the live blocks of a batch for the kernels of `pallas`."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Int

from jax_simpo.ops.attention.blocks import BlockLists, listed, live_and_full, whole_blocks

BLOCK = 128  # rows of a tile: two warpgroups work on 64 each


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
    half_lists: bool = True,
) -> BlockBounds:
    """Returns the lists of a batch. A row whose length is no multiple of the block ends with keys that none sees.

    `switches.py` says what `heavy_first` and `half_lists` are.
    """
    live, full = live_and_full(whole_blocks(key_end, block), whole_blocks(positions, block), window, block // 2)
    rows, halves, _ = live.shape
    if not half_lists:
        by_block = rows, halves // 2, 2, halves // 2, 2
        live = live.reshape(by_block).any((2, 4)).repeat(2, axis=1).repeat(2, axis=2)
        full = full.reshape(by_block).all((2, 4)).repeat(2, axis=1).repeat(2, axis=2)

    def lists(query_halves: int, key_halves: int, by_keys: bool = False) -> BlockLists:
        shape = rows, halves // query_halves, query_halves, halves // key_halves, key_halves
        some, every = live.reshape(shape).any((2, 4)), full.reshape(shape).all((2, 4))
        if by_keys:
            some, every = some.swapaxes(1, 2), every.swapaxes(1, 2)
        return listed(some, every, heavy_first=heavy_first)

    return BlockBounds(lists(2, 2), lists(2, 1), lists(1, 2, by_keys=True))
