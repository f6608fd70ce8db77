"""Tests how rows are taken apart for cuDNN, and the numbers, which XLA computes in cuDNN's place on a CPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_simpo.data.groups import GroupLengths
from jax_simpo.data.packing import make_step_plan
from jax_simpo.data.rows import RowBatch, RowShape, build_rows
from jax_simpo.errors import ConfigError
from jax_simpo.models.policy import Forward
from jax_simpo.ops.attention import Room, attention, cudnn, prepare_mask
from tests.ops.attention.test_attention import inputs, layout, make_mask, run
from tests.pairs import make_pair, random_pairs
from tests.training.support import tiny_model

# The kernel itself computes in bfloat16 only; test_attention.py has that test.
ON_CPU = pytest.mark.skipif(jax.default_backend() != "cpu", reason="float32: with XLA in cuDNN's place, on a CPU only")


@ON_CPU
@given(
    seed=st.integers(0, 10**6),
    heads=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    window=st.sampled_from([None, 1, 20]),
    sharing=st.booleans(),
)
@settings(max_examples=5)
def test_values_and_gradients_are_those_of_dense(
    seed: int, heads: tuple[int, int], window: int | None, sharing: bool
) -> None:
    batch, arrays = layout(seed, 3, 160, sharing=sharing), inputs(seed, 3, 160, *heads, 16)
    oracle = run(batch, *arrays, "dense", window)
    for a, b in zip(oracle, run(batch, *arrays, "cudnn", window), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_every_response_becomes_one_sequence() -> None:
    # A shared prompt 1 2 3, then chosen 4 5, rejected 6; after them a pair whose rejected response is a part of its
    # chosen one. The last token of a response is never an input.
    pairs = [make_pair([1, 2, 3], [4, 5, 9], [6, 9]), make_pair([7], [8, 1, 9], [8, 9])]
    batch = build_rows([list(enumerate(pairs))], RowShape(12, 12, 4), prefix_sharing=True)
    sequences = cudnn.take_apart(jnp.array(batch.key_end), jnp.array(batch.positions), Room(4, 5, 5))
    tokens = [
        batch.tokens[0, sequences.token[0, n, :length]].tolist()
        for n, length in enumerate(sequences.length[0].tolist())
        if length > 0
    ]
    assert tokens == [[1, 2, 3, 4, 5], [1, 2, 3, 6], [7, 8, 1]]
    assert sequences.first[0, :9].tolist() == [0, 0, 0, 0, 0, 1, 2, 2, 2]


@ON_CPU
@pytest.mark.parametrize("room", [Room(1, 160, 160), Room(9, 30, 160)])
def test_room_that_is_too_small_gives_nan_not_wrong_numbers(room: Room) -> None:
    batch, (q, k, v, _) = layout(7, 2, 160), inputs(7, 2, 160, 2, 2, 8)
    key_end, positions = jnp.array(batch.key_end), jnp.array(batch.positions)

    @jax.jit
    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        mask = prepare_mask(key_end, positions, backend="cudnn", room=room, interpret=True)
        return attention(q, k, v, mask, scale=0.3)

    out = attend(q, k, v)
    oracle = run(batch, q, k, v, jnp.zeros_like(q), "dense")[0]
    lost = np.isnan(out).any((2, 3))
    assert lost.any()
    np.testing.assert_allclose(out[~lost], oracle[~lost], atol=2e-6)


def test_slots_are_as_long_as_the_longest_response_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = random_pairs(np.random.default_rng(0), 40, 9, prompt=(50, 90), response=(20, 60))
    lengths = GroupLengths.of(pairs)
    plan = make_step_plan(
        lengths, global_batch_size=40, rows_per_micro_batch=2, row_length=1024, max_row_length=1024, seed=0
    )
    assert lengths.inputs.max() <= plan.longest == 256
    shapes = []

    def record(q: jax.Array, k: jax.Array, v: jax.Array, **settings: object) -> jax.Array:
        shapes.append(q.shape[:2])
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    forward, rows = Forward(tiny_model(), "cudnn"), RowBatch.empty(2, plan.shape).arrays()
    for forward_pass in (forward, forward.up_to(plan.longest, plan.span)):
        jax.eval_shape(forward_pass.response_logps, forward.model.abstract, rows)
    slots = 2 * plan.shape.responses
    assert set(shapes) == {(slots, 1024), (slots, 256)}


def test_soft_caps_are_refused() -> None:
    batch, (q, k, v, _) = layout(8, 1, 64), inputs(8, 1, 64, 2, 2, 8)
    mask = make_mask(batch, (None,), "cudnn")
    with pytest.raises(ConfigError, match="`attention: cudnn` cannot cap attention scores"):
        attention(q, k, v, mask, scale=0.3, softcap=3.0)


def test_the_room_for_sequences_must_be_told() -> None:
    ints = jnp.zeros((1, 8), jnp.int32)
    with pytest.raises(ValueError, match="must be told `room`"):
        prepare_mask(ints, ints, backend="cudnn")
