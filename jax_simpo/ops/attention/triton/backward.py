"""The backward kernels: dQ walks the live key blocks of a tile of queries, dK and dV the live query blocks of a tile of
keys, for all query heads of the group in turn. So every sum is made by one program, without atomic additions.

Both recompute the weights of a step from the log-sum-exp (FlashAttention-2, Dao 2023, arXiv 2307.08691). With s the
scaled and capped score and w = exp(s - lse), the gradient of s is w * (dout . v - delta), where delta = dout . out.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from jax_simpo.ops.attention.backends import ScoreRule
from jax_simpo.ops.attention.triton.scores import logits
from jax_simpo.ops.attention.triton.sizes import Tiles
from jax_simpo.ops.attention.triton.tile import (
    Index,
    QueryTiles,
    Ref,
    Walk,
    launch,
    masked,
    product,
    side_at,
)


class Inputs(NamedTuple):
    """The inputs of both kernels; `lse` is the forward's, base 2."""

    q: Float[Array, "B L H Dh"]
    k: Float[Array, "B L K Dh"]
    v: Float[Array, "B L K Dh"]
    dout: Float[Array, "B L H Dh"]
    lse: Float[Array, "B H L"]
    delta: Float[Array, "B H L"]
    key_end: Int[Array, "B L"]
    positions: Int[Array, "B L"]


def query_gradient(
    inputs: Inputs,
    key_blocks: Int[Array, "B Q Q"],
    key_counts: Int[Array, "B Q 2"],
    *,
    rule: ScoreRule,
    tiles: Tiles,
    interpret: bool,
) -> Float[Array, "B L H Dh"]:
    """Returns dQ."""
    q, k = inputs.q, inputs.k
    tile = QueryTiles(q.shape, k.shape[2], tiles)

    def kernel(*refs: Ref) -> None:
        q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, key_end_ref, positions_ref, blocks, counts, dq_ref = refs
        query, dout = tile.stack(q_ref[...]), tile.stack(dout_ref[...])
        lse, delta = tile.stack_vector(lse_ref[...]), tile.stack_vector(delta_ref[...])
        queries = tile.queries(positions_ref, rule)

        def step(start: Index, _: Index, dquery: jax.Array, mixed: bool) -> jax.Array:
            span = pl.ds(start, tiles.step)
            keys = k_ref[span, :]
            scores, slope = logits(product(query, keys, transpose_b=True), rule)
            if mixed:
                side = side_at(start, tiles.step, positions_ref, rule, key_end_ref)
                scores = masked(scores, queries, side, rule, query_axis=0)
            weights = jnp.exp2(scores - lse[:, None])
            dweights = product(dout, v_ref[span, :], transpose_b=True)
            gradient = _score_gradient(weights, dweights - delta[:, None], slope)
            return dquery + product(gradient.astype(keys.dtype), keys)

        zeros = jnp.zeros((tile.rows, q.shape[3]), jnp.float32)
        dquery = Walk.of(blocks, counts, tiles).each(step, zeros)
        dq_ref[...] = tile.unstack(dquery * rule.scale).astype(dq_ref.dtype)

    return launch(
        kernel,
        name="attention_dq",
        grid=tile.grid,
        inputs=[
            *[tile.matrix, tile.keys, tile.keys, tile.matrix, tile.vector, tile.vector],
            *[tile.row, tile.row, tile.blocks, tile.counts],
        ],
        outputs=[tile.matrix],
        shapes=[jax.ShapeDtypeStruct(q.shape, q.dtype)],
        tiles=tiles,
        interpret=interpret,
    )(*inputs, key_blocks, key_counts)[0]


def key_value_gradients(
    inputs: Inputs,
    query_blocks: Int[Array, "B Q Q"],
    query_counts: Int[Array, "B Q 2"],
    *,
    rule: ScoreRule,
    tiles: Tiles,
    interpret: bool,
) -> tuple[Float[Array, "B L K Dh"], Float[Array, "B L K Dh"]]:
    """Returns dK and dV."""
    rows, length, heads, width = inputs.q.shape
    kv_heads = inputs.k.shape[2]
    group, block = heads // kv_heads, tiles.block

    def kernel(*refs: Ref) -> None:
        q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, key_end_ref, positions_ref, blocks, counts = refs[:10]
        dk_ref, dv_ref = refs[10:]
        keys, values = k_ref[...], v_ref[...]
        side = side_at(pl.program_id(0) * block, block, positions_ref, rule, key_end_ref)

        def step(start: Index, head: Index, state: tuple[jax.Array, ...], mixed: bool) -> tuple[jax.Array, ...]:
            dkeys, dvalues = state
            span = pl.ds(start, tiles.step)
            query, dout = q_ref[span, head, :], dout_ref[span, head, :]
            # Keys by queries, so that weights and gradients are left operands, which stay in registers.
            scores, slope = logits(product(keys, query, transpose_b=True), rule)
            if mixed:
                queries = side_at(start, tiles.step, positions_ref, rule)
                scores = masked(scores, queries, side, rule, query_axis=1)
            weights = jnp.exp2(scores - lse_ref[head, span][None, :])
            dvalues += product(weights.astype(dout.dtype), dout)
            dweights = product(values, dout, transpose_b=True)
            gradient = _score_gradient(weights, dweights - delta_ref[head, span][None, :], slope)
            return dkeys + product(gradient.astype(query.dtype), query), dvalues

        zeros = jnp.zeros((block, width), jnp.float32)
        dkeys, dvalues = Walk.of(blocks, counts, tiles, heads=group).each(step, (zeros, zeros))
        dk_ref[...] = (dkeys * rule.scale).astype(dk_ref.dtype)
        dv_ref[...] = dvalues.astype(dv_ref.dtype)

    own = pl.BlockSpec((None, block, None, width), lambda tile, head, row: (row, tile, head, 0))
    of_group = pl.BlockSpec((None, length, group, width), lambda tile, head, row: (row, 0, head, 0))
    vectors = pl.BlockSpec((None, group, length), lambda tile, head, row: (row, head, 0))
    whole_row = pl.BlockSpec((None, length), lambda tile, head, row: (row, 0))
    blocks = pl.BlockSpec((None, None, length // block), lambda tile, head, row: (row, tile, 0))
    counts = pl.BlockSpec((None, None, 2), lambda tile, head, row: (row, tile, 0))
    dk, dv = launch(
        kernel,
        name="attention_dk_dv",
        grid=(length // block, kv_heads, rows),
        inputs=[of_group, own, own, of_group, vectors, vectors, whole_row, whole_row, blocks, counts],
        outputs=[own, own],
        shapes=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (inputs.k, inputs.v)],
        tiles=tiles,
        interpret=interpret,
    )(*inputs, query_blocks, query_counts)
    return dk, dv


def _score_gradient(weights: jax.Array, difference: jax.Array, slope: jax.Array | None) -> jax.Array:
    """Returns the gradient of the products q . k, without the factor `scale`; `difference` is dout . v - delta."""
    return weights * difference if slope is None else weights * difference * slope
