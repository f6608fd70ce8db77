"""Which blocks of the attention matrix are worth visiting, for the `pallas` kernels: lists made once per batch.

A block of queries by keys is dead (no query of it sees a key of it: never loaded), full (every query sees every key:
the mask is not evaluated) or mixed. Each query block gets the list of its live key blocks, each key block that of its
live query blocks, the full ones first.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

BLOCK = 128  # queries and keys a block: what two warpgroups of 64 rows work on


class BlockBounds(NamedTuple):
    """Lists of live blocks; Q blocks a row.

    `key_blocks[b, i]` starts with the full key blocks of query block `i`, then come the mixed ones; what follows is
    dead. `key_counts[b, i]` is how many are full and how many are live. `query_blocks` and `query_counts` are the same
    seen from the key blocks.
    """

    key_blocks: Int[Array, "B Q Q"]
    key_counts: Int[Array, "B Q 2"]
    query_blocks: Int[Array, "B Q Q"]
    query_counts: Int[Array, "B Q 2"]


def find(
    key_end: Int[Array, "B L"], positions: Int[Array, "B L"], window: int | None, block: int = BLOCK
) -> BlockBounds:
    """The lists of a batch, exact: by the rule itself, one query block after the other, so memory is linear in L.

    Key `k` is visible to query `q` iff `k <= q < key_end[k]` and, in a window, `positions[q] - positions[k] < window`.
    A row whose length is not a multiple of the block is thought to end with keys nobody sees.
    """
    padding = ((0, 0), (0, -key_end.shape[1] % block))
    key_end, positions = jnp.pad(key_end, padding), jnp.pad(positions, padding)
    rows, length = key_end.shape
    key = jnp.arange(length)

    def one_query_block(i: Int[Array, ""]) -> tuple[Bool[Array, "B Q"], Bool[Array, "B Q"]]:
        query = i * block + jnp.arange(block)
        see = (key <= query[:, None]) & (query[:, None] < key_end[:, None, :])
        if window is not None:
            at = jax.lax.dynamic_slice_in_dim(positions, i * block, block, axis=1)
            see &= at[:, :, None] - positions[:, None, :] < window
        by_block = see.reshape(rows, block, length // block, block)
        return by_block.any((1, 3)), by_block.all((1, 3))

    live, full = jax.lax.map(one_query_block, jnp.arange(length // block))
    live, full = live.swapaxes(0, 1), full.swapaxes(0, 1)
    return BlockBounds(*_listed(live, full), *_listed(live.swapaxes(1, 2), full.swapaxes(1, 2)))


def _listed(live: Bool[Array, "B Q Q"], full: Bool[Array, "B Q Q"]) -> tuple[Int[Array, "B Q Q"], Int[Array, "B Q 2"]]:
    order = jnp.argsort(jnp.where(full, 0, jnp.where(live, 1, 2)), axis=-1, stable=True)
    counts = jnp.stack([full.sum(-1), live.sum(-1)], axis=-1)
    return order.astype(jnp.int32), counts.astype(jnp.int32)
