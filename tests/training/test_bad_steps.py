"""A step whose numbers have gone bad is not applied: it ends the run or is left out, and is written down either way."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_simpo.config import TrainConfig
from jax_simpo.data.loader import StepBatch
from jax_simpo.errors import TrainingError
from jax_simpo.objectives import Objective
from jax_simpo.run import guard
from jax_simpo.run.bad_steps import read_bad_steps
from jax_simpo.run.checkpoint import Checkpoints
from jax_simpo.run.guard import WINDOW, StepGuard
from jax_simpo.training import loop, step
from tests.training.runs import Records, config_of, run, run_printing, stop_after

SETTINGS: dict[str, Any] = {"max_steps": 4, "lr_scheduler_type": "linear"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Records]:
    config = config_of(tmp_path_factory.mktemp("finished"), **SETTINGS, save_strategy="no")
    return config, run(config)


def poisoned(steps: set[int], monkeypatch: pytest.MonkeyPatch, factor: float = np.nan) -> None:
    """Divides the loss of some steps by a factor, which makes it NaN by default."""
    split = step.split_step

    def changed(batch: StepBatch, objective: Objective) -> list[step.MicroBatch]:
        micro_batches = split(batch, objective)
        if batch.step + 1 not in steps:
            return micro_batches
        groups = np.float32(len(batch.groups) * factor)
        return [m._replace(denominators=m.denominators._replace(groups=groups)) for m in micro_batches]

    monkeypatch.setattr(loop, "run_step", partial(step.run_step, split=changed))


def weights(config: TrainConfig) -> bytes:
    return (Path(config.output_dir) / "model" / "model.safetensors").read_bytes()


def test_a_step_that_is_not_finite_is_not_applied_but_written_down_and_the_state_before_it_is_kept(
    finished: tuple[TrainConfig, Records], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path, **SETTINGS, save_steps=100, logging_steps=100)
    with monkeypatch.context() as patch:
        poisoned({2}, patch)
        with pytest.raises(
            TrainingError, match=r"step 2: the loss is nan, the gradient norm nan\. Its .*bad_steps"
        ) as e:
            run(config)
    assert "Set `on_bad_step: skip` to go on without such steps" in str(e.value)
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [1]
    check_written_down(read_bad_steps(tmp_path / "run"), loss=finished[1][1]["loss"])
    assert [r["step"] for r in run(config)] == [4]
    assert weights(config) == weights(finished[0])
    assert read_bad_steps(tmp_path / "run") == []  # this time step 2 was good


def check_written_down(bad_steps: list[dict[str, Any]], loss: float) -> None:
    """Checks what is written of step 2; `loss` is the step's loss in a good run, under the same weights."""
    (bad,) = bad_steps
    assert bad["step"] == 2 and bad["left_out"] is False
    assert bad["metrics"]["loss"] == bad["metrics"]["grad_norm"] == "nan"
    assert len({(group["file"], group["row"]) for group in bad["groups"]}) == len(bad["groups"]) == 16
    assert np.mean([group["loss"] for group in bad["groups"]]) == pytest.approx(loss, abs=1e-5)
    for group in bad["groups"]:
        assert group["prompt"] and len({response["text"] for response in group["responses"]}) == 2
        assert all(response["logp_sum"] < 0 < response["length"] for response in group["responses"])


def test_a_run_that_left_a_step_out_and_was_killed_goes_on_to_the_same_weights(
    finished: tuple[TrainConfig, Records], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "max_steps": 4,
        "save_steps": 1,
        "on_bad_step": "skip",
        "max_bad_steps": 1,
        "lr_scheduler_type": "linear",
    }
    config, other = config_of(tmp_path / "a", **settings), config_of(tmp_path / "b", **settings)
    poisoned({2}, monkeypatch)
    records, printed = run_printing(config)
    assert "warning: step 2: the loss is nan" in printed and "(1 of at most 1 such steps)" in printed
    assert [record["step"] for record in records] == [1, 3, 4]
    page = (tmp_path / "a" / "run" / "report.html").read_text(encoding="utf-8")
    assert "steps left out" in page
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(3, patch)
        run(other)
    resumed = run(other)
    assert weights(other) == weights(config)
    keys = ("step", "loss", "grad_norm", "learning_rate")
    assert [[r[key] for key in keys] for r in resumed] == [[r[key] for key in keys] for r in records]
    # The schedule counts updates.
    assert [r["learning_rate"] for r in records] == [r["learning_rate"] for r in finished[1][:3]]


def test_a_run_leaves_out_no_more_steps_than_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned({1, 2}, monkeypatch)
    config = config_of(tmp_path, max_steps=3, save_strategy="no", on_bad_step="skip", max_bad_steps=1)
    with pytest.raises(TrainingError, match=r"step 2: .*\. `max_bad_steps: 1` allows to leave out no more"):
        run(config)
    assert [(bad["step"], bad["left_out"]) for bad in read_bad_steps(tmp_path / "run")] == [(1, True), (2, False)]


def test_a_spike_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "WINDOW", 6)
    poisoned({4}, monkeypatch, factor=1e-3)
    records = run(config_of(tmp_path, max_steps=5, save_strategy="no", on_bad_step="skip", spike_sigma=6))
    assert [record["step"] for record in records] == [1, 2, 3, 5]
    (bad,) = read_bad_steps(tmp_path / "run")
    assert bad["left_out"] and "standard deviations" in bad["reason"] and bad["metrics"]["loss"] > 100


@pytest.mark.parametrize("save_strategy", ["steps", "no"])
def test_weights_that_are_not_finite_are_neither_saved_nor_exported(
    save_strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def infinite(*args: Any, **keys: Any) -> Any:
        params, state, metrics = step.run_step(*args, **keys)
        return jax.tree.map(lambda x: x.at[..., -1].set(jnp.inf), params), state, metrics

    monkeypatch.setattr(loop, "run_step", infinite)
    with pytest.raises(TrainingError, match=r"step 1: the weights are no longer finite\. The newest checkpoint is of"):
        run(config_of(tmp_path, max_steps=1, save_steps=1, save_strategy=save_strategy))
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == []
    assert not (tmp_path / "run" / "model").exists()


# --- the guard by itself


def test_spikes_are_those_of_numpy_and_a_guard_that_was_saved_goes_on_as_before() -> None:
    values = np.random.default_rng(0).normal(size=(400, 2)).astype(np.float32)
    values[::37] *= 8
    watch, found, expected = StepGuard(2.5), [], []
    for number, (loss, norm) in enumerate(values.tolist()):
        if number == 200:
            watch = StepGuard(2.5, json.loads(json.dumps(watch.state)))
        found.append(not watch.accepts({"loss": jnp.float32(loss), "grad_norm": jnp.float32(norm)}))
        watch.count()
        last = values[max(0, number - WINDOW) : number].astype(np.float64)
        enough = len(last) >= WINDOW // 2
        limits = last.mean(0) + 2.5 * last.std(0, ddof=1) if enough else np.inf
        expected.append(bool((values[number] > limits).any()))
    assert found == expected and 5 < sum(found) < 40
    assert watch.left_out == sum(found)


def test_a_level_that_stays_is_no_spike_for_ever() -> None:
    watch = StepGuard(6)
    levels = [1 + 0.01 * (number % 3) for number in range(WINDOW)] + [5.0] * 20
    found = []
    for level in levels:
        found.append(not watch.accepts({"loss": level, "grad_norm": level}))
        watch.count()
    assert found[WINDOW] and not any(found[WINDOW + 5 :])


def test_numbers_that_are_not_finite_are_no_measure_for_others() -> None:
    watch = StepGuard(6)
    for number in range(WINDOW):
        watch.accepts({"loss": np.inf if number % 2 else 1.0 + number % 3, "grad_norm": np.nan})
        watch.count()
    assert watch.left_out == WINDOW and watch.accepts({"loss": 1.0, "grad_norm": 1.0})
