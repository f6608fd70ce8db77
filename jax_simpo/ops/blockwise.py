"""Attention by blocks in plain XLA: online softmax, memory linear in the row length, blocks nobody sees never visited.

The algorithm is FlashAttention-2's (Dao 2023, arXiv 2307.08691): the forward keeps the log-sum-exp of every query, the
backward recomputes the weights of one block at a time. What differs is the list of blocks to visit, made once per batch
from `key_end`: a query block walks its own live key blocks, so a block hidden by the mask costs nothing at all.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

BLOCK = 128  # queries and keys a block; a row whose length is not a multiple is padded inside
SAVED = "attention"  # name by which a rematerialisation policy keeps what the backward needs, so as not to run it again
_MASKED = -1e30  # finite, so that a block in which a query sees nothing gives no NaN


class LiveBlocks(NamedTuple):
    """For each query block, the key blocks in which it sees anything: `key_blocks[b, i, : counts[b, i]]`."""

    key_blocks: Int[Array, "B Q Q"]
    counts: Int[Array, "B Q"]


class _Rule(NamedTuple):
    """What turns scores into weights, static."""

    scale: float
    window: int | None
    softcap: float | None


def matmul_precision(dtype: Any) -> jax.lax.Precision | None:
    """Full float32 products for float32 inputs: TPUs and GPUs would otherwise round them to fewer bits."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def find_live_blocks(key_end: Int[Array, "B L"], positions: Int[Array, "B L"], window: int | None) -> LiveBlocks:
    """Lists the key blocks each query block must visit. Never leaves out a live block; may keep a dead one."""
    ends = _blocks(key_end)
    starts = jnp.arange(ends.shape[1]) * BLOCK
    alive = (starts[None, :] <= starts[:, None]) & (ends.max(-1)[:, None, :] > starts[:, None])
    if window is not None:
        # Padding sits at position 0 and may only widen the bound.
        at = _blocks(positions)
        alive &= at.min(-1)[:, :, None] - at.max(-1)[:, None, :] < window
    return LiveBlocks(jnp.argsort(~alive, axis=-1, stable=True).astype(jnp.int32), alive.sum(-1, dtype=jnp.int32))


def attention(
    q: Float[Array, "B L H Dh"],
    k: Float[Array, "B L K Dh"],
    v: Float[Array, "B L K Dh"],
    key_end: Int[Array, "B L"],
    positions: Int[Array, "B L"],
    live: LiveBlocks,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Float[Array, "B L H Dh"]:
    """The rows one after the other: under `vmap` a skipped block would be computed and thrown away."""
    rule = _Rule(scale, window, softcap)
    return jax.lax.map(lambda row: _row_attention(rule, *row), (q, k, v, key_end, positions, live))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _row_attention(
    rule: _Rule, q: Array, k: Array, v: Array, key_end: Array, positions: Array, live: LiveBlocks
) -> Array:
    return _row_forward(rule, q, k, v, key_end, positions, live)[0]


def _row_forward(
    rule: _Rule, q: Array, k: Array, v: Array, key_end: Array, positions: Array, live: LiveBlocks
) -> tuple[Array, tuple[Any, ...]]:
    queries, keys, values = _query_blocks(q, k.shape[1]), _key_blocks(k), _key_blocks(v)
    block_mask = _BlockMask(rule, key_end, positions, queries.shape[2])
    precision = matmul_precision(q.dtype)

    def one_query_block(_: None, block: tuple[Array, ...]) -> tuple[None, tuple[Array, Array]]:
        i, query, index, count = block  # query [K, M, Dh], M = group x block

        def visit(t: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, out = state  # [K, M], [K, M], [K, M, Dh]
            j = index[t]
            scores, see = block_mask.scores(query, keys[j], i, j, precision)
            scores = jnp.where(see, scores, _MASKED)
            new_top = jnp.maximum(top, scores.max(-1))
            weights = jnp.where(see, jnp.exp(scores - new_top[..., None]), 0.0)
            shrink = jnp.exp(top - new_top)
            mixed = _matmul("kms,ksd->kmd", weights.astype(v.dtype), values[j], precision)
            return new_top, total * shrink + weights.sum(-1), out * shrink[..., None] + mixed

        empty = (jnp.full(query.shape[:-1], _MASKED), jnp.zeros(query.shape[:-1]), jnp.zeros(query.shape))
        top, total, out = jax.lax.fori_loop(0, count, visit, empty)
        seen = total > 0
        out = jnp.where(seen[..., None], out / jnp.where(seen, total, 1.0)[..., None], 0.0)
        lse = jnp.where(seen, top + jnp.log(jnp.where(seen, total, 1.0)), 0.0)
        return None, (out, lse)

    blocks = (jnp.arange(len(queries)), queries, live.key_blocks, live.counts)
    _, (out, lse) = jax.lax.scan(one_query_block, None, blocks)
    out = checkpoint_name(_join_queries(out, q.shape).astype(q.dtype), SAVED)
    lse = checkpoint_name(lse, SAVED)
    return out, (q, k, v, key_end, positions, live, out, lse)


def _row_backward(rule: _Rule, saved: tuple[Any, ...], dout: Array) -> tuple[Array | None, ...]:
    q, k, v, key_end, positions, live, out, lse = saved
    heads = k.shape[1]
    queries, keys, values = _query_blocks(q, heads), _key_blocks(k), _key_blocks(v)
    douts = _query_blocks(dout, heads)
    # sum_s weights[s] * dweights[s] equals dout . out (FlashAttention-2, section 3.1.1).
    deltas = (douts.astype(jnp.float32) * _query_blocks(out, heads).astype(jnp.float32)).sum(-1)
    block_mask = _BlockMask(rule, key_end, positions, queries.shape[2])
    precision = matmul_precision(q.dtype)

    def one_query_block(grads: tuple[Array, Array], block: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        i, query, dquery_out, block_lse, delta, index, count = block

        def visit(t: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dquery, dkeys, dvalues = state
            j = index[t]
            scores, see = block_mask.scores(query, keys[j], i, j, precision)
            weights = jnp.where(see, jnp.exp(scores - block_lse[..., None]), 0.0)
            dweights = _matmul("kmd,ksd->kms", dquery_out, values[j], precision)
            dscores = weights * (dweights - delta[..., None]) * rule.scale
            if rule.softcap is not None:
                dscores *= 1.0 - (scores / rule.softcap) ** 2
            dscores = dscores.astype(q.dtype)
            dquery += _matmul("kms,ksd->kmd", dscores, keys[j], precision)
            dkeys = dkeys.at[j].add(_matmul("kms,kmd->ksd", dscores, query, precision))
            dvalues = dvalues.at[j].add(_matmul("kms,kmd->ksd", weights.astype(q.dtype), dquery_out, precision))
            return dquery, dkeys, dvalues

        dquery, dkeys, dvalues = jax.lax.fori_loop(0, count, visit, (jnp.zeros(query.shape), *grads))
        return (dkeys, dvalues), dquery

    none = (jnp.zeros(keys.shape), jnp.zeros(values.shape))
    blocks = (jnp.arange(len(queries)), queries, douts, lse, deltas, live.key_blocks, live.counts)
    (dkeys, dvalues), dqueries = jax.lax.scan(one_query_block, none, blocks)
    dq = _join_queries(dqueries, q.shape).astype(q.dtype)
    return (
        dq,
        _join_keys(dkeys, k.shape).astype(k.dtype),
        _join_keys(dvalues, v.shape).astype(v.dtype),
        None,
        None,
        None,
    )


_row_attention.defvjp(_row_forward, _row_backward)


class _BlockMask:
    """Scores and visibility of one query block against one key block."""

    def __init__(self, rule: _Rule, key_end: Array, positions: Array, rows: int) -> None:
        self.rule = rule
        self.groups = rows // BLOCK
        self.key_end = _blocks(key_end)
        self.positions = _blocks(positions)

    def scores(
        self, query: Array, key: Array, i: Array, j: Array, precision: jax.lax.Precision | None
    ) -> tuple[Float[Array, "K M S"], Array]:
        """Capped scores [K, M, S], float32, and whether each may be seen, [M, S]."""
        scores = self.rule.scale * _matmul("kmd,ksd->kms", query, key, precision)
        if self.rule.softcap is not None:
            scores = self.rule.softcap * jnp.tanh(scores / self.rule.softcap)
        offset = jnp.arange(BLOCK)
        q_index = (i * BLOCK + offset)[:, None]
        see = ((j * BLOCK + offset)[None, :] <= q_index) & (q_index < self.key_end[j][None, :])
        if self.rule.window is not None:
            see &= self.positions[i][:, None] - self.positions[j][None, :] < self.rule.window
        return scores, jnp.tile(see, (self.groups, 1))


def _matmul(subscripts: str, a: Array, b: Array, precision: jax.lax.Precision | None) -> Array:
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=jnp.float32)


def _blocks(x: Int[Array, "*B L"]) -> Int[Array, "*B Q S"]:
    """Cuts the last axis into blocks, padded with zeros (as `key_end`: keys nobody sees)."""
    padding = -x.shape[-1] % BLOCK
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)])
    return x.reshape(*x.shape[:-1], -1, BLOCK)


def _key_blocks(x: Float[Array, "L K Dh"]) -> Float[Array, "Q K S Dh"]:
    padded = jnp.pad(x, ((0, -len(x) % BLOCK), (0, 0), (0, 0)))
    return padded.reshape(-1, BLOCK, *x.shape[1:]).swapaxes(1, 2)


def _join_keys(x: Float[Array, "Q K S Dh"], shape: tuple[int, ...]) -> Float[Array, "L K Dh"]:
    return x.swapaxes(1, 2).reshape(-1, *shape[1:])[: shape[0]]


def _query_blocks(x: Float[Array, "L H Dh"], heads: int) -> Float[Array, "Q K M Dh"]:
    """Query heads that share a key/value head are stacked under each other: one matmul serves them all."""
    padded = jnp.pad(x, ((0, -len(x) % BLOCK), (0, 0), (0, 0)))
    grouped = padded.reshape(-1, BLOCK, heads, x.shape[1] // heads, x.shape[2])
    return grouped.transpose(0, 2, 3, 1, 4).reshape(len(grouped), heads, -1, x.shape[2])


def _join_queries(x: Float[Array, "Q K M Dh"], shape: tuple[int, ...]) -> Float[Array, "L H Dh"]:
    grouped = x.reshape(*x.shape[:2], -1, BLOCK, x.shape[-1])
    return grouped.transpose(0, 3, 1, 2, 4).reshape(-1, *shape[1:])[: shape[0]]
