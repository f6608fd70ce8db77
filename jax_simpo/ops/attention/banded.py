"""Attention by bands in plain XLA: loops whose length is static, for accelerators that no kernel here runs on.

A group of responses lies in one piece of its row. So a query sees no key further back than the largest group is long,
and a chunk of queries needs no more than the band of keys that ends where the chunk ends. One loop goes over the chunks
of a row, for all rows and heads at once. How often it runs is known when the program is compiled, and the host does not
take part: `blockwise` walks lists whose length is data, for which a GPU's host waits in every pass.

The price is that the whole band is computed, hidden blocks too. Memory is linear in the row length: that of one chunk's
scores, `[B, H, chunk, band]`, a few times over.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jax_simpo.ops.attention.backends import Backend, ScoreRule, runs_anywhere
from jax_simpo.ops.attention.mask import Mask, visible_at
from jax_simpo.ops.numerics import LOWEST, SAVED_ATTENTION, matmul_precision

CHUNK = 256  # queries of a chunk; a row whose length is not a multiple is padded inside `attend`


class Band(NamedTuple):
    """The static sizes of a loop: it makes `chunks` passes over `CHUNK` queries and the band of keys they may see."""

    chunks: int
    keys: int

    @classmethod
    def of(cls, length: int, span: int) -> Band:
        """Returns the sizes for rows of a length, whose queries see no key more than `span - 1` tokens back."""
        chunks = -(-length // CHUNK)
        return cls(chunks, min(chunks * CHUNK, span) + CHUNK)


def prepare(mask: Mask, window: int | None) -> Bool[Array, " B"]:
    """Finds the rows in which a key is visible from further away than the band reaches; see `Backend.prepare`."""
    return (mask.key_end - jnp.arange(mask.key_end.shape[1]) > _span(mask)).any(axis=1)


def attend(
    q: Float[Array, "B L H Dh"],
    k: Float[Array, "B L K Dh"],
    v: Float[Array, "B L K Dh"],
    mask: Mask,
    rule: ScoreRule,
) -> Float[Array, "B L H Dh"]:
    """Computes attention chunk by chunk; see `Backend.attend`.

    A row with a larger group than it has room for gives NaN.
    """
    length = q.shape[1]
    band = Band.of(length, _span(mask))
    behind, before = band.chunks * CHUNK - length, band.keys - CHUNK

    def padded(x: Array, before: int) -> Array:
        return jnp.pad(x, [(0, 0), (before, behind), *[(0, 0)] * (x.ndim - 2)])

    # Bands begin before the row does: the keys there have a `key_end` of 0, which hides them.
    arrays = padded(q, 0), padded(k, before), padded(v, before), padded(mask.key_end, before)
    out = _attention(rule, band, *arrays, padded(mask.positions, before))[:, :length]
    # NaN stops a run; wrong numbers would not.
    return jnp.where(mask.table(rule.window)[:, None, None, None], jnp.nan, out)


def _span(mask: Mask) -> int:
    length = mask.key_end.shape[1]
    return length if mask.room is None else min(mask.room.span, length)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    rule: ScoreRule, band: Band, q: Array, k: Array, v: Array, key_end: Array, positions: Array
) -> Float[Array, "B L H Dh"]:
    return _forward(rule, band, q, k, v, key_end, positions)[0]


def _forward(
    rule: ScoreRule, band: Band, q: Array, k: Array, v: Array, key_end: Array, positions: Array
) -> tuple[Array, tuple[Any, ...]]:
    scorer = _ChunkScores(rule, band, k, key_end, positions)

    def one_chunk(_: None, chunk: Array) -> tuple[None, tuple[Array, Array]]:
        query = scorer.grouped(_chunk_of(q, chunk))
        scores = scorer.scores(query, chunk)[0]
        top = jnp.maximum(scores.max(-1), LOWEST)
        weights = jnp.exp(scores - top[..., None])
        total = weights.sum(-1)
        sees_any = total > 0
        total = jnp.where(sees_any, total, 1.0)
        out = scorer.product("bkgms,bskd->bkgmd", weights.astype(v.dtype), scorer.band_of(v, chunk))
        out = (out / total[..., None]).astype(q.dtype)
        return None, (out, jnp.where(sees_any, top + jnp.log(total), 0.0))

    _, (out, lse) = jax.lax.scan(one_chunk, None, jnp.arange(band.chunks))
    out = checkpoint_name(_join_chunks(out, q), SAVED_ATTENTION)
    lse = checkpoint_name(lse, SAVED_ATTENTION)
    return out, (q, k, v, key_end, positions, out, lse)


def _backward(rule: ScoreRule, band: Band, saved: tuple[Any, ...], dout: Array) -> tuple[Array | None, ...]:
    q, k, v, key_end, positions, out, lse = saved
    scorer = _ChunkScores(rule, band, k, key_end, positions)

    def one_chunk(gradients: tuple[Array, Array], inputs: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array]:
        chunk, chunk_lse = inputs
        query, chunk_dout, chunk_out = (scorer.grouped(_chunk_of(x, chunk)) for x in (q, dout, out))
        keys, values = scorer.band_of(k, chunk), scorer.band_of(v, chunk)
        scores, slope = scorer.scores(query, chunk)
        weights = jnp.exp(scores - chunk_lse[..., None])
        # sum_s weights[s] * dweights[s] equals dout . out (FlashAttention-2, section 3.1.1).
        delta = (chunk_dout.astype(jnp.float32) * chunk_out.astype(jnp.float32)).sum(-1).transpose(0, 2, 3, 1)
        dweights = scorer.product("bmkgd,bskd->bkgms", chunk_dout, values)
        dscores = (weights * (dweights - delta[..., None]) * slope).astype(q.dtype)
        dquery = scorer.product("bkgms,bskd->bkgmd", dscores, keys).astype(q.dtype)
        dkeys = scorer.product("bkgms,bmkgd->bskd", dscores, query)
        dvalues = scorer.product("bkgms,bmkgd->bskd", weights.astype(q.dtype), chunk_dout)
        dk, dv = gradients
        return (scorer.add(dk, dkeys, chunk), scorer.add(dv, dvalues, chunk)), dquery

    zeros = jnp.zeros(k.shape), jnp.zeros(v.shape)
    (dk, dv), dq = jax.lax.scan(one_chunk, zeros, (jnp.arange(band.chunks), lse))
    return _join_chunks(dq, q), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_attention.defvjp(_forward, _backward)


class _ChunkScores:
    """Computes the scores of a chunk of queries against its band of keys, of all rows and heads."""

    def __init__(
        self, rule: ScoreRule, band: Band, k: Float[Array, "B P K Dh"], key_end: Int[Array, "B P"], positions: Array
    ) -> None:
        self.rule, self.band = rule, band
        self.k, self.key_end, self.positions = k, key_end, positions
        self.precision = matmul_precision(k.dtype)

    def grouped(self, queries: Float[Array, "B M H Dh"]) -> Float[Array, "B M K G Dh"]:
        """Groups the query heads by the key/value head they read."""
        rows, length, heads, width = queries.shape
        kv_heads = self.k.shape[2]
        return queries.reshape(rows, length, kv_heads, heads // kv_heads, width)

    def band_of(self, x: Array, chunk: Array) -> Array:
        """Returns the band of a chunk, `[B, band, ...]`."""
        return jax.lax.dynamic_slice_in_dim(x, chunk * CHUNK, self.band.keys, axis=1)

    def add(self, total: Array, x: Array, chunk: Array) -> Array:
        """Adds to the band of a chunk."""
        return jax.lax.dynamic_update_slice_in_dim(total, self.band_of(total, chunk) + x, chunk * CHUNK, axis=1)

    def product(self, subscripts: str, a: Array, b: Array) -> Array:
        """Returns a product summed in float32."""
        return jnp.einsum(subscripts, a, b, precision=self.precision, preferred_element_type=jnp.float32)

    def scores(
        self, query: Float[Array, "B M K G Dh"], chunk: Array
    ) -> tuple[Float[Array, "B K G M S"], Array | float]:
        """Returns float32 scores, capped and masked, and the derivative of a visible one by its bare product."""
        scores = self.rule.scale * self.product("bmkgd,bskd->bkgms", query, self.band_of(self.k, chunk))
        slope: Array | float = self.rule.scale
        if self.rule.softcap is not None:
            tanh = jnp.tanh(scores / self.rule.softcap)
            scores, slope = self.rule.softcap * tanh, self.rule.scale * (1.0 - tanh * tanh)
        return jnp.where(self._visible(chunk)[:, None, None], scores, -jnp.inf), slope

    def _visible(self, chunk: Array) -> Bool[Array, "B M S"]:
        # Both count from where the first band begins; so `key_end`, which counts from the row's start, is moved.
        before = self.band.keys - CHUNK
        query = chunk * CHUNK + before + jnp.arange(CHUNK)
        key = chunk * CHUNK + jnp.arange(self.band.keys)
        positions = self.band_of(self.positions, chunk)
        return visible_at(
            query[:, None],
            key,
            self.band_of(self.key_end, chunk)[:, None, :] + before,
            positions[:, before:, None],
            positions[:, None, :],
            self.rule.window,
        )


def _chunk_of(x: Float[Array, "B L H Dh"], chunk: Array) -> Float[Array, "B M H Dh"]:
    return jax.lax.dynamic_slice_in_dim(x, chunk * CHUNK, CHUNK, axis=1)


def _join_chunks(chunks: Float[Array, "C B K G M Dh"], like: Array) -> Float[Array, "B L H Dh"]:
    return chunks.transpose(1, 0, 4, 2, 3, 5).reshape(like.shape)


BACKEND = Backend(prepare, attend, obstacle=runs_anywhere)
