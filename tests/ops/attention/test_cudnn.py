"""Tests how rows are taken apart for cuDNN, and the numbers, which XLA computes in cuDNN's place on a CPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_simpo.data.rows import RowShape, build_rows
from jax_simpo.errors import ConfigError
from jax_simpo.ops.attention import Mask, attention, cudnn, prepare_mask
from jax_simpo.ops.attention.backends import ScoreRule
from tests.ops.attention.test_attention import inputs, layout, make_mask, run
from tests.pairs import make_pair

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
    sequences = cudnn.take_apart(jnp.array(batch.key_end), jnp.array(batch.positions), sequences=4)
    tokens = [
        batch.tokens[0, sequences.token[0, n, :length]].tolist()
        for n, length in enumerate(sequences.length[0].tolist())
        if length > 0
    ]
    assert tokens == [[1, 2, 3, 4, 5], [1, 2, 3, 6], [7, 8, 1]]
    assert sequences.first[0, :9].tolist() == [0, 0, 0, 0, 0, 1, 2, 2, 2]


@ON_CPU
@pytest.mark.parametrize("sizes", [{"sequences": 1}, {"sequences": 9, "longest": 30}])
def test_sizes_that_are_too_small_give_nan_not_wrong_numbers(sizes: dict[str, int]) -> None:
    batch, (q, k, v, _) = layout(7, 2, 160), inputs(7, 2, 160, 2, 2, 8)
    key_end, positions = jnp.array(batch.key_end), jnp.array(batch.positions)

    @jax.jit
    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        table = cudnn.take_apart(key_end, positions, **sizes)
        mask = Mask(key_end, positions, (table,), (None,), "cudnn", None, interpret=True)
        return cudnn.attend(q, k, v, mask, ScoreRule(0.3))

    out = attend(q, k, v)
    oracle = run(batch, q, k, v, jnp.zeros_like(q), "dense")[0]
    lost = np.isnan(out).any((2, 3))
    assert lost.any()
    np.testing.assert_allclose(out[~lost], oracle[~lost], atol=2e-6)


def test_soft_caps_are_refused() -> None:
    batch, (q, k, v, _) = layout(8, 1, 64), inputs(8, 1, 64, 2, 2, 8)
    mask = make_mask(batch, (None,), "cudnn")
    with pytest.raises(ConfigError, match="`attention: cudnn` cannot cap attention scores"):
        attention(q, k, v, mask, scale=0.3, softcap=3.0)


def test_the_number_of_sequences_must_be_told() -> None:
    ints = jnp.zeros((1, 8), jnp.int32)
    with pytest.raises(ValueError, match="must be told `sequences`"):
        prepare_mask(ints, ints, backend="cudnn")
