"""Generates answers: one pass over the prompts, then one token per answer and step, over stored keys and values.

It computes with the model's own layers wherever training runs: the parameters stay split over the mesh as they are,
answers are split over `data` and `fsdp`, and the stored keys of a head lie where its parameters do, along `tensor`.

The keys and values of a prompt are stored once, and all samples of the prompt read them. Those of the answers are
stored apart. The loop over tokens is one compiled program, which ends early when every answer has ended. Prompts are
computed in batches of similar length, filled up to few different shapes, so that few programs are compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jax_simpo.errors import ConfigError
from jax_simpo.models.policy import Forward
from jax_simpo.models.sampling import Sampling, answer_keys, keys_at
from jax_simpo.models.transformer import Attend, KeysAndValues, Model, Params, attend_under
from jax_simpo.ops.attention import prepare_causal_mask
from jax_simpo.ops.attention.backends import ScoreRule
from jax_simpo.ops.attention.cached import NOWHERE, StoredKeys, cached_attention
from jax_simpo.ops.numerics import matmul_precision
from jax_simpo.sharding import constrain, gather_parameter, named

BATCH_SIZE = 32
"""Answers that are computed at once, where the caller says nothing else."""

# Prompts are filled up to a multiple of this: attention kernels and matmuls work on blocks of 128 positions.
_LENGTH_MULTIPLE = 128

Prompts = Sequence[Sequence[int] | Int[np.ndarray, " _"]]


@dataclass(frozen=True)
class Generation:
    """Holds what is asked for, besides the prompts.

    Attributes:
        max_new_tokens: the most tokens of an answer.
        end_ids: the tokens that end an answer. None of them is part of it.
        samples: answers to each prompt.
        sampling: how tokens are drawn.
        seed: the seed of what is drawn.

    Raises:
        ConfigError: a number is out of its range.
    """

    max_new_tokens: int
    end_ids: tuple[int, ...]
    samples: int = 1
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "samples"):
            if (number := getattr(self, name)) < 1:
                raise ConfigError(f"`{name}` is {number}; expected a whole number >= 1")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"`seed` is {self.seed}; expected a whole number from 0 to {2**32 - 1}")


@dataclass(frozen=True)
class Tokens:
    """The tokens of an answer, without the one that ended it.

    Attributes:
        ids: the token ids.
        ended: the model ended the answer; False if it was cut at `max_new_tokens`.
    """

    ids: list[int]
    ended: bool


def generate(
    forward: Forward,
    params: Params,
    mesh: Mesh,
    prompts: Prompts,
    asked: Generation,
    *,
    batch_size: int = BATCH_SIZE,
    on_batch: Callable[[int], object] = lambda prompts: None,
) -> list[list[Tokens]]:
    """Returns the answers to each prompt, in the order of the prompts.

    Every process of a run must call it, under `jax.set_mesh(mesh)`.

    Args:
        forward: the model and its attention, as in training.
        params: the model's parameters on the mesh.
        mesh: the mesh of `jax.set_mesh`.
        prompts: token ids, at least one per prompt; prompts may differ in length.
        asked: what is asked for.
        batch_size: answers computed at once, at least one prompt per device that takes rows of its own.
        on_batch: is given the number of prompts that a batch has answered.

    Raises:
        ValueError: a prompt is empty.
    """
    if not prompts:
        return []
    empty = next((number for number, prompt in enumerate(prompts) if len(prompt) == 0), None)
    if empty is not None:
        raise ValueError(f"prompt {empty} is empty: there is nothing to predict from")
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = _round_up(min(max(batch_size // asked.samples, 1), len(prompts)), devices)
    answers: list[list[Tokens]] = [[] for _ in prompts]
    by_length: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        by_length.setdefault(padded_length(len(prompt)), []).append(number)
    seed = np.uint32(asked.seed)
    decode = _jit_decode(forward, mesh, replace(asked, seed=0))  # a seed is no reason to compile again
    for length, numbers in sorted(by_length.items()):
        for start in range(0, len(numbers), rows):
            batch = numbers[start : start + rows]
            written = jax.device_get(decode(params, *_put_batch(mesh, prompts, batch, rows, length), seed))
            for number, of_prompt in zip(batch, written, strict=False):
                answers[number] = [_read(ids.tolist(), asked.end_ids) for ids in of_prompt]
            on_batch(len(batch))
    return answers


def padded_length(length: int) -> int:
    """Returns the length that sequences of a length are filled up to: 128, 256, 384, 512, 768, 1024, 1536, 2048, ...

    Few lengths serve all, and from 256 on each is at most one and a half times the one before.
    """
    blocks, power = -(-length // _LENGTH_MULTIPLE), 1
    while power < blocks:
        power *= 2
    between = power * 3 // 4
    return _LENGTH_MULTIPLE * (between if power >= 4 and blocks <= between else power)


def _put_batch(mesh: Mesh, prompts: Prompts, batch: Sequence[int], rows: int, length: int) -> tuple[Array, ...]:
    """Sends tokens, lengths and numbers of some prompts to the devices. Rows that fill the batch have length 0."""
    tokens, of_rows = np.zeros((rows, length), np.int32), np.zeros((2, rows), np.int32)
    for row, number in enumerate(batch):
        tokens[row, : len(prompts[number])] = prompts[number]
        of_rows[:, row] = len(prompts[number]), number
    # Every process has all prompts and gives each of its devices the rows of that device.
    return tuple(
        jax.make_array_from_callback(array.shape, named(mesh, *axes), array.__getitem__)
        for array, axes in ((tokens, ("batch", None)), (of_rows[0], ("batch",)), (of_rows[1], ("batch",)))
    )


def _read(ids: list[int], end_ids: Sequence[int]) -> Tokens:
    end = next((place for place, token in enumerate(ids) if token in end_ids), None)
    return Tokens(ids[:end], end is not None)


class _State(NamedTuple):
    """The state of the loop over tokens.

    Attributes:
        done: tokens that every answer has, the fill of ended ones included.
        written: the tokens, each answer's from the left.
        ended: True for answers that have ended.
        stored: keys and values of the answers' tokens, but for the last one's.
    """

    done: Int[Array, ""]
    written: Int[Array, "B T"]
    ended: Bool[Array, " B"]
    stored: KeysAndValues


@lru_cache(maxsize=8)
def _jit_decode(forward: Forward, mesh: Mesh, asked: Generation) -> Callable[..., Int[Array, "B N T"]]:
    """Makes the jitted `params, tokens, lengths, numbers, seed -> tokens of the answers`.

    It is cached, so that the answers of a run before and after training share one compilation.
    """
    model, samples, most = forward.model, asked.samples, asked.max_new_tokens
    fill = asked.end_ids[0] if asked.end_ids else 0

    def is_end(tokens: Int[Array, " B"]) -> Bool[Array, " B"]:
        return jnp.isin(tokens, jnp.array(asked.end_ids, jnp.int32))

    def decode(
        params: Params, tokens: Int[Array, "P L"], lengths: Int[Array, " P"], numbers: Int[Array, " P"], seed: Array
    ) -> Int[Array, "P N T"]:
        params = model.compute_copy(params)
        logits, prompt = _read_prompts(forward, params, tokens, lengths)
        keys = answer_keys(seed, numbers, samples)
        starts = jnp.repeat(lengths, samples)
        places = jnp.arange(tokens.shape[1])
        prompt_positions = jnp.where(places < lengths[:, None], places, NOWHERE)

        def add_token(state: _State) -> _State:
            last = state.done - 1  # its place in the answer
            positions = (starts + last)[:, None]
            answer_places = jnp.arange(most)
            answer_positions = jnp.where(answer_places < last, starts[:, None] + answer_places, NOWHERE)

            attend = attend_to(positions, prompt_positions, answer_positions)
            token = jax.lax.dynamic_slice_in_dim(state.written, last, 1, axis=1)
            hidden, new = model.run(params, token, positions, attend, [prompt, state.stored])
            logits = next_logits(model, params, hidden[:, 0])
            return written_on(state, logits, store(state.stored, new, last))

        def written_on(state: _State, logits: Float[Array, "B V"], stored: KeysAndValues) -> _State:
            chosen = asked.sampling.choose(logits, keys_at(keys, state.done))
            chosen = jnp.where(state.ended, fill, chosen)
            written = jax.lax.dynamic_update_slice_in_dim(state.written, chosen[:, None], state.done, axis=1)
            return _State(state.done + 1, written, state.ended | is_end(chosen), stored)

        def goes_on(state: _State) -> Bool[Array, ""]:
            return (state.done < most) & ~state.ended.all()

        state = _State(
            jnp.int32(0),
            jnp.full((len(starts), most), fill, jnp.int32),
            starts == 0,  # rows that only fill the batch
            empty_store(model, len(starts), most),
        )
        state = written_on(state, jnp.repeat(logits, samples, axis=0), state.stored)
        state = jax.lax.while_loop(goes_on, add_token, state)
        return state.written.reshape(-1, samples, most)

    # The result is replicated, so that every process can read all answers.
    return jax.jit(decode, out_shardings=NamedSharding(mesh, P()))


def _read_prompts(
    forward: Forward, params: Params, tokens: Int[Array, "P L"], lengths: Int[Array, " P"]
) -> tuple[Float[Array, "P V"], KeysAndValues]:
    """Returns the logits of the first token of an answer to each prompt, and the keys and values of the prompts."""
    model = forward.model
    # Causality hides the fill right of a prompt from it. So all prompts share one mask: rows of one whole document.
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    mask = prepare_causal_mask(positions, model.config.windows, forward.attention)
    hidden, new = model.run(params, tokens, positions, attend_under(mask, keep=True))
    last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    return next_logits(model, params, last), _split(*(x.swapaxes(2, 3) for x in new))


# --- steps of decoding, which `dialogue` takes too


def next_logits(model: Model, params: Params, hidden: Float[Array, "B D"]) -> Float[Array, "B V"]:
    """Returns the logits of the next token, float32, after the model's soft cap."""
    head = gather_parameter(model.head(params), hidden.dtype, "vocab", "embed")
    precision = matmul_precision(hidden.dtype)
    logits = jnp.einsum("bd,vd->bv", hidden, head, precision=precision, preferred_element_type=jnp.float32)
    cap = model.config.logit_softcap
    return constrain(logits if cap is None else cap * jnp.tanh(logits / cap), "batch", "vocab")


def attend_to(positions: Int[Array, "B L"], *stored_positions: Array) -> Attend:
    """Returns the attention of new tokens over stored keys and their own. It keeps the new keys and values.

    Args:
        positions: the positions of the new tokens.
        stored_positions: the positions of the stored keys, int32 [S, C], for each of the stores that `Model.run` is
            given.
    """

    def attend(
        q: Array, own: KeysAndValues, rule: ScoreRule, stored: Sequence[KeysAndValues]
    ) -> tuple[Array, KeysAndValues]:
        parts = [StoredKeys(*of_layer, where) for of_layer, where in zip(stored, stored_positions, strict=True)]
        return cached_attention(q, *own, positions, parts, rule), own

    return attend


def empty_store(model: Model, sequences: int, places: int) -> KeysAndValues:
    """Returns room for keys and values of all layers, [layers, sequences, key/value heads, places, head]."""
    config = model.config
    shape = (config.num_layers, sequences, config.num_kv_heads, places, config.head_dim)
    return _split(*(jnp.zeros(shape, model.dtype) for _ in range(2)))


def store(stored: KeysAndValues, new: KeysAndValues, place: Int[Array, ""]) -> KeysAndValues:
    """Writes the keys and values of new tokens, [layers, B, L, K, Dh], to a store, from a place on."""

    def write(old: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(old, new.swapaxes(2, 3), place, axis=3)

    return _split(*map(write, stored, new))


def _split(k: Array, v: Array) -> KeysAndValues:
    """Splits keys and values over the mesh as sequences and heads are."""
    return KeysAndValues(*(constrain(x, None, "batch", "heads", None, None) for x in (k, v)))


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
