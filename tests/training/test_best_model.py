"""The best model of a run is kept and exported, and early stopping ends a run, also across a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file

from jax_simpo.errors import CheckpointError, ConfigError
from jax_simpo.run.facts import read_facts
from jax_simpo.training import trainer
from tests.training.test_trainer import config_of, stop_after

# Evaluations at the steps 2, 4, ... The first one, before training, is the best of all and does not count.
COURSE = {0: 0.1, 2: 0.9, 4: 0.5, 6: 0.6, 8: 0.7, 10: 0.8, 12: 0.9}
SETTINGS: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 6, "save_total_limit": 1}


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives the evaluations of a run the losses of `COURSE`."""
    record = trainer.TrainingLoop._record

    def with_step(self: Any, values: dict[str, Any]) -> None:
        if "eval_step" in values:
            values["eval_loss"] = COURSE[values["eval_step"]]
        record(self, values)

    monkeypatch.setattr(trainer.TrainingLoop, "_record", with_step)


def weights(path: Path) -> dict[str, np.ndarray]:
    return dict(load_file(path / "model.safetensors"))


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def steps_of(output: Path) -> list[str]:
    return sorted((p.name for p in (output / "checkpoints").iterdir()), key=int)


@pytest.mark.usefixtures("scripted")
def test_the_best_step_is_saved_kept_and_exported_also_by_a_run_that_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = trainer.train(config_of(tmp_path / "plain", max_steps=4, lr_scheduler_type="constant"), Console(quiet=True))
    config = config_of(tmp_path, load_best_model_at_end=True, lr_scheduler_type="constant", **SETTINGS)
    with monkeypatch.context() as patch:
        stop_after(9, patch)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(config, Console(quiet=True))
    output = Path(config.output_dir)
    assert steps_of(output) == ["4", "6"]  # the best, and the newest
    run = trainer.train(config, Console(quiet=True))
    assert (run.steps, run.model_step, run.stopped_early) == (12, 4, False)
    assert steps_of(output) == ["4", "12"]
    assert same(weights(run.model_path), weights(plain.model_path))
    assert read_facts(output)["model_step"] == 4
    told = "The exported model is that of step 4 of 12, the best by eval_loss."
    card = (output / "README.md").read_text().replace("\\_", "_")  # escaped for markdown
    assert told in card and told in run.report_path.read_text()
    with pytest.raises(CheckpointError, match="finished at step 12"):
        trainer.train(config, Console(quiet=True))


@pytest.mark.usefixtures("scripted")
def test_early_stopping_ends_a_run_which_is_then_finished(tmp_path: Path) -> None:
    config = config_of(tmp_path, early_stopping_patience=2, **SETTINGS)
    run = trainer.train(config, Console(quiet=True))
    assert (run.steps, run.model_step, run.stopped_early) == (8, 8, False)
    assert steps_of(Path(config.output_dir)) == ["8"]
    with pytest.raises(CheckpointError, match="finished by early stopping at step 8: nothing is left to train"):
        trainer.train(config, Console(quiet=True))


@pytest.mark.usefixtures("scripted")
def test_a_run_that_early_stopping_ended_before_its_export_takes_no_further_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path, early_stopping_patience=2, load_best_model_at_end=True, **SETTINGS)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Setup, "export", killed)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(config, Console(quiet=True))
    run = trainer.train(config, Console(quiet=True))
    assert (run.steps, run.model_step) == (8, 4)
    assert steps_of(Path(config.output_dir)) == ["4", "8"]


def test_an_unknown_metric_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    config = config_of(tmp_path, load_best_model_at_end=True, metric_for_best_model="accuracy", **SETTINGS)
    with pytest.raises(ConfigError, match=r"the evaluations have no `eval_accuracy`; they have eval_loss, eval_rew"):
        trainer.train(config, Console(quiet=True))
    assert not list(Path(config.output_dir).iterdir())
