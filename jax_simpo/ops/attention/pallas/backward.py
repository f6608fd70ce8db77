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
from jax_simpo.ops.attention.blocks import BlockLists
from jax_simpo.ops.attention.pallas import warpgroup as wg
from jax_simpo.ops.attention.pallas.switches import Switches
from jax_simpo.ops.attention.pallas.warpgroup import Index, Ref, Tiles, Walk


class Inputs(NamedTuple):
    """The inputs of both kernels. Matrices are bfloat16, given by their parts."""

    q: Float[Array, "B L H parts Dh"]
    k: Float[Array, "B L K parts Dh"]
    v: Float[Array, "B L K parts Dh"]
    dout: Float[Array, "B L H parts Dh"]
    statistics: Float[Array, "B H 2 L"]  # the forward's log-sum-exp, base 2, and delta
    queries: Int[Array, "B n L"]  # of `warpgroup.mask_vectors`
    keys: Int[Array, "B n L"]


def _score_gradient(
    weights: jax.Array, dweights: jax.Array, delta: jax.Array, slope: jax.Array | None, axis: int
) -> jax.Array:
    """Returns the gradient of the products q . k, without the factor `scale`; `delta` lies along `axis`."""
    gradient = weights * (dweights - wg.along(delta, weights.shape, axis))
    return gradient if slope is None else gradient * slope


def query_gradient(
    inputs: Inputs, lists: BlockLists, *, rule: ScoreRule, tiles: Tiles, switches: Switches, interpret: bool
) -> Float[Array, "B L H parts Dh"]:
    """Returns dQ, by its parts; `lists` are those of tiles of queries."""
    rows, length, heads, parts, width = inputs.q.shape
    group = heads // inputs.k.shape[2]
    vectors, factor = inputs.keys.shape[1], wg.exponent_factor(rule)

    def grid_place(lists: Sequence[Ref]) -> tuple[Index, Index, Walk]:
        row, head = lax.axis_index("row"), lax.axis_index("head")
        return row, head, Walk.of(lists, row, lax.axis_index("tile"), tiles)

    def compute(worker: Index, *refs: Ref) -> None:
        q_ref, _, _, dout_ref, statistics_ref, queries_ref, _, *lists, dq_ref = refs[:-3]
        resident, key_ring, value_ring = refs[-3:]
        row, head, walk = grid_place(lists)
        span = walk.rows_of(worker)
        matrices = [ref.at[row, span, head, part] for ref in (q_ref, dout_ref) for part in range(parts)]
        query, dout = resident.receive(worker, matrices)
        query_lse, query_delta = (wg.load(statistics_ref.at[row, head, n, span], interpret) for n in range(2))
        query_vectors = [wg.load(queries_ref.at[row, n, span], interpret) for n in range(vectors)]

        def step(t: Index, dquery: jax.Array, mixed: bool) -> jax.Array:
            slot, value_slot = walk.slot(t, key_ring), walk.slot(t, value_ring)
            key_start = walk.start(t)[0] if mixed else 0
            plgpu.barrier_wait(key_ring.ready.at[slot])
            plgpu.barrier_wait(value_ring.ready.at[value_slot])
            key_parts = key_ring.parts(slot)
            pairs = [(query, key_parts), (dout, value_ring.parts(value_slot))]
            product, dweights = wg.products(pairs, interpret)
            value_ring.release(value_slot, interpret)
            scores, slope = wg.capped(product, rule)
            exponents = scores * factor - wg.along(query_lse, scores.shape, 0)
            if mixed:
                key = wg.indices(key_start, tiles.step)
                exponents = wg.Hide(query_vectors, key, key_ring.read(slot), 0)(exponents)
            weights = jnp.exp2(exponents)
            gradient = _score_gradient(weights, dweights, query_delta, slope, 0)
            (dquery,) = wg.accumulate([dquery], [(wg.split(gradient, parts), key_parts)], interpret)
            key_ring.release(slot, interpret)
            return dquery

        dquery = walk.each(step, jnp.zeros((tiles.rows, width), jnp.float32))
        resident.send(worker, [dquery * rule.scale], [[dq_ref.at[row, span, head, part] for part in range(parts)]])

    def fetch(*refs: Ref) -> None:
        _, k_ref, v_ref, _, _, _, keys_ref, *lists, _, _, key_ring, value_ring = refs
        row, head, walk = grid_place(lists)
        kv_head = lax.div(head, jnp.int32(group))

        def sources(start: Index, _: Index) -> list[list[Ref]]:
            span = pl.ds(start, tiles.step)
            return [
                [*(k_ref.at[row, span, kv_head, part] for part in range(parts)), keys_ref.at[row, :, span]],
                [v_ref.at[row, span, kv_head, part] for part in range(parts)],
            ]

        walk.fetch([key_ring, value_ring], sources)

    return wg.launch(
        compute,
        fetch,
        name="attention_dq",
        outputs=[jax.ShapeDtypeStruct(inputs.q.shape, inputs.q.dtype)],
        places=(rows, heads, length // tiles.tile),
        scratch=[
            wg.resident_scratch(tiles, parts, width, 2),
            wg.ring_scratch(tiles, 0, parts, width, [(vectors, jnp.int32)]),
            wg.ring_scratch(tiles, 1, parts, width),
        ],
        tiles=tiles,
        switches=switches,
        interpret=interpret,
    )(*inputs, *lists)[0]


def key_value_gradients(
    inputs: Inputs,
    lists: BlockLists,
    *,
    wanted: Sequence[str],
    rule: ScoreRule,
    tiles: Tiles,
    switches: Switches,
    interpret: bool,
) -> list[Float[Array, "B L K parts Dh"]]:
    """Returns those of dK and dV that are `wanted` ("dk", "dv"), in that order, by their parts.

    `lists` are those of tiles of keys. For wide heads the two accumulators do not fit into the registers together: call
    it for one at a time.
    """
    rows, length, heads, parts, width = inputs.q.shape
    kv_heads = inputs.k.shape[2]
    group = heads // kv_heads
    vectors, factor = inputs.keys.shape[1], wg.exponent_factor(rule)
    with_dk, with_dv = "dk" in wanted, "dv" in wanted
    matrix_count = 1 + with_dk  # dV alone needs no values
    count = len(inputs) + len(lists)

    def grid_place(lists: Sequence[Ref]) -> tuple[Index, Index, Walk]:
        row, head = lax.axis_index("row"), lax.axis_index("head")
        return row, head, Walk.of(lists, row, lax.axis_index("tile"), tiles, heads=group)

    def compute(worker: Index, *refs: Ref) -> None:
        _, k_ref, v_ref, _, _, _, keys_ref, *lists = refs[:count]
        outputs = refs[count : count + len(wanted)]
        resident, query_ring, dout_ring = refs[count + len(wanted) :]
        row, head, walk = grid_place(lists)
        span = walk.rows_of(worker)
        matrices = [ref.at[row, span, head, part] for ref in (k_ref, v_ref)[:matrix_count] for part in range(parts)]
        keys_values = resident.receive(worker, matrices)
        key_vectors = [wg.load(keys_ref.at[row, n, span], interpret) for n in range(vectors)]
        key = wg.indices(span.start, tiles.rows)

        def step(t: Index, state: dict[str, jax.Array], mixed: bool) -> dict[str, jax.Array]:
            slot, dout_slot = walk.slot(t, query_ring), walk.slot(t, dout_ring)
            plgpu.barrier_wait(query_ring.ready.at[slot])
            plgpu.barrier_wait(dout_ring.ready.at[dout_slot])
            query_parts, dout_parts = query_ring.parts(slot), dout_ring.parts(dout_slot)
            # Scores lie keys by queries here, so that weights can be the left operand of a product.
            product, *dweights = wg.products(list(zip(keys_values, [query_parts, dout_parts], strict=False)), interpret)
            if not with_dv:
                dout_ring.release(dout_slot, interpret)
            query_lse, query_delta, *query_vectors = query_ring.read(slot)
            scores, slope = wg.capped(product, rule)
            exponents = scores * factor - wg.along(query_lse, scores.shape, 1)
            if mixed:
                exponents = wg.Hide(query_vectors, key, key_vectors, 1)(exponents)
            weights = jnp.exp2(exponents)
            pairs = {}
            if with_dv:
                pairs["dv"] = (wg.split(weights, parts), dout_parts)
            if with_dk:
                gradient = _score_gradient(weights, dweights[0], query_delta, slope, 1)
                pairs["dk"] = (wg.split(gradient, parts), query_parts)
            totals = wg.accumulate([state[name] for name in wanted], [pairs[name] for name in wanted], interpret)
            query_ring.release(slot, interpret)
            if with_dv:
                dout_ring.release(dout_slot, interpret)
            return dict(zip(wanted, totals, strict=True))

        totals = walk.each(step, {name: jnp.zeros((tiles.rows, width), jnp.float32) for name in wanted})
        results = [totals[name] * rule.scale if name == "dk" else totals[name] for name in wanted]
        resident.send(worker, results, [[ref.at[row, span, head, part] for part in range(parts)] for ref in outputs])

    def fetch(*refs: Ref) -> None:
        q_ref, _, _, dout_ref, statistics_ref, queries_ref, _, *lists = refs[:count]
        query_ring, dout_ring = refs[-2:]
        row, head, walk = grid_place(lists)

        def sources(start: Index, member: Index) -> list[list[Ref]]:
            span, query_head = pl.ds(start, tiles.step), head * group + member
            query_vectors = [statistics_ref.at[row, query_head, :, span], queries_ref.at[row, :, span]]
            return [
                [*(q_ref.at[row, span, query_head, part] for part in range(parts)), *query_vectors],
                [dout_ref.at[row, span, query_head, part] for part in range(parts)],
            ]

        walk.fetch([query_ring, dout_ring], sources)

    return wg.launch(
        compute,
        fetch,
        name="_".join(["attention", *wanted]),
        outputs=[jax.ShapeDtypeStruct(inputs.k.shape, inputs.k.dtype)] * len(wanted),
        places=(rows, kv_heads, length // tiles.tile),
        scratch=[
            wg.resident_scratch(tiles, parts, width, matrix_count),
            wg.ring_scratch(tiles, 0, parts, width, [(2, jnp.float32), (vectors, jnp.int32)]),
            wg.ring_scratch(tiles, 1, parts, width),
        ],
        tiles=tiles,
        switches=switches,
        interpret=interpret,
    )(*inputs, *lists)
