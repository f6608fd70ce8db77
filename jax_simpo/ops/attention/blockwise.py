"""Attention by blocks in plain XLA: online softmax, memory linear in the row length, hidden blocks never computed.

The algorithm is FlashAttention-2's (Dao 2023, arXiv 2307.08691): the forward pass keeps the log-sum-exp of every query,
and the backward pass recomputes the weights of one block at a time. The list of blocks to visit is an addition, made
once per batch from `key_end`: a query block walks its own live key blocks, so a block hidden by the mask costs nothing.

Scores lie keys first, `[K, S, M]`: then of the seven products of a forward and a backward pass none contracts over the
leading axis of its left operand, which XLA's CPU matmuls do at half speed, and only `K` and `V` need a transposed copy.
The blocks of all rows form one list (block `n` of the list is block `n % Q` of row `n // Q`), so that one loop serves
them: under `vmap` a skipped block would be computed and thrown away.
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

BLOCK = 64  # queries and keys of a block; a row whose length is not a multiple is padded inside `attend`
_FLOOR = -1e20  # least running maximum: a hidden key's score is LOWEST, so its weight is exp(LOWEST - _FLOOR) = 0


class LiveBlocks(NamedTuple):
    """For each query block, the key blocks of which it sees anything: `key_blocks[b, i, : counts[b, i]]`.

    The first `full[b, i]` of them are visible to every query of the block; only the others need the mask.
    """

    key_blocks: Int[Array, "B Q Q"]
    counts: Int[Array, "B Q"]
    full: Int[Array, "B Q"]


def prepare(mask: Mask, window: int | None) -> LiveBlocks:
    """Lists the live blocks of the batch; see `Backend.prepare`."""
    return find_live_blocks(mask.key_end, mask.positions, window)


def find_live_blocks(key_end: Int[Array, "B L"], positions: Int[Array, "B L"], window: int | None) -> LiveBlocks:
    """Lists the key blocks each query block must visit. Never leaves out a live block; may keep a dead one.

    It applies the rule of `mask.visible_at` to the smallest and largest index, `key_end` and position of each block.
    """
    ends = _blocks(key_end)
    starts = jnp.arange(ends.shape[1]) * BLOCK
    stops = starts + BLOCK
    alive = (starts[None, :] <= starts[:, None]) & (ends.max(-1)[:, None, :] > starts[:, None])
    full = (stops[None, :] <= starts[:, None] + 1) & (ends.min(-1)[:, None, :] >= stops[:, None])
    if window is not None:
        # Padding has position 0, which can only widen the bound.
        places = _blocks(positions)
        alive &= places.min(-1)[:, :, None] - places.max(-1)[:, None, :] < window
        full &= places.max(-1)[:, :, None] - places.min(-1)[:, None, :] < window
    full &= alive
    rank = jnp.where(full, 0, jnp.where(alive, 1, 2))
    order = jnp.argsort(rank, axis=-1, stable=True).astype(jnp.int32)
    return LiveBlocks(order, alive.sum(-1, dtype=jnp.int32), full.sum(-1, dtype=jnp.int32))


def attend(
    q: Float[Array, "B L H Dh"],
    k: Float[Array, "B L K Dh"],
    v: Float[Array, "B L K Dh"],
    mask: Mask,
    rule: ScoreRule,
) -> Float[Array, "B L H Dh"]:
    """Computes attention over the live blocks; see `Backend.attend`."""
    length = q.shape[1]
    padding = ((0, 0), (0, -length % BLOCK), (0, 0), (0, 0))
    q, k, v = (jnp.pad(x, padding) for x in (q, k, v))  # adds nothing where the length is a multiple
    out = _attention(rule, q, k, v, _blocks(mask.key_end), _blocks(mask.positions), mask.table(rule.window))
    return out[:, :length]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(rule: ScoreRule, q: Array, k: Array, v: Array, ends: Array, positions: Array, live: LiveBlocks) -> Array:
    return _forward(rule, q, k, v, ends, positions, live)[0]


def _forward(
    rule: ScoreRule, q: Array, k: Array, v: Array, ends: Array, positions: Array, live: LiveBlocks
) -> tuple[Array, tuple[Any, ...]]:
    keys, values = _key_blocks(k), _transposed_key_blocks(v)
    queries = _query_blocks(q, k.shape[2])
    scorer = _BlockScores(rule, ends, positions, queries.shape[3])
    precision = matmul_precision(q.dtype)

    def one_query_block(_: None, inputs: tuple[Array, ...]) -> tuple[None, tuple[Array, Array]]:
        query_block, query, key_blocks, count, full = inputs
        query = _stack_heads(query)  # [K, M, Dh], M = group x block

        def visit(t: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, out = state  # [K, M], [K, M], [K, Dh, M]
            key_block = scorer.key_block(query_block, key_blocks[t])
            scores = scorer.scores(query, keys[key_block], query_block, key_block, t < full, precision)[0]
            new_top = jnp.maximum(top, scores.max(1))
            weights = jnp.exp(scores - new_top[:, None])
            shrink = jnp.exp(top - new_top)
            weighted = _matmul("kds,ksm->kdm", values[key_block], weights.astype(v.dtype), precision)
            return new_top, total * shrink + weights.sum(1), out * shrink[:, None] + weighted

        heads, stacked, width = query.shape
        zeros = jnp.zeros((heads, stacked))
        start = (zeros + _FLOOR, zeros, jnp.zeros((heads, width, stacked)))
        top, total, out = jax.lax.fori_loop(0, count, visit, start)
        sees_any = total > 0
        total = jnp.where(sees_any, total, 1.0)
        out = out / total[:, None]  # zeros for a query that sees nothing
        lse = jnp.where(sees_any, top + jnp.log(total), 0.0)
        return None, (_unstack_heads(out, scorer.groups).astype(q.dtype), lse)

    _, (out, lse) = jax.lax.scan(one_query_block, None, (jnp.arange(len(queries)), queries, *_one_list(live)))
    out = checkpoint_name(out.reshape(q.shape), SAVED_ATTENTION)
    lse = checkpoint_name(lse, SAVED_ATTENTION)
    return out, (q, k, v, ends, positions, live, out, lse)


def _backward(rule: ScoreRule, saved: tuple[Any, ...], dout: Array) -> tuple[Array | None, ...]:
    q, k, v, ends, positions, live, out, lse = saved
    keys, transposed_keys, values = _key_blocks(k), _transposed_key_blocks(k), _key_blocks(v)
    queries, douts, outs = (_query_blocks(x, k.shape[2]) for x in (q, dout, out))
    scorer = _BlockScores(rule, ends, positions, queries.shape[3])
    precision = matmul_precision(q.dtype)

    def one_query_block(gradients: tuple[Array, Array], inputs: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        query_block, query, block_dout, block_out, block_lse, key_blocks, count, full = inputs
        query, block_dout, block_out = (_stack_heads(x) for x in (query, block_dout, block_out))
        # sum_s weights[s] * dweights[s] equals dout . out (FlashAttention-2, section 3.1.1).
        delta = (block_dout.astype(jnp.float32) * block_out.astype(jnp.float32)).sum(-1)

        def visit(t: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dquery, dkeys, dvalues = state
            key_block = scorer.key_block(query_block, key_blocks[t])
            scores, slope = scorer.scores(query, keys[key_block], query_block, key_block, t < full, precision)
            weights = jnp.exp(scores - block_lse[:, None])
            dweights = _matmul("ksd,kmd->ksm", values[key_block], block_dout, precision)
            dscores = (weights * (dweights - delta[:, None]) * slope).astype(q.dtype)
            dquery += _matmul("kds,ksm->kdm", transposed_keys[key_block], dscores, precision)
            dkeys = _add_block(dkeys, key_block, _matmul("ksm,kmd->ksd", dscores, query, precision))
            dvalues = _add_block(
                dvalues, key_block, _matmul("ksm,kmd->ksd", weights.astype(q.dtype), block_dout, precision)
            )
            return dquery, dkeys, dvalues

        heads, stacked, width = query.shape
        state = (jnp.zeros((heads, width, stacked)), *gradients)
        dquery, dkeys, dvalues = jax.lax.fori_loop(0, count, visit, state)
        return (dkeys, dvalues), _unstack_heads(dquery, scorer.groups).astype(q.dtype)

    zeros = (jnp.zeros(keys.shape), jnp.zeros(values.shape))
    inputs = (jnp.arange(len(queries)), queries, douts, outs, lse, *_one_list(live))
    (dkeys, dvalues), dqueries = jax.lax.scan(one_query_block, zeros, inputs)
    dq = dqueries.reshape(q.shape)
    return dq, _join_keys(dkeys, k), _join_keys(dvalues, v), None, None, None


_attention.defvjp(_forward, _backward)


class _BlockScores:
    """Computes the scores of one query block against one key block, both given by their index in the list of all rows.

    Attributes:
        groups: query heads that share a key/value head.
    """

    def __init__(self, rule: ScoreRule, ends: Int[Array, "B Q S"], positions: Int[Array, "B Q S"], groups: int) -> None:
        self.rule = rule
        self.groups = groups
        self.blocks_per_row = ends.shape[1]
        self.ends = ends.reshape(-1, BLOCK)
        self.positions = positions.reshape(-1, BLOCK)

    def key_block(self, query_block: Array, block_of_row: Array) -> Array:
        """Returns the index in the list of a key block that is given by its index in the row of the query block."""
        return query_block // self.blocks_per_row * self.blocks_per_row + block_of_row

    def scores(
        self,
        query: Array,
        key: Array,
        query_block: Array,
        key_block: Array,
        full: Array,
        precision: jax.lax.Precision | None,
    ) -> tuple[Float[Array, "K S M"], Array | float]:
        """Returns float32 scores, capped and masked, and the derivative of a visible one by its bare product."""
        scores = self.rule.scale * _matmul("ksd,kmd->ksm", key, query, precision)
        slope: Array | float = self.rule.scale
        if self.rule.softcap is not None:
            tanh = jnp.tanh(scores / self.rule.softcap)
            scores, slope = self.rule.softcap * tanh, self.rule.scale * (1.0 - tanh**2)
        # The branches keep the mask out of the loop over scores, where comparing integers would cost more than the exp,
        # as would indexing a mask of single queries by stacked ones.
        ceiling = jax.lax.cond(
            full, lambda: jnp.full(scores.shape[1:], jnp.inf), lambda: self.ceiling(query_block, key_block)
        )
        return jnp.minimum(scores, ceiling), slope

    def ceiling(self, query_block: Array, key_block: Array) -> Float[Array, "S M"]:
        """Returns the largest score a key may have: infinity if it is visible, LOWEST if it is hidden."""
        return jnp.tile(jnp.where(self.visible(query_block, key_block), jnp.inf, LOWEST), (1, self.groups))

    def visible(self, query_block: Array, key_block: Array) -> Bool[Array, "S S"]:
        """Returns the mask of the two blocks, `[key, query]`."""
        offset = jnp.arange(BLOCK)
        query = (query_block % self.blocks_per_row * BLOCK + offset)[None, :]
        key = (key_block % self.blocks_per_row * BLOCK + offset)[:, None]
        key_end = self.ends[key_block][:, None]
        if self.rule.window is None:
            return visible_at(query, key, key_end)
        positions = self.positions[query_block][None, :], self.positions[key_block][:, None]
        return visible_at(query, key, key_end, *positions, self.rule.window)


def _matmul(subscripts: str, a: Array, b: Array, precision: jax.lax.Precision | None) -> Array:
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=jnp.float32)


def _add_block(blocks: Array, index: Array, block: Array) -> Array:
    # `.at[index].add` would compare the index with the bounds for every number added.
    old = jax.lax.dynamic_index_in_dim(blocks, index, keepdims=False)
    return jax.lax.dynamic_update_index_in_dim(blocks, old + block, index, 0)


def _one_list(live: LiveBlocks) -> LiveBlocks:
    """Joins the rows, so that query blocks are counted over the batch."""
    return LiveBlocks(*(x.reshape(-1, *x.shape[2:]) for x in live))


def _blocks(x: Int[Array, "*B L"]) -> Int[Array, "*B Q S"]:
    """Cuts the last axis into blocks. The last one is filled up with zeros, which as `key_end` are hidden keys."""
    padding = -x.shape[-1] % BLOCK
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)])
    return x.reshape(*x.shape[:-1], -1, BLOCK)


def _key_blocks(x: Float[Array, "B L K Dh"]) -> Float[Array, "N K S Dh"]:
    return x.reshape(-1, BLOCK, *x.shape[2:]).swapaxes(1, 2)


def _transposed_key_blocks(x: Float[Array, "B L K Dh"]) -> Float[Array, "N K Dh S"]:
    return x.reshape(-1, BLOCK, *x.shape[2:]).transpose(0, 2, 3, 1)


def _join_keys(blocks: Float[Array, "N K S Dh"], like: Array) -> Float[Array, "B L K Dh"]:
    return blocks.swapaxes(1, 2).reshape(like.shape).astype(like.dtype)


def _query_blocks(x: Float[Array, "B L H Dh"], heads: int) -> Float[Array, "N S K G Dh"]:
    return x.reshape(-1, BLOCK, heads, x.shape[2] // heads, x.shape[3])


def _stack_heads(x: Float[Array, "S K G Dh"]) -> Float[Array, "K M Dh"]:
    """Stacks query heads that share a key/value head under each other, so that one matmul serves them all."""
    return x.transpose(1, 2, 0, 3).reshape(x.shape[1], -1, x.shape[3])


def _unstack_heads(x: Float[Array, "K Dh M"], groups: int) -> Float[Array, "S K G Dh"]:
    return x.reshape(*x.shape[:2], groups, -1).transpose(3, 0, 2, 1)


BACKEND = Backend(prepare, attend, obstacle=runs_anywhere)
