"""Chunked log-probs against log-softmax of all logits, values and gradients, alone and on meshes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_simpo.ops.logprobs import target_logps
from jax_simpo.sharding import make_mesh

B, L, D, V = 8, 24, 16, 48


def problem(seed: int, targets: int) -> tuple[jax.Array, ...]:
    k = jax.random.split(jax.random.key(seed), 5)
    return (
        jax.random.normal(k[0], (B, L, D)),
        jax.random.normal(k[1], (V, D)),
        jax.random.randint(k[2], (B, targets), 0, L),
        jax.random.randint(k[3], (B, targets), 0, V),
        jax.random.normal(k[4], (B, targets)),
    )


def all_logits(hidden, head, index, token, softcap):  # type: ignore[no-untyped-def]
    logits = jnp.take_along_axis(hidden, index[..., None], axis=1) @ head.T
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    return jnp.take_along_axis(jax.nn.log_softmax(logits), token[..., None], axis=-1)[..., 0]


def values_and_gradients(logps, seed: int, targets: int):  # type: ignore[no-untyped-def]
    hidden, head, index, token, weight = problem(seed, targets)

    def total(hidden, head):  # type: ignore[no-untyped-def]
        found = logps(hidden, head, index, token)
        return (found * weight).sum(), found

    (_, found), gradients = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(hidden, head)
    return found, *gradients


@given(
    seed=st.integers(0, 10**6),
    targets=st.sampled_from([1, 7, 20]),
    chunk=st.sampled_from([1, 5, 16, 4096]),
    softcap=st.sampled_from([None, 2.0]),
)
@settings(max_examples=12)
def test_values_and_gradients_are_those_of_the_full_logits(
    seed: int, targets: int, chunk: int, softcap: float | None
) -> None:
    oracle = values_and_gradients(lambda *a: all_logits(*a, softcap), seed, targets)
    found = values_and_gradients(lambda *a: target_logps(*a, softcap=softcap, chunk=chunk), seed, targets)
    for a, b in zip(oracle, found, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("mesh", [(1, 8, 1), (2, 2, 2), (1, 2, 4), (8, 1, 1)])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_on_a_mesh_values_and_gradients_are_the_same(mesh: tuple[int, int, int], softcap: float | None) -> None:
    oracle = values_and_gradients(lambda *a: all_logits(*a, softcap), 1, 20)
    with jax.set_mesh(make_mesh(*mesh)):
        found = values_and_gradients(lambda *a: target_logps(*a, softcap=softcap, chunk=6), 1, 20)
    for a, b in zip(oracle, found, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_bfloat16_states_give_float32_log_probs_and_a_float32_head_gradient() -> None:
    hidden, head, index, token, _ = problem(0, 8)

    def total(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return target_logps(hidden, head, index, token, chunk=4).sum()

    hidden = hidden.astype(jnp.bfloat16)
    assert target_logps(hidden, head, index, token).dtype == jnp.float32
    dhidden, dhead = jax.grad(total, (0, 1))(hidden, head)
    assert (dhidden.dtype, dhead.dtype) == (jnp.bfloat16, jnp.float32)


def test_no_array_of_targets_by_vocabulary_is_allocated() -> None:
    rows, targets, vocabulary, width = 1, 2048, 8192, 32

    def total(hidden, head, index, token):  # type: ignore[no-untyped-def]
        return target_logps(hidden, head, index, token).sum()

    shapes = [(rows, 512, width), (vocabulary, width), (rows, targets), (rows, targets)]
    dtypes = [jnp.float32, jnp.float32, jnp.int32, jnp.int32]
    arguments = [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, dtypes, strict=True)]
    compiled = jax.jit(jax.grad(total, (0, 1))).lower(*arguments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.6 * 4 * targets * vocabulary
