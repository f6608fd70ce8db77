"""Tests what a new backend needs, and that nothing heavy is imported before it is used."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_simpo.config.schema import TrainConfig
from jax_simpo.ops.attention import BACKENDS, Mask, prepare_mask
from jax_simpo.ops.attention.backends import Backend, ScoreRule, runs_anywhere
from jax_simpo.ops.attention.choice import choose
from jax_simpo.sharding import make_mesh
from tests.ops.attention.test_attention import inputs, layout, run
from tests.ops.attention.test_choice import CPU


def make_toy_backend() -> Backend:
    """Makes a backend that attends with one head and one query at a time."""

    def prepare(mask: Mask, window: int | None) -> jax.Array:
        return mask.visible(window)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, rule: ScoreRule) -> jax.Array:
        def one_query(query: jax.Array, keys: jax.Array, values: jax.Array, visible: jax.Array) -> jax.Array:
            scores = rule.scale * keys @ query
            if rule.softcap is not None:
                scores = rule.softcap * jnp.tanh(scores / rule.softcap)
            weights = jnp.where(visible, jnp.exp(scores), 0.0)
            return weights @ values / jnp.maximum(weights.sum(), 1e-30)

        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
        one_head = jax.vmap(one_query, (0, None, None, 0))
        one_row = jax.vmap(one_head, (1, 1, 1, None), 1)
        return jax.vmap(one_row)(q, k, v, mask.table(rule.window))

    return Backend(prepare, attend, obstacle=runs_anywhere)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (9, 2.0)])
@pytest.mark.parametrize("meshed", [False, True])
def test_a_backend_is_one_module_and_one_line_of_the_registry(
    meshed: bool, window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("toy_backend")
    module.BACKEND = make_toy_backend()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy_backend", module)
    monkeypatch.setitem(BACKENDS, "toy", "toy_backend")

    batch, arrays = layout(0, 4, 96), inputs(0, 4, 96, 4, 2, 8)
    oracle = run(batch, *arrays, "dense", window, softcap)
    if meshed:
        with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
            results = run(batch, *arrays, "toy", window, softcap)
    else:
        results = run(batch, *arrays, "toy", window, softcap)
    for a, b in zip(oracle, results, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert choose("toy", CPU) == ("toy", "as configured")


def test_a_config_may_name_auto_and_every_backend() -> None:
    assert get_args(TrainConfig.model_fields["attention"].annotation) == ("auto", *BACKENDS)


def test_a_mask_that_was_not_prepared_for_a_window_is_an_error() -> None:
    integers = jnp.zeros((1, 8), jnp.int32)
    mask = prepare_mask(integers, integers, (None, 7))
    with pytest.raises(ValueError, match=r"prepared for the windows \(None, 7\), and 8 is not among them"):
        mask.table(8)


def test_an_unknown_backend_is_an_error() -> None:
    with pytest.raises(ValueError, match="'flash' is not one of"):
        prepare_mask(jnp.zeros((1, 8), jnp.int32), jnp.zeros((1, 8), jnp.int32), backend="flash")


SCRIPT = """
import sys

sys.modules["tokamax"] = None  # as if it were not installed
import jax_simpo.ops.attention
from jax_simpo.ops.attention.backends import BACKENDS, Place, load_backend

place = Place("tpu", (0, 0), "bfloat16", 128, False)
assert [name for name in BACKENDS if load_backend(name).obstacle(place) is None] == ["dense", "blockwise", "banded"]
kernel_libraries = ("tokamax.", "jax.experimental.pallas", "jax.experimental.mosaic", "torch")
imported = [module for module in sys.modules if module.startswith(kernel_libraries)]
assert not imported, imported
"""


def test_obstacles_are_known_without_importing_any_library_of_kernels() -> None:
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
