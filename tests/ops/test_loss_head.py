"""Compares the loss head's kernels with a log-softmax of all logits; Pallas' interpreter runs them on the CPU.

How they compile for GPUs and TPUs is read by benchmarks/loss_head_kernels.py.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from jax_simpo.ops.logprobs import target_logps
from jax_simpo.ops.loss_head import mosaic_kernels, triton, triton_kernels
from jax_simpo.ops.loss_head.backends import BACKENDS, load_backend
from jax_simpo.sharding import make_mesh
from tests.ops.attention.test_choice import A100, CPU, T4, TPU
from tests.ops.test_logprobs import all_logits

KERNELS = [name for name in BACKENDS if name != "xla"]
B, L, D, V, T = 4, 40, 64, 600, 50  # 160 states at most, three pieces of them


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes several pieces of few states, with a last one that is not full, and entries beyond the vocabulary."""
    monkeypatch.setattr(triton_kernels, "ROWS", 64)
    monkeypatch.setattr(triton_kernels, "_TOGETHER", 2)
    for name, size in (("ROWS", 64), ("COLUMNS", 256), ("STEP", 128), ("SLICE", 32)):
        monkeypatch.setattr(mosaic_kernels, name, size)


def problem(seed: int) -> tuple[Array, Array, Array, Array, Array]:
    """Returns hidden states, head, indices, tokens and weights; several targets are of one state, or the same."""
    k = jax.random.split(jax.random.key(seed), 5)
    index = jnp.sort(jax.random.randint(k[2], (B, T), 0, L), axis=1)
    return (
        jax.random.normal(k[0], (B, L, D)),
        jax.random.normal(k[1], (V, D)) / 4,
        index,
        jnp.where(index % 3 == 0, index, jax.random.randint(k[3], (B, T), 0, V)),
        jax.random.normal(k[4], (B, T)),
    )


def values_and_gradients(logps, arrays, real=True):  # type: ignore[no-untyped-def]
    """Returns log-probs and the gradients of a weighted sum of them, for the hidden states and the head."""
    hidden, head, index, token, weight = arrays

    def total(hidden, head):  # type: ignore[no-untyped-def]
        values = jnp.where(real, logps(hidden, head, index, token), 0.0)
        return (values * weight).sum(), values

    (_, values), gradients = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(hidden, head)
    return values, *gradients


def assert_same(oracle: tuple[Array, ...], ours: tuple[Array, ...]) -> None:
    for name, a, b in zip(("log-probs", "hidden", "head"), oracle, ours, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(
    ("softcap", "tiles", "counts"),
    [
        (None, {}, [T] * B),
        (2.0, {"chunk": 48, "block": 250}, [T, 3, 0, 17]),  # blocks that share entries, parts of tiles, padding
    ],
)
def test_values_and_gradients_are_those_of_the_full_logits(
    backend: str, softcap: float | None, tiles: dict[str, int], counts: list[int]
) -> None:
    arrays, real = problem(len(tiles)), np.arange(T) < np.array(counts)[:, None]
    settings = {"counts": jnp.asarray(counts, jnp.int32), "softcap": softcap, "backend": backend, "interpret": True}
    assert_same(
        values_and_gradients(partial(all_logits, softcap=softcap), arrays, real),
        values_and_gradients(partial(target_logps, **settings, **tiles), arrays),
    )


@pytest.mark.parametrize("backend", KERNELS)
def test_on_a_mesh_values_and_gradients_are_the_same(backend: str) -> None:
    arrays = problem(3)
    oracle = values_and_gradients(partial(all_logits, softcap=None), arrays)
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        assert_same(oracle, values_and_gradients(partial(target_logps, backend=backend, interpret=True), arrays))


@pytest.mark.parametrize("backend", KERNELS)
def test_a_frozen_head_has_no_gradient_and_the_states_have_the_same(backend: str) -> None:
    hidden, head, index, token, weight = problem(4)

    def gradients(frozen: bool) -> tuple[Array, Array]:
        def total(hidden: Array, head: Array) -> Array:
            logps = target_logps(hidden, head, index, token, frozen=frozen, backend=backend, interpret=True)
            return (logps * weight).sum()

        return jax.jit(jax.grad(total, (0, 1)))(hidden, head)

    (trained, dhead), (frozen, none) = gradients(False), gradients(True)
    assert (trained == frozen).all() and (none == 0).all() and (dhead != 0).any()


@pytest.mark.parametrize("backend", KERNELS)
def test_pieces_of_padding_alone_are_not_computed(backend: str) -> None:
    """A skipped piece shows in no result, but a computed one would, because its states are not finite."""
    hidden, head, *_ = problem(5)
    states = hidden.reshape(-1, D).at[128:].set(jnp.nan)
    module = {"triton": triton_kernels, "mosaic": mosaic_kernels}[backend]
    top, total = jax.jit(partial(module.sums, softcap=None, interpret=True))(states, head, jnp.int32(100))
    lse = jax.nn.logsumexp(states[:100] @ head.T, axis=-1)
    np.testing.assert_allclose((top + jnp.log(total))[:100], lse, atol=2e-5)
    assert (top[100:] == mosaic_kernels.LOWEST).all() and (total[100:] == 0).all()


@pytest.mark.parametrize("backend", KERNELS)
def test_bfloat16_is_as_near_to_float32_as_that_of_xla(backend: str) -> None:
    hidden, head, index, token, weight = problem(6)
    exact = values_and_gradients(partial(all_logits, softcap=3.0), (hidden, head, index, token, weight))
    rounded = (hidden.astype(jnp.bfloat16), head, index, token, weight)
    by_xla, ours = (
        values_and_gradients(partial(target_logps, softcap=3.0, backend=name, interpret=True), rounded)
        for name in ("xla", backend)
    )
    assert (ours[0].dtype, ours[1].dtype, ours[2].dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    for a, b, c in zip(exact, by_xla, ours, strict=True):
        bound, distance = (float(jnp.linalg.norm(a - x.astype(jnp.float32))) for x in (b, c))
        assert distance <= 1.1 * bound


def test_kept_logits_are_those_of_xla() -> None:
    hidden, head, index, token, _ = problem(7)

    def kernels(keep_bytes: int) -> int:
        logps = partial(target_logps, backend="triton", interpret=True, keep_bytes=keep_bytes)
        gradient = jax.grad(lambda hidden: logps(hidden, head, index, token).sum())
        return str(jax.make_jaxpr(gradient)(hidden)).count("pallas_call")

    assert kernels(0) > 0 == kernels(1 << 30)


def test_obstacles_say_why() -> None:
    def obstacle(name: str, place, width: int = 4096) -> str | None:  # type: ignore[no-untyped-def]
        return load_backend(name).obstacle(place, width)

    assert obstacle("xla", CPU) is obstacle("triton", A100) is obstacle("mosaic", TPU) is None
    assert obstacle("triton", CPU) == "needs an NVIDIA GPU, and this is a CPU"
    assert obstacle("mosaic", A100) == "needs a TPU, and this is a GPU"
    assert "capability 8.0" in str(obstacle("triton", T4))
    assert triton._STEP == triton_kernels.STEP
    for name, place in (("triton", A100), ("mosaic", TPU)):
        assert "multiple of" in str(obstacle(name, place, 100))
        assert obstacle(name, replace(place, dtype="float32")) == "computes in bfloat16, and `dtype` is float32"
    with pytest.raises(ValueError, match="'liger' is not one of xla, triton, mosaic"):
        load_backend("liger")
