"""Lists the hidden states that predict targets, each of them once, and cuts the list into tiles."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

SHARED = 2  # different targets of one listed state: where two responses part, the state before predicts two tokens
_PARTS = 4  # a tile is cut into so many parts for the last states, which fill no whole tile


class Tile(NamedTuple):
    """The listed states of a tile: `size` of them from `start` on."""

    start: Int[Array, ""]
    size: int

    def read(self, x: Shaped[Array, "N *S"]) -> Shaped[Array, "C *S"]:
        """Returns the entries of the tile's states."""
        return jax.lax.dynamic_slice_in_dim(x, self.start, self.size)

    def write(self, x: Shaped[Array, "N *S"], new: Shaped[Array, "C *S"]) -> Shaped[Array, "N *S"]:
        """Copies `x` and replaces the entries of the tile's states."""
        return jax.lax.dynamic_update_slice_in_dim(x, new, self.start, 0)


class StateList:
    """Lists the hidden states that predict the targets of all rows, each of them once, and leads back to the targets.

    Targets of one state and one token are the same. A state that predicts more than `SHARED` different tokens is
    listed several times. The list has room for one state per target; unused entries and the states of padding are at
    its end.

    Attributes:
        size: length of the list.
        live: number of listed states that predict a real target, int32.
        real: True for targets that are not padding, [B, T].
    """

    def __init__(
        self, chunk: int, length: int, index: Int[Array, "B T"], token: Int[Array, "B T"], counts: Int[Array, " B"]
    ) -> None:
        rows, targets = index.shape
        self._part = max(1, chunk // _PARTS)  # states of a part of a tile
        self._parts = chunk // self._part  # parts of a tile
        self.size = round_up(rows * targets, self._part)
        self.real = jnp.arange(targets) < counts[:, None]
        nowhere = rows * length
        source = jnp.where(self.real, jnp.arange(rows)[:, None] * length + index, nowhere).reshape(-1)
        # Targets of one state next to each other, those of one token within it too, padding last.
        source, token, order = jax.lax.sort((source, token.reshape(-1), jnp.arange(source.size)), num_keys=2)

        def starts(x: Int[Array, " N"]) -> Bool[Array, " N"]:
            return jnp.concatenate([jnp.ones(1, bool), x[1:] != x[:-1]])

        is_first = starts(source)
        is_new = is_first | starts(token)
        distinct = jnp.cumsum(is_new) - 1
        nth = (distinct - jax.lax.cummax(jnp.where(is_first, distinct, 0))) % SHARED
        listed = is_new & (nth == 0)
        number = jnp.cumsum(listed, dtype=jnp.int32) - 1
        self.live = (listed & (source < nowhere)).sum(dtype=jnp.int32)
        # For each target, the number of its state in the list and its own among the tokens of that state.
        self._entry = jnp.zeros((2, rows * targets), jnp.int32).at[:, order].set(jnp.stack([number, nth]))
        # For each listed state, its index among the hidden states of all rows.
        self._source = jnp.zeros(self.size, jnp.int32).at[number].set(jnp.where(source < nowhere, source, 0))

    def take(self, hidden: Float[Array, "B L D"]) -> Float[Array, "N D"]:
        """Returns the listed states."""
        return hidden.reshape(-1, hidden.shape[-1])[self._source]

    def add_back(self, dstates: Float[Array, "N D"], like: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """Adds the gradients of listed states to those of the hidden states, which are shaped as `like`."""
        flat = jnp.zeros((math.prod(like.shape[:-1]), like.shape[-1]))
        return flat.at[self._source].add(dstates).reshape(like.shape).astype(like.dtype)

    def per_state(self, x: Shaped[Array, "B T"], empty: int | float) -> Shaped[Array, "N K"]:
        """Arranges entries of targets by state, K = `SHARED` each; `empty` where a state has fewer targets."""
        return jnp.full((self.size, SHARED), empty, x.dtype).at[*self._entry].set(x.reshape(-1))

    def added_per_state(self, x: Float[Array, "B T"]) -> Float[Array, "N K"]:
        """Arranges entries of targets as `per_state` does, and adds up those of the same state and token."""
        return jnp.zeros((self.size, SHARED), x.dtype).at[*self._entry].add(x.reshape(-1))

    def to_targets(self, x: Float[Array, "N *S"]) -> Float[Array, "B T *S"]:
        """Returns for each target the entry of its state."""
        return x[self._entry[0]].reshape(*self.real.shape, *x.shape[1:])

    def over_tiles(self, one_tile: Callable[[Tile, Any], Any], carry: Any) -> Any:
        """Runs `carry = one_tile(tile, carry)` over whole tiles of live states, and over parts of one for the rest."""
        live_parts = (self.live + self._part - 1) // self._part
        tiles = live_parts // self._parts
        large, small = self._part * self._parts, self._part
        if large <= self.size:
            carry = jax.lax.fori_loop(0, tiles, lambda i, x: one_tile(Tile(i * large, large), x), carry)
        first = tiles * self._parts
        return jax.lax.fori_loop(first, live_parts, lambda i, x: one_tile(Tile(i * small, small), x), carry)


def round_up(n: int, multiple: int) -> int:
    """Returns the next multiple."""
    return -(-n // multiple) * multiple
