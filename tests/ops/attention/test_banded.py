"""Tests of `banded` at chunks that are shorter than a row; test_attention.py has the claims of all backends."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_simpo.data.groups import GroupLengths
from jax_simpo.data.packing import make_step_plan
from jax_simpo.data.rows import build_rows
from jax_simpo.ops.attention import Room, attention, banded, prepare_mask
from jax_simpo.plan.hlo import loop_states
from tests.ops.attention.test_attention import inputs, layout, run
from tests.pairs import random_group


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(banded, "CHUNK", 32)


@given(
    seed=st.integers(0, 10**6),
    heads=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    rule=st.sampled_from([(None, None), (1, None), (20, 3.0)]),
    sharing=st.booleans(),
)
@settings(max_examples=4)
def test_values_and_gradients_are_those_of_dense(
    seed: int, heads: tuple[int, int], rule: tuple[int | None, float | None], sharing: bool
) -> None:
    batch, arrays = layout(seed, 3, 150, sharing=sharing), inputs(seed, 3, 150, *heads, 16)
    for a, b in zip(run(batch, *arrays, "dense", *rule), run(batch, *arrays, "banded", *rule), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@settings(max_examples=10)
@given(seed=st.integers(0, 10**6), sharing=st.booleans())
def test_no_token_of_a_plan_sees_further_than_its_span(seed: int, sharing: bool) -> None:
    rng = np.random.default_rng(seed)
    groups = [random_group(rng, longest=200) for _ in range(6)]
    plan = make_step_plan(
        GroupLengths.of(groups),
        global_batch_size=6,
        rows_per_micro_batch=1,
        row_length=None,
        max_row_length=4096,
        prefix_sharing=sharing,
        seed=0,
    )
    step = plan.step(0)
    rows = [[(int(p), groups[step.groups[p]]) for p in row] for row in step.rows]
    batch = build_rows(rows, plan.shape, prefix_sharing=sharing)
    assert (batch.key_end - np.arange(plan.shape.length)).max() <= plan.span
    assert batch.positions.max() < plan.longest


def test_a_span_that_is_too_small_gives_nan_not_wrong_numbers() -> None:
    batch, (q, k, v, _) = layout(7, 3, 160), inputs(7, 3, 160, 2, 2, 8)
    reach = (batch.key_end - np.arange(160)).max(axis=1)
    span = int(np.sort(reach)[1])  # enough for two of the rows
    mask = prepare_mask(jnp.array(batch.key_end), jnp.array(batch.positions), backend="banded", room=Room(9, 160, span))
    out = attention(q, k, v, mask, scale=0.3)
    oracle = run(batch, q, k, v, jnp.zeros_like(q), "dense")[0]
    too_far = reach > span
    assert too_far.sum() == 1
    assert np.isnan(out[too_far]).all()
    np.testing.assert_allclose(out[~too_far], oracle[~too_far], atol=2e-6)


def test_the_compiler_knows_how_often_the_loops_run_and_memory_is_linear_in_the_row_length() -> None:
    def compiled(length: int, backend: str):  # type: ignore[no-untyped-def]
        def total(q, k, v, key_end, positions):  # type: ignore[no-untyped-def]
            mask = prepare_mask(key_end, positions, backend=backend, room=Room(8, 64, 128))
            return attention(q, k, v, mask, scale=1.0).sum()

        integers = jax.ShapeDtypeStruct((2, length), jnp.int32)
        matrix = jax.ShapeDtypeStruct((2, length, 4, 32), jnp.float32)
        return jax.jit(jax.grad(total, (0, 1, 2))).lower(matrix, matrix, matrix, integers, integers).compile()

    programs = [compiled(length, "banded") for length in (1024, 2048)]
    assert [[times for times, _ in loop_states(p.as_text())] for p in programs] == [[32, 32], [64, 64]]
    short, long = (p.memory_analysis().temp_size_in_bytes for p in programs)
    assert long < 2.2 * short
