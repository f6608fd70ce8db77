"""The backward kernels: dQ walks the live key blocks of a tile of queries, dK and dV the live query blocks of a tile of
keys, for all query heads of the group in turn.

Both recompute the weights of a step from the log-sum-exp (FlashAttention-2, Dao 2023, arXiv 2307.08691). With s the
scaled and capped score and w = exp(s - lse), the gradient of s is w * (dout . v - delta), where delta = dout . out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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


class Inputs(NamedTuple):
    """The inputs of both kernels. Matrices are bfloat16, given by their parts; `lse` is the forward's, base 2."""

    q: Float[Array, "B L H parts Dh"]
    k: Float[Array, "B L K parts Dh"]
    v: Float[Array, "B L K parts Dh"]
    dout: Float[Array, "B L H parts Dh"]
    lse: Float[Array, "B H L"]
    delta: Float[Array, "B H L"]
    key_end: Int[Array, "B L"]
    positions: Int[Array, "B L"]


def _score_gradient(
    weights: jax.Array, dweights: jax.Array, delta: jax.Array, slope: jax.Array | None, axis: int
) -> jax.Array:
    """Returns the gradient of the products q . k, without the factor `scale`; `delta` lies along `axis`."""
    gradient = weights * (dweights - wg.along(delta, weights.shape, axis))
    return gradient if slope is None else gradient * slope


def query_gradient(
    inputs: Inputs,
    key_blocks: Int[Array, "B Q Q"],
    key_counts: Int[Array, "B Q 2"],
    *,
    rule: ScoreRule,
    tiles: Tiles,
    interpret: bool,
) -> Float[Array, "B L H parts Dh"]:
    """Returns dQ, by its parts."""
    rows, length, heads, parts, width = inputs.q.shape
    group = heads // inputs.k.shape[2]
    windowed = rule.window is not None

    def grid_place(blocks: Ref, counts: Ref) -> tuple[Index, Index, Index, Walk]:
        row, head, tile = lax.axis_index("row"), lax.axis_index("head"), lax.axis_index("tile")
        return row, head, tile * tiles.block, Walk.of(blocks, counts, row, tile, tiles)

    def compute(worker: Index, *refs: Ref) -> None:
        q_ref, _, _, dout_ref, lse_ref, delta_ref, _, positions_ref, blocks, counts, dq_ref = refs[:11]
        resident, key_ring, value_ring = refs[11:]
        row, head, start, walk = grid_place(blocks, counts)
        start += worker * tiles.rows
        span = pl.ds(start, tiles.rows)
        matrices = [ref.at[row, span, head, part] for ref in (q_ref, dout_ref) for part in range(parts)]
        vectors = [lse_ref.at[row, head, span], delta_ref.at[row, head, span], positions_ref.at[row, span]]
        sources = [*matrices, *vectors[: 2 + windowed]]
        (query, dout), (query_lse, query_delta, *query_positions) = resident.receive(worker, sources)

        def step(t: Index, slot: Index, dquery: jax.Array, mixed: bool) -> jax.Array:
            key_start = walk.place(t)[0] if mixed else 0
            plgpu.barrier_wait(key_ring.ready.at[slot])
            plgpu.barrier_wait(value_ring.ready.at[slot])
            key_parts = key_ring.parts(slot)
            pairs = [(query, key_parts), (dout, value_ring.parts(slot))]
            product, dweights = wg.products(pairs, interpret)
            value_ring.release(slot, interpret)
            scores, slope = logits(product, rule)
            if mixed:
                vectors = [vector[slot] for vector in key_ring.vectors]
                keys = Side(key_start, 1, vectors[1:], vectors[0])
                scores = wg.masked(scores, Side(start, 0, query_positions), keys, rule)
            weights = jnp.exp2(scores - wg.along(query_lse, scores.shape, 0))
            gradient = _score_gradient(weights, dweights, query_delta, slope, 0)
            (dquery,) = wg.accumulate([dquery], [(gradient, key_parts)], interpret)
            key_ring.release(slot, interpret)
            return dquery

        dquery = walk.each(step, jnp.zeros((tiles.rows, width), jnp.float32))
        resident.send(worker, [dquery * rule.scale], [[dq_ref.at[row, span, head, part] for part in range(parts)]])

    def fetch(*refs: Ref) -> None:
        _, k_ref, v_ref, _, _, _, key_end_ref, positions_ref, blocks, counts, _, _, key_ring, value_ring = refs
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

    return wg.launch(
        compute,
        fetch,
        name="attention_dq",
        outputs=[jax.ShapeDtypeStruct(inputs.q.shape, inputs.q.dtype)],
        grid={"head": heads, "tile": length // tiles.block, "row": rows},
        scratch=[
            wg.resident_scratch(tiles, parts, width, 2, [jnp.float32, jnp.float32, jnp.int32][: 2 + windowed]),
            wg.ring_scratch(tiles, parts, width, [jnp.int32] * (1 + windowed)),
            wg.ring_scratch(tiles, parts, width),
        ],
        tiles=tiles,
        interpret=interpret,
    )(*inputs, key_blocks, key_counts)[0]


def key_value_gradients(
    inputs: Inputs,
    query_blocks: Int[Array, "B Q Q"],
    query_counts: Int[Array, "B Q 2"],
    *,
    wanted: Sequence[str],
    rule: ScoreRule,
    tiles: Tiles,
    interpret: bool,
) -> list[Float[Array, "B L K parts Dh"]]:
    """Returns those of dK and dV that are `wanted` ("dk", "dv"), in that order, by their parts.

    For wide heads the two accumulators do not fit into the registers together: call it for one at a time.
    """
    rows, length, heads, parts, width = inputs.q.shape
    kv_heads = inputs.k.shape[2]
    group = heads // kv_heads
    windowed = rule.window is not None
    with_dk = "dk" in wanted
    matrix_count = 1 + with_dk  # dV alone needs no values
    count = len(inputs) + 2

    def grid_place(blocks: Ref, counts: Ref) -> tuple[Index, Index, Index, Walk]:
        row, head, tile = lax.axis_index("row"), lax.axis_index("head"), lax.axis_index("tile")
        return row, head, tile * tiles.block, Walk.of(blocks, counts, row, tile, tiles, heads=group)

    def compute(worker: Index, *refs: Ref) -> None:
        _, k_ref, v_ref, _, _, _, key_end_ref, positions_ref, blocks, counts = refs[:count]
        outputs = refs[count : count + len(wanted)]
        resident, query_ring, dout_ring = refs[count + len(wanted) :]
        row, head, start, walk = grid_place(blocks, counts)
        start += worker * tiles.rows
        span = pl.ds(start, tiles.rows)
        matrices = [ref.at[row, span, head, part] for ref in (k_ref, v_ref)[:matrix_count] for part in range(parts)]
        vectors = [key_end_ref.at[row, span], positions_ref.at[row, span]]
        keys_values, (key_ends, *key_positions) = resident.receive(worker, [*matrices, *vectors[: 1 + windowed]])

        def step(t: Index, slot: Index, state: dict[str, jax.Array], mixed: bool) -> dict[str, jax.Array]:
            query_start = walk.place(t)[0] if mixed else 0
            plgpu.barrier_wait(query_ring.ready.at[slot])
            plgpu.barrier_wait(dout_ring.ready.at[slot])
            query_parts, dout_parts = query_ring.parts(slot), dout_ring.parts(slot)
            # Scores lie keys by queries here, so that weights can be the left operand of a product.
            product, *dweights = wg.products(list(zip(keys_values, [query_parts, dout_parts], strict=False)), interpret)
            scores, slope = logits(product, rule)
            if mixed:
                queries = Side(query_start, 1, [vector[slot] for vector in query_ring.vectors[1:]])
                scores = wg.masked(scores, queries, Side(start, 0, key_positions, key_ends), rule)
            weights = jnp.exp2(scores - wg.along(query_ring.vectors[0][slot], scores.shape, 1))
            pairs = {"dv": (weights, dout_parts)}
            if with_dk:
                pairs["dk"] = (
                    _score_gradient(weights, dweights[0], dout_ring.vectors[0][slot], slope, 1),
                    query_parts,
                )
            totals = wg.accumulate([state[name] for name in wanted], [pairs[name] for name in wanted], interpret)
            query_ring.release(slot, interpret)
            dout_ring.release(slot, interpret)
            return dict(zip(wanted, totals, strict=True))

        totals = walk.each(step, {name: jnp.zeros((tiles.rows, width), jnp.float32) for name in wanted})
        results = [totals[name] * rule.scale if name == "dk" else totals[name] for name in wanted]
        resident.send(worker, results, [[ref.at[row, span, head, part] for part in range(parts)] for ref in outputs])

    def fetch(*refs: Ref) -> None:
        q_ref, _, _, dout_ref, lse_ref, delta_ref, _, positions_ref, blocks, counts = refs[:count]
        query_ring, dout_ring = refs[-2:]
        row, head, _, walk = grid_place(blocks, counts)

        def sources(start: Index, member: Index) -> list[list[Ref]]:
            span, query_head = pl.ds(start, tiles.step), head * group + member
            query_vectors = [lse_ref.at[row, query_head, span], positions_ref.at[row, span]][: 1 + windowed]
            dout_vectors = [delta_ref.at[row, query_head, span]][:with_dk]
            return [
                [*(q_ref.at[row, span, query_head, part] for part in range(parts)), *query_vectors],
                [*(dout_ref.at[row, span, query_head, part] for part in range(parts)), *dout_vectors],
            ]

        walk.fetch([query_ring, dout_ring], sources)

    return wg.launch(
        compute,
        fetch,
        name="_".join(["attention", *wanted]),
        outputs=[jax.ShapeDtypeStruct(inputs.k.shape, inputs.k.dtype)] * len(wanted),
        grid={"head": kv_heads, "tile": length // tiles.block, "row": rows},
        scratch=[
            wg.resident_scratch(tiles, parts, width, matrix_count, [jnp.int32] * (1 + windowed)),
            wg.ring_scratch(tiles, parts, width, [jnp.float32, jnp.int32][: 1 + windowed]),
            wg.ring_scratch(tiles, parts, width, [jnp.float32][:with_dk]),
        ],
        tiles=tiles,
        interpret=interpret,
    )(*inputs, query_blocks, query_counts)
