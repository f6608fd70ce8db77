"""Attention on NVIDIA GPUs by cuDNN, which knows causal sequences but no trees of them: rows are taken apart again.

Every response becomes one causal sequence. Its keys and values are copied from the row (those of a shared prompt once
for each response), and cuDNN gets the length of each sequence. So attention is computed as if nothing were shared;
everything else of the model still is. A shared token's result comes from the first response it belongs to, and the
gradients of shared keys and values add up in the tokens they were copied from.

Sizes must be static: `room.sequences` slots a row of `room.longest` tokens each. cuDNN skips the tokens beyond a
sequence's length, but they take memory: q, k, v, the result and their gradients are `sequences * longest / L` times as
large while a layer runs.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jax_simpo.errors import ConfigError
from jax_simpo.ops.attention.backends import Backend, Place, ScoreRule
from jax_simpo.ops.attention.mask import Mask, Room, visible_at


class Sequences(NamedTuple):
    """The sequences of each row, and the way back; N slots of up to T tokens a row.

    `token[b, n, p]` is the index in the row of the token at position `p` of sequence `n`, valid for `p < length[b, n]`;
    `first[b, t]` is the first sequence that token `t` of the row belongs to.
    """

    token: Int[Array, "B N T"]
    length: Int[Array, "B N"]
    first: Int[Array, "B L"]


def prepare(mask: Mask, window: int | None) -> Sequences:
    """Takes the rows of the batch apart, the same for every window; see `Backend.prepare`.

    Raises:
        ValueError: the mask was prepared without `room`.
    """
    if mask.room is None:
        raise ValueError("attention backend 'cudnn' must be told `room`: how many responses a row may hold, how long")
    return take_apart(mask.key_end, mask.positions, mask.room)


def take_apart(key_end: Int[Array, "B L"], positions: Int[Array, "B L"], room: Room) -> Sequences:
    """Finds the sequences of each row.

    A sequence ends at a token that only that token itself sees (`key_end[t] == t + 1`), and consists of the tokens
    which that one sees, ordered by position. Rows are trees written depth first, so the first sequence of a token is
    the next to end.

    Args:
        key_end: int32, see `mask.visible_at`.
        positions: int32, each token's place in its own sequence.
        room: N slots of up to T tokens; no slot gets more than the row's length.
    """
    length = key_end.shape[1]
    sequences, longest = room.sequences, min(room.longest, length)
    index = jnp.arange(length)
    is_last = key_end == index + 1
    first = jnp.cumsum(is_last, axis=1, dtype=jnp.int32) - is_last
    last = jnp.argsort(~is_last, axis=1, stable=True)[:, :sequences].astype(jnp.int32)
    last = jnp.pad(last, ((0, 0), (0, sequences - last.shape[1])))
    used = jnp.arange(sequences) < is_last.sum(1)[:, None]
    inside = visible_at(last[:, :, None], index, key_end[:, None, :]) & used[:, :, None]
    place = jnp.where(inside, positions[:, None, :], longest)  # `longest` is out of range, and so dropped

    def scatter(place: Int[Array, " L"]) -> Int[Array, " T"]:
        return jnp.zeros(longest, jnp.int32).at[place].set(index.astype(jnp.int32), mode="drop")

    return Sequences(jax.vmap(jax.vmap(scatter))(place), inside.sum(-1, dtype=jnp.int32), first)


def attend(
    q: Float[Array, "B L H Dh"],
    k: Float[Array, "B L K Dh"],
    v: Float[Array, "B L K Dh"],
    mask: Mask,
    rule: ScoreRule,
) -> Float[Array, "B L H Dh"]:
    """Computes attention sequence by sequence; see `Backend.attend`.

    A row with more or longer sequences than it has room for gives NaN. With `mask.interpret` XLA stands in for cuDNN.

    Raises:
        ConfigError: the model caps its attention scores.
    """
    if rule.softcap is not None:
        raise ConfigError(
            "`attention: cudnn` cannot cap attention scores, as this model does; choose `attention: auto`"
        )
    sequences: Sequences = mask.table(rule.window)
    rows, slots, longest = sequences.token.shape
    inside = jnp.arange(longest) < sequences.length[:, :, None]

    def expand(x: Float[Array, "B L Heads Dh"]) -> Float[Array, "BN T Heads Dh"]:
        return _take_tokens(x, sequences.token, inside).reshape(rows * slots, longest, *x.shape[2:])

    # An empty slot holds one token of zeros, so that no kernel has to compute a softmax over nothing.
    lengths = jnp.clip(sequences.length, 1, longest).reshape(-1)
    expanded = jax.nn.dot_product_attention(
        expand(q),
        expand(k),
        expand(v),
        scale=rule.scale,
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        local_window_size=None if rule.window is None else (rule.window - 1, 0),
        implementation="xla" if mask.interpret else "cudnn",
    )
    expanded = expanded.reshape(rows, slots, longest, *q.shape[2:])
    # A place out of range means that the static sizes are too small. NaN stops a run; wrong numbers would not.
    row = jnp.arange(rows)[:, None]
    place = jnp.where(mask.real, sequences.first, 0), jnp.where(mask.real, mask.positions, 0)
    out = expanded.at[row, *place].get(mode="fill", fill_value=jnp.nan)
    return jnp.where(mask.real[:, :, None, None], out, jnp.zeros((), out.dtype))


def _take_tokens(
    x: Float[Array, "B L Heads Dh"], token: Int[Array, "B N T"], inside: Bool[Array, "B N T"]
) -> Float[Array, "B N T Heads Dh"]:
    """Copies the tokens of each sequence, zeros beyond its end; a gradient that a kernel leaves there is dropped."""
    copied = jax.vmap(lambda x, token: x.at[token].get(mode="promise_in_bounds"))(x, token)
    return jnp.where(inside[..., None, None], copied, jnp.zeros((), x.dtype))


def obstacle(place: Place) -> str | None:
    """Says why cuDNN cannot compute attention there; see `Backend.obstacle`."""
    largest = 256 if place.capability >= (9, 0) else 128
    if place.platform != "gpu":
        return f"needs an NVIDIA GPU, and this is a {place.kind}"
    if place.capability < (8, 0):
        return "needs an NVIDIA GPU of compute capability 8.0 (A100) or later, and this is another"
    if place.dtype != "bfloat16":
        return f"computes in bfloat16, and `dtype` is {place.dtype}"
    if place.softcap:
        return "cannot cap attention scores, as this model does"
    if place.head_dim > largest or place.head_dim % 8:
        return f"takes heads of up to {largest} features, a multiple of 8, and this model's have {place.head_dim}"
    return None


BACKEND = Backend(prepare, attend, obstacle)
