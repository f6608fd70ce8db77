"""A right loss head passes its trial, and one that is wrong in a single place does not."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import Array

from jax_simpo.ops import logprobs
from jax_simpo.ops.attention.choice import place_of
from jax_simpo.ops.loss_head import evidence
from jax_simpo.ops.loss_head.backends import BACKENDS, load_backend
from jax_simpo.ops.loss_head.evidence import HeadShape, examine_head

SHAPE = HeadShape("float32", 64, 32, 500, None)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Any:
    for name, value in (("_TARGETS", 60), ("_COUNTS", (60, 41)), ("_LENGTH", 70), ("_VOCABULARY", 300)):
        monkeypatch.setattr(evidence, name, value)
    evidence._small_case.cache_clear()
    yield
    evidence._small_case.cache_clear()


@pytest.mark.parametrize("shape", [SHAPE, HeadShape("bfloat16", 96, 32, 500, 3.0, frozen=True)])
def test_xla_is_right_here(shape: HeadShape) -> None:
    verdict = examine_head("xla", shape, jax.devices()[0])
    assert verdict.problem is None and verdict.speed is not None and verdict.speed.tflops > 0


def problem_of(monkeypatch: pytest.MonkeyPatch, change: Any, timed: bool = False) -> str:
    """Tries `xla` with arguments that `change(hidden, head)` has altered."""

    def wrong(hidden: Array, head: Array, *arguments: Any, **settings: Any) -> Array:
        return logprobs.target_logps(*change(hidden, head), *arguments, **settings)

    monkeypatch.setattr(evidence, "target_logps", wrong)
    return str(examine_head("xla", SHAPE, jax.devices()[0], timed=timed).problem)


def test_what_is_wrong_in_one_place_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    last = problem_of(monkeypatch, lambda hidden, head: (hidden, head.at[-1].set(-10 * jnp.ones_like(head[-1]))))
    assert last.startswith("is wrong: its ")
    one_state = problem_of(monkeypatch, lambda hidden, head: (hidden.at[0, 5, 0].add(0.05), head))
    assert one_state.startswith("is wrong: its ")
    gradient = problem_of(monkeypatch, lambda hidden, head: (hidden, head.at[7].set(jax.lax.stop_gradient(head[7]))))
    assert gradient.startswith("is wrong: its gradient for the head is off by ")
    nan = problem_of(monkeypatch, lambda hidden, head: (hidden.at[0, 5].multiply(jnp.nan), head))
    assert nan.startswith("gives NaN or infinity: its log-probs")


def test_what_is_wrong_at_the_run_s_sizes_alone_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong_when_large(hidden: Array, head: Array) -> tuple[Array, Array]:
        return hidden, head.at[-1].multiply(1.5) if len(head) == 500 else head

    assert problem_of(monkeypatch, wrong_when_large, timed=True).endswith("with 64 states")


def test_what_raises_is_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "target_logps", lambda *_, **__: 1 / 0)
    verdict = examine_head("xla", SHAPE, jax.devices()[0])
    assert verdict.raised and str(verdict.problem).startswith("fails: ZeroDivisionError")


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "xla"])
def test_kernels_are_right_on_the_hardware(
    monkeypatch: pytest.MonkeyPatch, backend: str, softcap: float | None
) -> None:
    shape, device = HeadShape("bfloat16", 3000, 1024, 50001, softcap), jax.devices()[0]
    if obstacle := load_backend(backend).obstacle(place_of(device), shape.width):
        pytest.skip(f"{backend} {obstacle}")
    monkeypatch.undo()  # the small case at its own size
    assert examine_head(backend, shape, device).problem is None
