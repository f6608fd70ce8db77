"""Attention on NVIDIA GPUs by cuDNN, which knows causal sequences but no tree of them: rows are taken apart again.

Every response becomes one causal sequence, its keys and values gathered from the row (a shared prompt's once for each
response), and cuDNN is told how long each is. So attention is computed as if nothing were shared; everything else of
the model still is. A shared token's result comes from the first response it belongs to, and gradients of shared keys
and values add up where they were gathered.

Sizes must be static: `sequences` slots a row, `longest` tokens each. cuDNN skips what lies beyond a sequence's length,
but memory does not: q, k, v, the result and their gradients exist `sequences * longest / L` times while a layer runs.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jax_simpo.errors import ConfigError


class Sequences(NamedTuple):
    """Where the tokens of a row's responses lie; N slots of up to T tokens a row.

    `token[b, n, p]` is the index in the row of the token at position `p` of sequence `n`, valid for `p < length[b, n]`;
    `first[b, t]` is the first sequence that token `t` of the row belongs to.
    """

    token: Int[Array, "B N T"]
    length: Int[Array, "B N"]
    first: Int[Array, "B L"]


def prepare(
    key_end: Int[Array, "B L"], positions: Int[Array, "B L"], *, sequences: int, longest: int | None = None
) -> Sequences:
    """Takes the rows apart.

    A sequence ends at a token that nothing but itself sees (`key_end[t] == t + 1`), and holds what that token sees,
    ordered by position. Rows are trees written depth first, so the first sequence of a token is the next to end.

    Args:
        key_end: int32, see `ops.attention`.
        positions: int32, each token's place in its own sequence.
        sequences: at most so many a row (its response slots).
        longest: at most so many tokens each; the row's length when not given.
    """
    length = key_end.shape[1]
    longest = length if longest is None else min(longest, length)
    index = jnp.arange(length)
    ends = key_end == index + 1
    first = jnp.cumsum(ends, axis=1, dtype=jnp.int32) - ends
    last = jnp.argsort(~ends, axis=1, stable=True)[:, :sequences].astype(jnp.int32)  # the tokens that end one
    last = jnp.pad(last, ((0, 0), (0, sequences - last.shape[1])))
    used = jnp.arange(sequences) < ends.sum(1)[:, None]
    inside = (index <= last[:, :, None]) & (last[:, :, None] < key_end[:, None, :]) & used[:, :, None]
    place = jnp.where(inside, positions[:, None, :], longest)  # `longest` is out of range, and so dropped

    def scatter(place: Int[Array, " L"]) -> Int[Array, " T"]:
        return jnp.zeros(longest, jnp.int32).at[place].set(index.astype(jnp.int32), mode="drop")

    return Sequences(jax.vmap(jax.vmap(scatter))(place), inside.sum(-1, dtype=jnp.int32), first)


def attention(
    q: Float[Array, "B L H Dh"],
    k: Float[Array, "B L K Dh"],
    v: Float[Array, "B L K Dh"],
    key_end: Int[Array, "B L"],
    positions: Int[Array, "B L"],
    sequences: Sequences,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    interpret: bool = False,
) -> Float[Array, "B L H Dh"]:
    """Grouped-query attention; the result has q's dtype. A row with more or longer sequences than slots gives NaN.

    Args:
        q: queries; head `h` reads key/value head `h // (H / K)`.
        k: keys.
        v: values.
        key_end: int32; 0 marks padding.
        positions: int32, each token's place in its own sequence.
        sequences: of `prepare`.
        scale: factor on the scores.
        window: sliding window in positions, `None` for none.
        softcap: must be `None`.
        interpret: compute with XLA instead of cuDNN, for tests.

    Raises:
        ConfigError: the model caps its attention scores.
    """
    if softcap is not None:
        raise ConfigError(
            "`attention: cudnn` cannot cap attention scores, as this model does; choose `pallas` (Hopper GPUs) or "
            "`blockwise`"
        )
    rows, slots, longest = sequences.token.shape
    inside = jnp.arange(longest) < sequences.length[:, :, None]

    def expand(x: Float[Array, "B L Heads Dh"]) -> Float[Array, "BN T Heads Dh"]:
        return _take_tokens(x, sequences.token, inside).reshape(rows * slots, longest, *x.shape[2:])

    # An empty slot holds one token of zeros: no kernel has to know what the softmax over nothing is.
    lengths = jnp.clip(sequences.length, 1, longest).reshape(-1)
    expanded = jax.nn.dot_product_attention(
        expand(q),
        expand(k),
        expand(v),
        scale=scale,
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="xla" if interpret else "cudnn",
    )
    expanded = expanded.reshape(rows, slots, longest, *q.shape[2:])
    real = key_end > 0
    # Out of range means that the static sizes are too small: NaN, which stops a run, rather than wrong numbers.
    row = jnp.arange(rows)[:, None]
    place = jnp.where(real, sequences.first, 0), jnp.where(real, positions, 0)
    out = expanded.at[row, *place].get(mode="fill", fill_value=jnp.nan)
    return jnp.where(real[:, :, None, None], out, jnp.zeros((), out.dtype))


def _take_tokens(
    x: Float[Array, "B L Heads Dh"], token: Int[Array, "B N T"], inside: Bool[Array, "B N T"]
) -> Float[Array, "B N T Heads Dh"]:
    """The tokens of each sequence, zeros beyond its end; whatever gradient a kernel leaves there is dropped."""
    gathered = jax.vmap(lambda x, token: x.at[token].get(mode="promise_in_bounds"))(x, token)
    return jnp.where(inside[..., None, None], gathered, jnp.zeros((), x.dtype))
