"""The forward kernel: online softmax over the live key blocks of a tile of queries.

The algorithm is FlashAttention-2's (Dao 2023, arXiv 2307.08691), its work divided among warpgroups as in
FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608). Scores are multiplied by log2(e), so that the exponential is one
instruction.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from jax_simpo.ops.attention.backends import ScoreRule
from jax_simpo.ops.attention.pallas import warpgroup as wg
from jax_simpo.ops.attention.pallas.warpgroup import Index, Ref, Side, Tiles, Walk
from jax_simpo.ops.attention.scores import logits
from jax_simpo.ops.numerics import LOWEST


def forward(
    q: Float[Array, "B L H parts Dh"],
    k: Float[Array, "B L K parts Dh"],
    v: Float[Array, "B L K parts Dh"],
    key_end: Int[Array, "B L"],
    positions: Int[Array, "B L"],
    key_blocks: Int[Array, "B Q Q"],
    key_counts: Int[Array, "B Q 2"],
    *,
    rule: ScoreRule,
    tiles: Tiles,
    interpret: bool,
) -> tuple[Float[Array, "B L H parts Dh"], Float[Array, "B H L"]]:
    """Returns the output and the base-2 log-sum-exp of every query, float32; both 0 where a query sees nothing.

    Matrices are bfloat16, given by their parts (`warpgroup.split`); L is a multiple of `tiles.block`.
    """
    rows, length, heads, parts, width = q.shape
    group = heads // k.shape[2]
    windowed = rule.window is not None

    def grid_place(blocks: Ref, counts: Ref) -> tuple[Index, Index, Index, Walk]:
        row, head, tile = lax.axis_index("row"), lax.axis_index("head"), lax.axis_index("tile")
        return row, head, tile * tiles.block, Walk.of(blocks, counts, row, tile, tiles)

    def compute(worker: Index, *refs: Ref) -> None:
        q_ref, _, _, _, positions_ref, blocks, counts, out_ref, lse_ref, resident, key_ring, value_ring = refs
        row, head, start, walk = grid_place(blocks, counts)
        start += worker * tiles.rows
        span = pl.ds(start, tiles.rows)
        query_parts = [q_ref.at[row, span, head, part] for part in range(parts)]
        (query,), query_positions = resident.receive(worker, [*query_parts, *[positions_ref.at[row, span]][:windowed]])

        def step(t: Index, slot: Index, state: tuple[jax.Array, ...], mixed: bool) -> tuple[jax.Array, ...]:
            total, top, out = state
            key_start = walk.place(t)[0] if mixed else 0  # loaded before the wait, so that it has arrived after it
            plgpu.barrier_wait(key_ring.ready.at[slot])
            (product,) = wg.products([(query, key_ring.parts(slot))], interpret)
            scores, _ = logits(product, rule)
            if mixed:
                vectors = [vector[slot] for vector in key_ring.vectors]
                keys = Side(key_start, 1, vectors[1:], vectors[0])
                scores = wg.masked(scores, Side(start, 0, query_positions), keys, rule)
            key_ring.release(slot, interpret)
            new_top = jnp.maximum(top, scores.max(axis=1))
            shrink = jnp.exp2(top - new_top)
            weights = jnp.exp2(scores - wg.along(new_top, scores.shape, 0))
            total = total * shrink + weights.sum(axis=1)
            out = out * wg.along(shrink, out.shape, 0)
            plgpu.barrier_wait(value_ring.ready.at[slot])
            (out,) = wg.accumulate([out], [(weights, value_ring.parts(slot))], interpret)
            value_ring.release(slot, interpret)
            return total, new_top, out

        zeros = jnp.zeros((tiles.rows,), jnp.float32)
        begin = (zeros, zeros + LOWEST, jnp.zeros((tiles.rows, width), jnp.float32))
        total, top, out = walk.each(step, begin)
        sees_any = total > 0.0
        total = jnp.where(sees_any, total, 1.0)
        lse_ref[row, head, span] = jnp.where(sees_any, top + jnp.log2(total), 0.0)
        out = out * wg.along(1.0 / total, out.shape, 0)
        resident.send(worker, [out], [[out_ref.at[row, span, head, part] for part in range(parts)]])

    def fetch(*refs: Ref) -> None:
        _, k_ref, v_ref, key_end_ref, positions_ref, blocks, counts, _, _, _, key_ring, value_ring = refs
        row, head, _, walk = grid_place(blocks, counts)
        kv_head = lax.div(head, jnp.int32(group))

        def sources(start: Index, _: Index) -> list[list[Ref]]:
            span = pl.ds(start, tiles.step)
            key_vectors = [key_end_ref.at[row, span], positions_ref.at[row, span]][: 1 + windowed]
            return [
                [*(k_ref.at[row, span, kv_head, part] for part in range(parts)), *key_vectors],
                [v_ref.at[row, span, kv_head, part] for part in range(parts)],
            ]

        walk.fetch([key_ring, value_ring], sources)

    out, lse = wg.launch(
        compute,
        fetch,
        name="attention_forward",
        outputs=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((rows, heads, length), jnp.float32),
        ],
        grid={"head": heads, "tile": length // tiles.block, "row": rows},
        scratch=[
            wg.resident_scratch(tiles, parts, width, 1, [jnp.int32][:windowed]),
            wg.ring_scratch(tiles, parts, width, [jnp.int32] * (1 + windowed)),
            wg.ring_scratch(tiles, parts, width),
        ],
        tiles=tiles,
        interpret=interpret,
    )(q, k, v, key_end, positions, key_blocks, key_counts)
    return out, lse
