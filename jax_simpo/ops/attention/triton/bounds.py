"""Lists the live blocks of a batch for the kernels of `triton`."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Int

from jax_simpo.ops.attention.blocks import BlockLists, listed, live_and_full, whole_blocks
from jax_simpo.ops.attention.triton.sizes import BLOCK


class BlockBounds(NamedTuple):
    """The lists of a batch, for tiles of queries and for tiles of keys; tiles come as they lie in their row."""

    queries: BlockLists
    keys: BlockLists


def find_block_bounds(
    key_end: Int[Array, "B L"], positions: Int[Array, "B L"], window: int | None, block: int = BLOCK
) -> BlockBounds:
    """Returns the lists of a batch. A row whose length is no multiple of the block ends with keys that none sees."""
    live, full = live_and_full(whole_blocks(key_end, block), whole_blocks(positions, block), window, block)
    by_keys = live.swapaxes(1, 2), full.swapaxes(1, 2)
    return BlockBounds(listed(live, full, heavy_first=False), listed(*by_keys, heavy_first=False))
