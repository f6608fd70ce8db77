"""Benchmarks of steps take the attention and the loss head that a run would take in their place."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from benchmarks import backends
from benchmarks.backends import backends_of_a_run
from benchmarks.lengths import PROFILES, profile_pairs
from benchmarks.models import model_mapping
from benchmarks.steps import Trainee, one_device, step_plan
from jax_simpo.errors import ConfigError
from jax_simpo.hf.config import read_model_config
from jax_simpo.models.transformer import Model
from jax_simpo.ops.attention.evidence import Distance, Shape, Verdict
from jax_simpo.training import verdicts


@pytest.fixture(scope="module")
def trainee() -> Trainee:
    model = Model(read_model_config(model_mapping("tiny")), "float32", "none")
    pairs = profile_pairs(PROFILES["hh-rlhf"], 8, 512)
    return Trainee(model, step_plan(model, pairs, "shared+packed", batch=4), pairs, one_device())


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Has the backends tried, as on an accelerator."""
    monkeypatch.setattr(backends, "place_of", lambda _: SimpleNamespace(platform="gpu"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def take(trainee: Trainee, attention: str) -> backends.Backends:
    with jax.set_mesh(trainee.mesh):
        return backends_of_a_run(trainee.model, trainee.plan, trainee.mesh, attention)


def test_on_a_cpu_nothing_is_tried_and_the_forward_pass_has_what_is_taken(
    trainee: Trainee, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdicts, "examine", None)
    assert (trainee.backends.attention, trainee.backends.loss_head) == ("blockwise", "xla")
    assert trainee.backends.reason.startswith("attention blockwise (auto on a CPU: ")
    assert (trainee.forward.attention, trainee.forward.loss_head) == ("blockwise", "xla")
    assert take(trainee, "banded").attention == "banded"


@pytest.mark.usefixtures("accelerator")
def test_a_backend_that_is_wrong_is_not_taken(trainee: Trainee, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[str, Shape]] = []

    def examine(problem: str | None) -> Callable[..., Verdict]:
        def verdict(name: str, shape: Shape, *_: Any, **__: Any) -> Verdict:
            tried.append((name, shape))
            return Verdict(name, problem, {"out": Distance(0.0, 0.0)})

        return verdict

    monkeypatch.setattr(verdicts, "examine", examine("gives NaN"))
    with pytest.raises(ConfigError, match="`attention: banded` gives NaN"):
        take(trainee, "banded")
    assert tried[0][0] == "banded" and tried[0][1].head_dim == trainee.model.config.head_dim


@pytest.mark.slow
@pytest.mark.usefixtures("accelerator")
def test_a_trial_runs_under_the_mesh_of_a_benchmark(trainee: Trainee) -> None:
    assert take(trainee, "banded").reason.startswith("attention banded (as configured, and right on ")
