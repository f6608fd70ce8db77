"""The forward kernel: online softmax over the live key blocks of a tile of queries.

The algorithm is FlashAttention-2's (Dao 2023, arXiv 2307.08691). A tile holds the same queries of several heads that
read one key/value head: each key and value is then loaded once for all of them, while blocks stay small.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from jax_simpo.ops.attention.backends import ScoreRule
from jax_simpo.ops.attention.triton.scores import logits
from jax_simpo.ops.attention.triton.sizes import Tiles
from jax_simpo.ops.attention.triton.tile import Index, QueryTiles, Ref, Walk, launch, masked, product, side_at
from jax_simpo.ops.numerics import LOWEST


def forward(
    q: Float[Array, "B L H Dh"],
    k: Float[Array, "B L K Dh"],
    v: Float[Array, "B L K Dh"],
    key_end: Int[Array, "B L"],
    positions: Int[Array, "B L"],
    key_blocks: Int[Array, "B Q Q"],
    key_counts: Int[Array, "B Q 2"],
    *,
    rule: ScoreRule,
    tiles: Tiles,
    interpret: bool,
) -> tuple[Float[Array, "B L H Dh"], Float[Array, "B H L"]]:
    """Returns the output and the base-2 log-sum-exp of every query, float32; both 0 where a query sees nothing."""
    rows, length, heads, width = q.shape
    tile = QueryTiles(q.shape, k.shape[2], tiles)

    def kernel(*refs: Ref) -> None:
        q_ref, k_ref, v_ref, key_end_ref, positions_ref, blocks, counts, out_ref, lse_ref = refs
        query = tile.stack(q_ref[...])
        queries = tile.queries(positions_ref, rule)

        def step(start: Index, _: Index, state: tuple[jax.Array, ...], mixed: bool) -> tuple[jax.Array, ...]:
            total, top, out = state
            span = pl.ds(start, tiles.step)
            scores, _ = logits(product(query, k_ref[span, :], transpose_b=True), rule)
            if mixed:
                keys = side_at(start, tiles.step, positions_ref, rule, key_end_ref)
                scores = masked(scores, queries, keys, rule, query_axis=0)
            new_top = jnp.maximum(top, scores.max(axis=1))
            shrink = jnp.exp2(top - new_top)
            weights = jnp.exp2(scores - new_top[:, None])
            total = total * shrink + weights.sum(axis=1)
            weighted = product(weights.astype(v_ref.dtype), v_ref[span, :])
            return total, new_top, out * shrink[:, None] + weighted

        zeros = jnp.zeros((tile.rows,), jnp.float32)
        state = (zeros, zeros + LOWEST, jnp.zeros((tile.rows, width), jnp.float32))
        total, top, out = Walk.of(blocks, counts, tiles).each(step, state)
        sees_any = total > 0.0
        total = jnp.where(sees_any, total, 1.0)
        out_ref[...] = tile.unstack(out / total[:, None]).astype(out_ref.dtype)
        lse_ref[...] = tile.unstack_vector(jnp.where(sees_any, top + jnp.log2(total), 0.0))

    return launch(
        kernel,
        name="attention_forward",
        grid=tile.grid,
        inputs=[tile.matrix, tile.keys, tile.keys, tile.row, tile.row, tile.blocks, tile.counts],
        outputs=[tile.matrix, tile.vector],
        shapes=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((rows, heads, length), jnp.float32),
        ],
        tiles=tiles,
        interpret=interpret,
    )(q, k, v, key_end, positions, key_blocks, key_counts)
