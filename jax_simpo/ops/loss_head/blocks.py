"""Cuts the vocabulary into blocks."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jax_simpo.ops.bits import on_cpu, slice_in_loop
from jax_simpo.ops.loss_head.states import round_up

LANES, _CPU_LANES = 128, 16  # a block of the vocabulary is a multiple, unless that exceeds the size asked for


class Block(NamedTuple):
    """A block of this device's part of the vocabulary: it begins at `start`, and its own entries begin at `first`."""

    number: Int[Array, ""]
    start: Int[Array, ""]
    first: Int[Array, ""]


class Blocks:
    """The vocabulary in blocks of one size, few and even.

    If the size does not divide the vocabulary, the last block also holds entries of the one before, which are not
    counted. The last block comes first in the loop, so that its neighbour's gradient overwrites the zeros that it
    leaves there.
    """

    def __init__(self, block: int, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        lanes = _CPU_LANES if on_cpu() else LANES
        fewest = -(-vocabulary // block)
        even = (n for n in range(fewest, fewest * 3 // 2 + 1) if vocabulary % (n * lanes) == 0)
        self.count = next(even, fewest)
        self.size = min(round_up(-(-vocabulary // self.count), lanes), block, vocabulary)

    def all(self) -> Block:
        """Returns all blocks, stacked, in the order of the loop."""
        number = jnp.roll(jnp.arange(self.count), 1)
        return Block(number, jnp.minimum(number * self.size, self.vocabulary - self.size), number * self.size)

    def slice(self, head: Float[Array, "V D"], block: Block) -> Float[Array, "S D"]:
        """Returns the block's part of the head."""
        return slice_in_loop(head, block.start, self.size)

    def uncounted(self, block: Block) -> Int[Array, ""]:
        """Returns how many entries of the one before the block begins with."""
        return block.first - block.start

    def counted(self, block: Block) -> Bool[Array, "1 S"] | bool:
        """Returns True for the block's own entries."""
        if self.vocabulary % self.size == 0:
            return True
        return (block.start + jnp.arange(self.size) >= block.first)[None, :]

    def is_target(self, block: Block, token: Int[Array, " C"]) -> Bool[Array, "C S"]:
        """Returns True where an entry of the block is the target token."""
        return (token - block.start)[:, None] == jnp.arange(self.size)[None, :]
