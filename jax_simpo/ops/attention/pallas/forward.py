"""The forward kernel: online softmax over the live key blocks of a tile of queries.

The algorithm is FlashAttention-2's (Dao 2023, arXiv 2307.08691), its work divided among warpgroups as in
FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608). Scores are multiplied by log2(e), so that the exponential is one
instruction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from jax_simpo.ops.attention.backends import ScoreRule
from jax_simpo.ops.attention.blocks import BlockLists
from jax_simpo.ops.attention.pallas import warpgroup as wg
from jax_simpo.ops.attention.pallas.switches import Switches
from jax_simpo.ops.attention.pallas.warpgroup import Index, Ref, Tiles, Walk
from jax_simpo.ops.numerics import LOWEST


def forward(
    q: Float[Array, "B L H parts Dh"],
    k: Float[Array, "B L K parts Dh"],
    v: Float[Array, "B L K parts Dh"],
    queries: Int[Array, "B n L"],
    keys: Int[Array, "B n L"],
    lists: BlockLists,
    *,
    rule: ScoreRule,
    tiles: Tiles,
    switches: Switches,
    interpret: bool,
) -> tuple[Float[Array, "B L H parts Dh"], Float[Array, "B H L"]]:
    """Returns the output and the base-2 log-sum-exp of every query, float32; both 0 where a query sees nothing.

    Matrices are bfloat16, given by their parts (`warpgroup.split`); `queries` and `keys` are of
    `warpgroup.mask_vectors`. L is a multiple of a tile's rows.
    """
    rows, length, heads, parts, width = q.shape
    group = heads // k.shape[2]
    vectors, factor = keys.shape[1], wg.exponent_factor(rule)

    def grid_place(lists: Sequence[Ref]) -> tuple[Index, Index, Walk]:
        row, head = lax.axis_index("row"), lax.axis_index("head")
        return row, head, Walk.of(lists, row, lax.axis_index("tile"), tiles)

    def compute(worker: Index, *refs: Ref) -> None:
        q_ref, _, _, queries_ref, _, *lists, out_ref, lse_ref, resident, key_ring, value_ring, barriers = refs
        row, head, walk = grid_place(lists)
        span = walk.rows_of(worker)
        (query,) = resident.receive(worker, [q_ref.at[row, span, head, part] for part in range(parts)])
        query_vectors = [wg.load(queries_ref.at[row, n, span], interpret) for n in range(vectors)]
        turns = wg.Turns(barriers, worker)

        def softmax(
            t: Index, product: jax.Array, total: jax.Array, top: jax.Array, mixed: bool, key_start: Index
        ) -> tuple[jax.Array, ...]:
            """Returns weights, their running sum, the running maximum, and by how much sums so far must shrink."""
            slot = walk.slot(t, key_ring)
            scores, _ = wg.capped(product, rule)
            if mixed:
                key = wg.indices(key_start, tiles.step)
                scores = wg.Hide(query_vectors, key, key_ring.read(slot), 0)(scores)
            key_ring.release(slot, interpret)
            new_top = jnp.maximum(top, scores.max(axis=1))
            shrink = jnp.exp2((top - new_top) * factor)
            weights = jnp.exp2(scores * factor - wg.along(new_top * factor, scores.shape, 0))
            return weights, total * shrink + weights.sum(axis=1), new_top, shrink

        def await_keys(t: Index) -> None:
            plgpu.barrier_wait(key_ring.ready.at[walk.slot(t, key_ring)])

        def scores_pair(t: Index) -> tuple[list[Ref], list[Ref]]:
            return query, key_ring.parts(walk.slot(t, key_ring))

        def values(t: Index) -> list[Ref]:
            slot = walk.slot(t, value_ring)
            plgpu.barrier_wait(value_ring.ready.at[slot])
            return value_ring.parts(slot)

        def step(t: Index, state: tuple[jax.Array, ...], mixed: bool) -> tuple[jax.Array, ...]:
            total, top, out = state
            key_start = walk.start(t)[0] if mixed else 0  # loaded before the wait, so that it has arrived after it
            await_keys(t)
            (product,) = wg.products([scores_pair(t)], interpret, turns.end)
            weights, total, top, shrink = softmax(t, product, total, top, mixed, key_start)
            out = out * wg.along(shrink, out.shape, 0)
            value_parts = values(t)
            turns.begin()
            (out,) = wg.accumulate([out], [(wg.split(weights, parts), value_parts)], interpret)
            value_ring.release(walk.slot(t, value_ring), interpret)
            return total, top, out

        # With `overlap`, a step computes the scores of its own keys and the product with the values of the step before.
        # Its state has the weights of that step in front, by their parts. It finds its keys loaded, and waits for those
        # of the next step.

        def softmax_then_await(t: Index, *arguments: Any) -> tuple[jax.Array, ...]:
            results = softmax(t, *arguments)
            pl.when(t + 1 < walk.live)(lambda: await_keys(t + 1))
            return results

        def first(state: tuple[Any, ...]) -> tuple[Any, ...]:
            _, total, top, out = state
            key_start = walk.start(0)[0]
            await_keys(0)
            turns.begin()
            (product,) = wg.products([scores_pair(0)], interpret, turns.end)
            weights, total, top, _ = softmax_then_await(0, product, total, top, True, key_start)
            return wg.split(weights, parts), total, top, out

        def step_beside(t: Index, state: tuple[Any, ...], mixed: bool) -> tuple[Any, ...]:
            weights, total, top, out = state
            key_start = walk.start(t)[0] if mixed else 0
            pair, value_parts = scores_pair(t), values(t - 1)
            turns.begin()
            (new_weights, total, top, shrink), out = wg.product_beside(
                pair,
                out,
                (weights, value_parts),
                lambda product: softmax_then_await(t, product, total, top, mixed, key_start),
                interpret,
                turns.end,
            )
            value_ring.release(walk.slot(t - 1, value_ring), interpret)
            return wg.split(new_weights, parts), total, top, out * wg.along(shrink, out.shape, 0)

        def last(state: tuple[Any, ...]) -> tuple[Any, ...]:
            weights, total, top, out = state
            value_parts = values(walk.live - 1)
            turns.begin()
            (out,) = wg.accumulate([out], [(weights, value_parts)], interpret)
            turns.end()
            value_ring.release(walk.slot(walk.live - 1, value_ring), interpret)
            return weights, total, top, out

        zeros = jnp.zeros((tiles.rows,), jnp.float32)
        total, top, out = zeros, zeros + LOWEST, jnp.zeros((tiles.rows, width), jnp.float32)
        turns.start()
        if switches.overlap:
            weights = wg.split(jnp.zeros((tiles.rows, tiles.step), jnp.float32), parts)
            state = walk.if_any(first, (weights, total, top, out))
            _, total, top, out = walk.if_any(last, walk.each(step_beside, state, begin=1))
        else:
            turns.begin()
            total, top, out = walk.each(step, (total, top, out))
            turns.end()
        turns.finish()
        sees_any = total > 0.0
        total = jnp.where(sees_any, total, 1.0)
        lse_ref[row, head, span] = jnp.where(sees_any, top * factor + jnp.log2(total), 0.0)
        out = out * wg.along(1.0 / total, out.shape, 0)
        resident.send(worker, [out], [[out_ref.at[row, span, head, part] for part in range(parts)]])

    def fetch(*refs: Ref) -> None:
        _, k_ref, v_ref, _, keys_ref, *lists, _, _, _, key_ring, value_ring, _ = refs
        row, head, walk = grid_place(lists)
        kv_head = lax.div(head, jnp.int32(group))

        def sources(start: Index, _: Index) -> list[list[Ref]]:
            span = pl.ds(start, tiles.step)
            return [
                [*(k_ref.at[row, span, kv_head, part] for part in range(parts)), keys_ref.at[row, :, span]],
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
        places=(rows, heads, length // tiles.tile),
        scratch=[
            wg.resident_scratch(tiles, parts, width, 1),
            wg.ring_scratch(tiles, 0, parts, width, [(vectors, jnp.int32)]),
            wg.ring_scratch(tiles, 1, parts, width),
            plgpu.Barrier(num_barriers=tiles.workers) if switches.ping_pong else None,
        ],
        tiles=tiles,
        switches=switches,
        interpret=interpret,
    )(q, k, v, queries, keys, *lists)
    return out, lse
