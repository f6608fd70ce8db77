"""Lists, once per batch, the blocks of the attention matrix that the kernels of `pallas` and `triton` visit.

A block of queries by keys is dead (no query of it sees a key of it: it is never loaded), full (every query sees every
key: the mask is not evaluated) or mixed. Each query block gets the list of its live key blocks, each key block the list
of its live query blocks, the full ones first.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jax_simpo.ops.attention.mask import visible_at

BLOCK = 128  # queries and keys of a block: two warpgroups work on 64 rows each


class BlockBounds(NamedTuple):
    """Lists of live blocks; Q blocks a row.

    `key_blocks[b, i]` begins with the full key blocks of query block `i`, then come the mixed ones; the rest is dead.
    `key_counts[b, i]` is the number of full ones and the number of live ones. `query_blocks` and `query_counts` are the
    same seen from the key blocks.
    """

    key_blocks: Int[Array, "B Q Q"]
    key_counts: Int[Array, "B Q 2"]
    query_blocks: Int[Array, "B Q Q"]
    query_counts: Int[Array, "B Q 2"]


def find_block_bounds(
    key_end: Int[Array, "B L"], positions: Int[Array, "B L"], window: int | None, block: int = BLOCK
) -> BlockBounds:
    """Returns the lists of a batch. They are exact, by the mask's own rule.

    One query block is looked at after the other, so memory is linear in L. A row whose length is not a multiple of the
    block is taken to end with keys that no query sees.
    """
    padding = ((0, 0), (0, -key_end.shape[1] % block))
    key_end, positions = jnp.pad(key_end, padding), jnp.pad(positions, padding)
    rows, length = key_end.shape
    key = jnp.arange(length)

    def one_query_block(i: Int[Array, ""]) -> tuple[Bool[Array, "B Q"], Bool[Array, "B Q"]]:
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

    live, full = jax.lax.map(one_query_block, jnp.arange(length // block))
    live, full = live.swapaxes(0, 1), full.swapaxes(0, 1)
    return BlockBounds(*_listed(live, full), *_listed(live.swapaxes(1, 2), full.swapaxes(1, 2)))


def _listed(live: Bool[Array, "B Q Q"], full: Bool[Array, "B Q Q"]) -> tuple[Int[Array, "B Q Q"], Int[Array, "B Q 2"]]:
    order = jnp.argsort(jnp.where(full, 0, jnp.where(live, 1, 2)), axis=-1, stable=True)
    counts = jnp.stack([full.sum(-1), live.sum(-1)], axis=-1)
    return order.astype(jnp.int32), counts.astype(jnp.int32)
