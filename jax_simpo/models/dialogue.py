"""Answers the turns of one conversation, token by token, and keeps its keys and values from turn to turn.

What a turn shares with the conversation so far is not computed again. New text is computed a block at a time, and an
answer one token at a time, so that each token can be shown when it is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from jax_simpo.models.generate import Generation, attend_to, empty_store, next_logits, store
from jax_simpo.models.policy import Forward
from jax_simpo.models.sampling import Sampling, answer_keys, keys_at
from jax_simpo.models.transformer import KeysAndValues, Model, Params
from jax_simpo.ops.attention.cached import NOWHERE

_BLOCK = 64  # tokens of new text that are computed at once


class Dialogue:
    """One conversation with a model. Use it under `jax.set_mesh(mesh)`, in a program of one process.

    Attributes:
        computed: tokens of the conversation that the last answer had to compute before its first token.
    """

    def __init__(self, forward: Forward, params: Params, mesh: Mesh, *, capacity: int = 1024) -> None:
        """Starts an empty conversation.

        Args:
            forward: the model.
            params: its parameters on the mesh.
            mesh: the mesh of `jax.set_mesh`.
            capacity: tokens that there is room for at first. The room doubles when it is needed.
        """
        self._model, self._mesh = forward.model, mesh
        self._params = jax.jit(self._model.compute_copy)(params)
        # Every device that takes rows of its own computes the conversation.
        self._rows = mesh.shape["data"] * mesh.shape["fsdp"]
        self._ids: list[int] = []  # the tokens whose keys and values are stored
        self._stored = jax.jit(partial(empty_store, self._model, self._rows, capacity))()
        self.computed = 0

    def answer(self, ids: Sequence[int], asked: Generation, turn: int = 0) -> Iterator[int]:
        """Yields the tokens of an answer to the conversation, without the one that ends it.

        Args:
            ids: the tokens of the whole conversation, at least one.
            asked: what is asked for; a dialogue has one answer, whatever `asked.samples` says.
            turn: the number of the turn. It stands for the prompt's number where tokens are drawn.

        Raises:
            ValueError: the conversation is empty.
        """
        if not ids:
            raise ValueError("the conversation is empty: there is nothing to predict from")
        shared = next((n for n, (a, b) in enumerate(zip(self._ids, ids, strict=False)) if a != b), None)
        shared = min(len(self._ids), len(ids)) if shared is None else shared
        self._ids = self._ids[: min(shared, len(ids) - 1)]  # the last token's hidden state is needed
        new = list(ids[len(self._ids) :])
        self.computed = len(new)
        key = answer_keys(jnp.uint32(asked.seed), jnp.array([turn]), 1)
        for start in range(0, len(new), _BLOCK):
            token = self._extend(new[start : start + _BLOCK], _BLOCK, asked.sampling, key, 0)
        for place in range(1, asked.max_new_tokens + 1):
            if token in asked.end_ids:
                return
            yield token
            if place < asked.max_new_tokens:
                token = self._extend([token], 1, asked.sampling, key, place)

    def _extend(self, new: list[int], block: int, sampling: Sampling, key: Array, place: int) -> int:
        """Computes tokens and stores their keys and values; returns the token that is chosen to follow them."""
        count = len(self._ids)
        room = self._stored.k.shape[3]
        if count + block > room:
            self._stored = _grow(self._stored, 2 * room)
        tokens = np.zeros((self._rows, block), np.int32)
        tokens[:, : len(new)] = new
        extend = _jit_extend(self._model, self._mesh, sampling)
        chosen, self._stored = extend(self._params, self._stored, tokens, count, len(new), key, place)
        self._ids += new
        return int(chosen)


@lru_cache(maxsize=8)
def _jit_extend(model: Model, mesh: Mesh, sampling: Sampling) -> Any:
    """Makes the jitted function behind `Dialogue._extend`."""

    def extend(
        params: Params,
        stored: KeysAndValues,
        tokens: Int[Array, "B L"],
        count: Int[Array, ""],
        new: Int[Array, ""],
        key: Array,
        place: Int[Array, ""],
    ) -> tuple[Int[Array, ""], KeysAndValues]:
        positions = jnp.broadcast_to(count + jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        places = jnp.arange(stored.k.shape[3])
        stored_positions = jnp.broadcast_to(jnp.where(places < count, places, NOWHERE), (len(tokens), len(places)))
        # Tokens that only fill the block come last, so the others do not see them, and later ones are stored over them.
        hidden, own = model.run(params, tokens, positions, attend_to(positions, stored_positions), [stored])
        last = jax.lax.dynamic_slice_in_dim(hidden, new - 1, 1, axis=1)[:, 0]
        logits = next_logits(model, params, last)
        chosen = sampling.choose(logits, jnp.repeat(keys_at(key, place), len(tokens)))
        return chosen[0], store(stored, own, count)

    return jax.jit(extend, donate_argnums=1, out_shardings=(NamedSharding(mesh, P()), None))


@partial(jax.jit, static_argnums=1)
def _grow(stored: KeysAndValues, room: int) -> KeysAndValues:
    """Returns a store with more places."""
    return KeysAndValues(*(jnp.pad(x, [(0, 0)] * 3 + [(0, room - x.shape[3]), (0, 0)]) for x in stored))
