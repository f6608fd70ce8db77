"""Compares the tiled log-probs with a log-softmax of all logits, values and gradients, on one device and on meshes."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_simpo.ops.logprobs import target_logps
from jax_simpo.ops.loss_head.states import StateList
from jax_simpo.sharding import make_mesh

B, L, D, V = 8, 24, 16, 48


def problem(seed: int, targets: int) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(seed)
    return (
        jnp.asarray(rng.standard_normal((B, L, D)), jnp.float32),
        jnp.asarray(rng.standard_normal((V, D)), jnp.float32),
        jnp.asarray(rng.integers(0, L, (B, targets)), jnp.int32),
        jnp.asarray(rng.integers(0, V, (B, targets)), jnp.int32),
        jnp.asarray(rng.standard_normal((B, targets)), jnp.float32),
    )


def all_logits(hidden, head, index, token, softcap=None, counts=None):  # type: ignore[no-untyped-def]
    logits = jnp.take_along_axis(hidden, index[..., None], axis=1) @ head.T
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    logps = jnp.take_along_axis(jax.nn.log_softmax(logits), token[..., None], axis=-1)[..., 0]
    return logps if counts is None else jnp.where(jnp.arange(index.shape[1]) < counts[:, None], logps, 0.0)


def values_and_gradients(logps, seed: int, targets: int, counts=None, **settings):  # type: ignore[no-untyped-def]
    return compiled_once(logps, tuple(settings.items()), *problem(seed, targets), counts)


@partial(jax.jit, static_argnums=(0, 1))
def compiled_once(logps, settings, hidden, head, index, token, weight, counts):  # type: ignore[no-untyped-def]
    def total(hidden, head):  # type: ignore[no-untyped-def]
        values = logps(hidden, head, index, token, counts=counts, **dict(settings))
        return (values * weight).sum(), values

    (_, values), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(hidden, head)
    return values, *gradients


@given(
    seed=st.integers(0, 10**6),
    targets=st.sampled_from([1, 7, 20]),
    chunk=st.sampled_from([1, 5, 16, 4096]),
    block=st.sampled_from([7, 16, 40, 4096]),  # of 48 entries
    keep_bytes=st.sampled_from([0, 1 << 20]),
    softcap=st.sampled_from([None, 2.0]),
)
@settings(max_examples=12)
def test_values_and_gradients_are_those_of_the_full_logits(
    seed: int, targets: int, chunk: int, block: int, keep_bytes: int, softcap: float | None
) -> None:
    oracle = values_and_gradients(all_logits, seed, targets, softcap=softcap)
    tiles = {"chunk": chunk, "block": block, "keep_bytes": keep_bytes}
    ours = values_and_gradients(target_logps, seed, targets, softcap=softcap, **tiles)
    for a, b in zip(oracle, ours, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("mesh", [(1, 8, 1), (2, 2, 2), (1, 2, 4), (8, 1, 1)])
@pytest.mark.parametrize(("softcap", "keep_bytes"), [(None, 0), (2.0, 1 << 20)])
def test_on_a_mesh_values_and_gradients_are_the_same(
    mesh: tuple[int, int, int], softcap: float | None, keep_bytes: int
) -> None:
    oracle = values_and_gradients(all_logits, 1, 20, softcap=softcap)
    with jax.set_mesh(make_mesh(*mesh)):
        tiles = {"chunk": 6, "block": 5, "keep_bytes": keep_bytes}
        ours = values_and_gradients(target_logps, 1, 20, softcap=softcap, **tiles)
    for a, b in zip(oracle, ours, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@given(counts=st.lists(st.integers(0, 20), min_size=B, max_size=B), chunk=st.sampled_from([3, 8]))
@settings(max_examples=6)
def test_padding_targets_give_zeros_in_values_and_gradients(counts: list[int], chunk: int) -> None:
    real = jnp.asarray(counts, jnp.int32)
    ours = values_and_gradients(target_logps, 2, 20, real, chunk=chunk, block=16)
    oracle = values_and_gradients(all_logits, 2, 20, real)
    for a, b in zip(oracle, ours, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("keep_bytes", [0, 1 << 30])
def test_padding_that_points_at_a_token_with_huge_logits_gives_no_nan(keep_bytes: int) -> None:
    hidden, head, index, token, _ = problem(0, 20)
    hidden, index = hidden.at[:, 0].multiply(1000), index.at[:, 5:].set(0).at[:, :5].set(3)
    counts = jnp.full(B, 5, jnp.int32)

    def total(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return target_logps(hidden, head, index, token, counts=counts, chunk=160, keep_bytes=keep_bytes).sum()

    assert float(jnp.abs(hidden[:, 0] @ head.T).max()) > 89  # whose exponential float32 cannot hold
    assert all(np.isfinite(gradient).all() for gradient in jax.jit(jax.grad(total, (0, 1)))(hidden, head))


def test_chunks_of_padding_alone_are_not_computed() -> None:
    # A skipped chunk does not show in the result, but a computed one would, because its states are not finite.
    hidden, head, index, token, _ = problem(0, 20)
    hidden, index = hidden.at[:, 0].set(jnp.nan), index.at[:, 5:].set(0).at[:, :5].set(3)
    counts = jnp.full(B, 5, jnp.int32)  # 40 real targets in chunks of 8: none of them holds padding

    def total(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return target_logps(hidden, head, index, token, counts=counts, chunk=8).sum()

    assert all(np.isfinite(gradient).all() for gradient in jax.jit(jax.grad(total, (0, 1)))(hidden, head))


def test_kept_logits_are_used_and_a_head_product_is_saved() -> None:
    def products(keep_bytes: int) -> float:
        def total(hidden: jax.Array, head: jax.Array) -> jax.Array:
            return target_logps(hidden, head, index, token, chunk=160, block=V, keep_bytes=keep_bytes).sum()

        hidden, head, index, token, _ = problem(0, 20)
        return str(jax.make_jaxpr(jax.grad(total, (0, 1)))(hidden, head)).count("dot_general")

    # One forward product; in the backward pass the same again and two more. Each for whole tiles and for parts of one.
    assert (products(0), products(4 * 160 * V)) == (2 * 4, 2 * 3)


@partial(jax.jit, static_argnums=0)
def listed(chunk: int, index: jax.Array, token: jax.Array, counts: jax.Array) -> tuple[jax.Array, ...]:
    """Lists states that are their own index: their list, its length, them at their targets, and counts of targets."""
    hidden = jnp.arange(len(index) * L * 1.0).reshape(len(index), L, 1)
    listing = StateList(chunk, L, index, token, counts)
    states = listing.take(hidden)
    weights = listing.added_per_state(jnp.where(listing.real, 1.0, 0.0))
    return states, listing.live, listing.to_targets(states), weights


@given(
    rows=st.lists(
        st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=12),
        min_size=1,
        max_size=3,
    ),
    chunk=st.sampled_from([1, 5, 16]),
)
@settings(max_examples=25)
def test_a_state_is_listed_once_for_every_two_different_tokens_that_it_predicts(
    rows: list[list[tuple[int, int]]], chunk: int
) -> None:
    index, token = np.zeros((2, len(rows), 12), np.int32)
    for n, row in enumerate(rows):
        for t, target in enumerate(row):
            index[n, t], token[n, t] = target
    states, live, of_targets, weights = listed(chunk, index, token, np.array([len(row) for row in rows], np.int32))
    tokens_of = {(n, i): {t for j, t in row if j == i} for n, row in enumerate(rows) for i, _ in row}
    expected = [n * L + i for (n, i), tokens in tokens_of.items() for _ in range(0, len(tokens), 2)]
    assert sorted(states[:live, 0].tolist()) == sorted(expected)
    for n, row in enumerate(rows):
        assert of_targets[n, : len(row), 0].tolist() == [n * L + i for i, _ in row]
    # Entries of targets of one state and token are added up, those of padding among padding.
    targets = [(n, *target) for n, row in enumerate(rows) for target in row]
    assert sorted(weights[weights > 0].tolist()) == sorted(map(targets.count, set(targets)))


def test_targets_that_many_responses_share_have_the_gradients_of_each() -> None:
    index = jnp.zeros((B, 20), jnp.int32).at[:, 10:].set(jnp.arange(10))
    token = jnp.zeros((B, 20), jnp.int32).at[:, 5:].set(jnp.arange(15) % 4)
    hidden, head, _, _, weight = problem(3, 20)

    def total(logps, hidden, head):  # type: ignore[no-untyped-def]
        return (logps(hidden, head, index, token) * weight).sum()

    def gradients(logps):  # type: ignore[no-untyped-def]
        return jax.jit(jax.grad(partial(total, logps), (0, 1)))(hidden, head)

    oracle = gradients(all_logits)
    for keep_bytes in (0, 1 << 20):
        ours = gradients(partial(target_logps, chunk=5, block=16, keep_bytes=keep_bytes))
        for a, b in zip(oracle, ours, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)


def test_no_log_prob_is_positive() -> None:
    # A target's own logit and the one in the log-sum-exp are summed in different orders.
    hidden, head, index, token, _ = problem(3, 20)
    token = (hidden @ head.T).argmax(-1)[jnp.arange(B)[:, None], index]  # the likeliest
    assert float(jax.jit(target_logps)(30 * hidden, head, index, token).max()) <= 0.0


def test_bfloat16_states_give_float32_log_probs_and_a_float32_head_gradient() -> None:
    hidden, head, index, token, _ = problem(0, 8)

    def total(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return target_logps(hidden, head, index, token, chunk=4).sum()

    hidden = hidden.astype(jnp.bfloat16)
    assert jax.eval_shape(target_logps, hidden, head, index, token).dtype == jnp.float32
    dhidden, dhead = jax.eval_shape(jax.grad(total, (0, 1)), hidden, head)
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


def test_the_head_in_the_compute_dtype_is_not_made_float32_again() -> None:
    """In both passes a CPU slices the bfloat16 head. Left alone, XLA would convert all of it first."""
    vocabulary, width = 65536, 48

    def total(hidden, head, index, token):  # type: ignore[no-untyped-def]
        return target_logps(hidden, head, index, token, chunk=64, block=1024, frozen=True).sum()

    arguments = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (((1, 128, width), jnp.bfloat16), ((vocabulary, width), jnp.float32))
    ] + [jax.ShapeDtypeStruct((1, 128), jnp.int32)] * 2
    for f in (total, jax.grad(total)):  # the one cast to the compute dtype takes 2 bytes a number
        temporaries = jax.jit(f).lower(*arguments).compile().memory_analysis().temp_size_in_bytes
        assert temporaries < 3 * vocabulary * width
