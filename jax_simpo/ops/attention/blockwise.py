"""Attention by blocks in plain XLA: online softmax, memory linear in the row length, blocks nobody sees never visited.

The algorithm is FlashAttention-2's (Dao 2023, arXiv 2307.08691): the forward keeps the log-sum-exp of every query, the
backward recomputes the weights of one block at a time. What differs is the list of blocks to visit, made once per batch
from `key_end`: a query block walks its own live key blocks, so a block hidden by the mask costs nothing at all.

Scores are held keys first, `[K, S, M]`: then of the seven products of a forward and a backward pass none contracts over
the leading axis of its left operand, which XLA's CPU matmuls do at half speed, and only `K` and `V` need a transposed
copy. All rows are one list of blocks (block `n` of the list is block `n % Q` of row `n // Q`), so that one loop serves
them: under `vmap` a skipped block would be computed and thrown away.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jax_simpo.ops.numerics import SAVED, matmul_precision

BLOCK = 64  # queries and keys a block; a row whose length is not a multiple is padded inside
_MASKED = -1e30  # score of a hidden key; finite, so that a block in which a query sees nothing gives no NaN
_FLOOR = -1e20  # no running maximum is below it: so a hidden key's weight is exp(_MASKED - _FLOOR) = 0


class LiveBlocks(NamedTuple):
    """For each query block, the key blocks in which it sees anything: `key_blocks[b, i, : counts[b, i]]`.

    The first `full[b, i]` of them are seen whole, by every query of the block; only the others need the mask.
    """

    key_blocks: Int[Array, "B Q Q"]
    counts: Int[Array, "B Q"]
    full: Int[Array, "B Q"]


class _Rule(NamedTuple):
    """What turns scores into weights, static."""

    scale: float
    window: int | None
    softcap: float | None


def find_live_blocks(key_end: Int[Array, "B L"], positions: Int[Array, "B L"], window: int | None) -> LiveBlocks:
    """Lists the key blocks each query block must visit. Never leaves out a live block; may keep a dead one."""
    ends = _blocks(key_end)
    starts = jnp.arange(ends.shape[1]) * BLOCK
    stops = starts + BLOCK
    alive = (starts[None, :] <= starts[:, None]) & (ends.max(-1)[:, None, :] > starts[:, None])
    full = (stops[None, :] <= starts[:, None] + 1) & (ends.min(-1)[:, None, :] >= stops[:, None])
    if window is not None:
        # Padding sits at position 0 and may only widen the bound.
        at = _blocks(positions)
        alive &= at.min(-1)[:, :, None] - at.max(-1)[:, None, :] < window
        full &= at.max(-1)[:, :, None] - at.min(-1)[:, None, :] < window
    full &= alive
    rank = jnp.where(full, 0, jnp.where(alive, 1, 2))
    order = jnp.argsort(rank, axis=-1, stable=True).astype(jnp.int32)
    return LiveBlocks(order, alive.sum(-1, dtype=jnp.int32), full.sum(-1, dtype=jnp.int32))


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
    """Attention under the `key_end` rule; the result has q's dtype.

    Args:
        q: queries; head `h` reads key/value head `h // (H / K)`.
        k: keys.
        v: values.
        key_end: int32, the end (exclusive) of the queries that see each key.
        positions: int32, what `window` is measured in.
        live: of `find_live_blocks` with the same window.
        scale: factor on the scores.
        window: sliding window, `None` for none.
        softcap: `softcap * tanh(score / softcap)` before the mask, `None` for none.
    """
    padding = ((0, 0), (0, -q.shape[1] % BLOCK), (0, 0), (0, 0))
    q, k, v = (jnp.pad(x, padding) for x in (q, k, v))  # nothing where the length is a multiple
    out = _attention(_Rule(scale, window, softcap), q, k, v, _blocks(key_end), _blocks(positions), live)
    return out[:, : key_end.shape[1]]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(rule: _Rule, q: Array, k: Array, v: Array, ends: Array, at: Array, live: LiveBlocks) -> Array:
    return _forward(rule, q, k, v, ends, at, live)[0]


def _forward(
    rule: _Rule, q: Array, k: Array, v: Array, ends: Array, at: Array, live: LiveBlocks
) -> tuple[Array, tuple[Any, ...]]:
    keys, values = _key_blocks(k), _turned_blocks(v)
    queries = _query_blocks(q, k.shape[2])
    mask = _BlockMask(rule, ends, at, queries.shape[3])
    precision = matmul_precision(q.dtype)

    def one_query_block(_: None, block: tuple[Array, ...]) -> tuple[None, tuple[Array, Array]]:
        n, query, index, count, full = block
        query = _stack_heads(query)  # [K, M, Dh], M = group x block

        def visit(t: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, out = state  # [K, M], [K, M], [K, Dh, M]
            other = mask.place(n, index[t])
            scores = mask.scores(query, keys[other], n, other, t < full, precision)[0]
            new_top = jnp.maximum(top, scores.max(1))
            weights = jnp.exp(scores - new_top[:, None])
            shrink = jnp.exp(top - new_top)
            mixed = _matmul("kds,ksm->kdm", values[other], weights.astype(v.dtype), precision)
            return new_top, total * shrink + weights.sum(1), out * shrink[:, None] + mixed

        heads, stacked, width = query.shape
        nothing = jnp.zeros((heads, stacked))
        empty = (nothing + _FLOOR, nothing, jnp.zeros((heads, width, stacked)))
        top, total, out = jax.lax.fori_loop(0, count, visit, empty)
        seen = total > 0
        total = jnp.where(seen, total, 1.0)
        out = out / total[:, None]  # a query that saw nothing has zeros here
        return None, (_unstack_heads(out, mask.groups).astype(q.dtype), jnp.where(seen, top + jnp.log(total), 0.0))

    _, (out, lse) = jax.lax.scan(one_query_block, None, (jnp.arange(len(queries)), queries, *_flat(live)))
    out = checkpoint_name(out.reshape(q.shape), SAVED)
    lse = checkpoint_name(lse, SAVED)
    return out, (q, k, v, ends, at, live, out, lse)


def _backward(rule: _Rule, saved: tuple[Any, ...], dout: Array) -> tuple[Array | None, ...]:
    q, k, v, ends, at, live, out, lse = saved
    keys, turned_keys, values = _key_blocks(k), _turned_blocks(k), _key_blocks(v)
    queries, douts, outs = (_query_blocks(x, k.shape[2]) for x in (q, dout, out))
    mask = _BlockMask(rule, ends, at, queries.shape[3])
    precision = matmul_precision(q.dtype)

    def one_query_block(grads: tuple[Array, Array], block: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        n, query, dquery_out, query_out, block_lse, index, count, full = block
        query, dquery_out, query_out = (_stack_heads(x) for x in (query, dquery_out, query_out))
        # sum_s weights[s] * dweights[s] equals dout . out (FlashAttention-2, section 3.1.1).
        delta = (dquery_out.astype(jnp.float32) * query_out.astype(jnp.float32)).sum(-1)

        def visit(t: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dquery, dkeys, dvalues = state
            other = mask.place(n, index[t])
            scores, slope = mask.scores(query, keys[other], n, other, t < full, precision)
            weights = jnp.exp(scores - block_lse[:, None])
            dweights = _matmul("ksd,kmd->ksm", values[other], dquery_out, precision)
            dscores = (weights * (dweights - delta[:, None]) * slope).astype(q.dtype)
            dquery += _matmul("kds,ksm->kdm", turned_keys[other], dscores, precision)
            dkeys = _add_block(dkeys, other, _matmul("ksm,kmd->ksd", dscores, query, precision))
            dvalues = _add_block(
                dvalues, other, _matmul("ksm,kmd->ksd", weights.astype(q.dtype), dquery_out, precision)
            )
            return dquery, dkeys, dvalues

        heads, stacked, width = query.shape
        state = (jnp.zeros((heads, width, stacked)), *grads)
        dquery, dkeys, dvalues = jax.lax.fori_loop(0, count, visit, state)
        return (dkeys, dvalues), _unstack_heads(dquery, mask.groups).astype(q.dtype)

    none = (jnp.zeros(keys.shape), jnp.zeros(values.shape))
    blocks = (jnp.arange(len(queries)), queries, douts, outs, lse, *_flat(live))
    (dkeys, dvalues), dqueries = jax.lax.scan(one_query_block, none, blocks)
    dq = dqueries.reshape(q.shape)
    return dq, _join_keys(dkeys, k), _join_keys(dvalues, v), None, None, None


_attention.defvjp(_forward, _backward)


class _BlockMask:
    """Scores and visibility of one query block against one key block, both by their place in the list of all rows."""

    def __init__(self, rule: _Rule, ends: Int[Array, "B Q S"], at: Int[Array, "B Q S"], groups: int) -> None:
        self.rule = rule
        self.groups = groups
        self.per_row = ends.shape[1]
        self.ends = ends.reshape(-1, BLOCK)
        self.at = at.reshape(-1, BLOCK)

    def place(self, n: Array, j: Array) -> Array:
        """Where key block `j` of the row of query block `n` stands in the list."""
        return n // self.per_row * self.per_row + j

    def scores(
        self, query: Array, key: Array, n: Array, other: Array, full: Array, precision: jax.lax.Precision | None
    ) -> tuple[Float[Array, "K S M"], Array | float]:
        """Capped and masked scores, float32, and the derivative of a visible one by the bare product."""
        scores = self.rule.scale * _matmul("ksd,kmd->ksm", key, query, precision)
        slope: Array | float = self.rule.scale
        if self.rule.softcap is not None:
            bent = jnp.tanh(scores / self.rule.softcap)
            scores, slope = self.rule.softcap * bent, self.rule.scale * (1.0 - bent**2)
        # The branches keep the mask out of the loop over scores, where comparing integers would cost more than the exp,
        # as would finding a stacked query's place in a mask of fewer.
        most = jax.lax.cond(full, lambda: jnp.full(scores.shape[1:], jnp.inf), lambda: self.most(n, other))
        return jnp.minimum(scores, most), slope

    def most(self, n: Array, other: Array) -> Float[Array, "S M"]:
        """The largest score there can be, by visibility: any, or that of a hidden key."""
        return jnp.tile(jnp.where(self.visible(n, other), jnp.inf, _MASKED), (1, self.groups))

    def visible(self, n: Array, other: Array) -> Bool[Array, "S S"]:
        """The rule of `ops.attention`, `[key, query]`."""
        offset = jnp.arange(BLOCK)
        query = (n % self.per_row * BLOCK + offset)[None, :]
        key = (other % self.per_row * BLOCK + offset)[:, None]
        see = (key <= query) & (query < self.ends[other][:, None])
        if self.rule.window is not None:
            see &= self.at[n][None, :] - self.at[other][:, None] < self.rule.window
        return see


def _matmul(subscripts: str, a: Array, b: Array, precision: jax.lax.Precision | None) -> Array:
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=jnp.float32)


def _add_block(blocks: Array, n: Array, block: Array) -> Array:
    # `.at[n].add` would compare the index with the bounds for every number added.
    old = jax.lax.dynamic_index_in_dim(blocks, n, keepdims=False)
    return jax.lax.dynamic_update_index_in_dim(blocks, old + block, n, 0)


def _flat(live: LiveBlocks) -> LiveBlocks:
    return LiveBlocks(*(x.reshape(-1, *x.shape[2:]) for x in live))


def _blocks(x: Int[Array, "*B L"]) -> Int[Array, "*B Q S"]:
    """Cuts the last axis into blocks, padded with zeros (as `key_end`: keys nobody sees)."""
    padding = -x.shape[-1] % BLOCK
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)])
    return x.reshape(*x.shape[:-1], -1, BLOCK)


def _key_blocks(x: Float[Array, "B L K Dh"]) -> Float[Array, "N K S Dh"]:
    return x.reshape(-1, BLOCK, *x.shape[2:]).swapaxes(1, 2)


def _turned_blocks(x: Float[Array, "B L K Dh"]) -> Float[Array, "N K Dh S"]:
    return x.reshape(-1, BLOCK, *x.shape[2:]).transpose(0, 2, 3, 1)


def _join_keys(blocks: Float[Array, "N K S Dh"], like: Array) -> Float[Array, "B L K Dh"]:
    return blocks.swapaxes(1, 2).reshape(like.shape).astype(like.dtype)


def _query_blocks(x: Float[Array, "B L H Dh"], heads: int) -> Float[Array, "N S K G Dh"]:
    return x.reshape(-1, BLOCK, heads, x.shape[2] // heads, x.shape[3])


def _stack_heads(x: Float[Array, "S K G Dh"]) -> Float[Array, "K M Dh"]:
    """Query heads that share a key/value head are stacked under each other: one matmul serves them all."""
    return x.transpose(1, 2, 0, 3).reshape(x.shape[1], -1, x.shape[3])


def _unstack_heads(x: Float[Array, "K Dh M"], groups: int) -> Float[Array, "S K G Dh"]:
    return x.reshape(*x.shape[:2], groups, -1).transpose(3, 0, 2, 1)
