"""The best model of a run is kept and exported, and early stopping ends a run, also across a resume."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from jax_simpo.config import load_config
from jax_simpo.errors import CheckpointError, ConfigError
from jax_simpo.run.facts import read_facts
from jax_simpo.run.metrics import read_metrics
from tests.torch_ref.start import config_file, make_start
from torch_ref import trainer
from torch_ref.distributed import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"), launched=False)
KEYS: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 3, "save_total_limit": 1}
BEST, PATIENCE = {"load_best_model_at_end": True}, {"early_stopping_patience": 2}

Train = Callable[..., str]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_start(tmp_path_factory.mktemp("start"))


@pytest.fixture
def train(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Trains six steps whose evaluations have the losses 3, 1, 4, 2, 5, 6; returns what was printed."""
    losses = {0: 0.5, 1: 3.0, 2: 1.0, 3: 4.0, 4: 2.0, 5: 5.0, 6: 6.0}  # that of step 0 does not count
    write = trainer.MetricsLog.write

    def write_scripted(log: Any, record: dict[str, Any]) -> None:
        if "eval_step" in record:
            record["eval_loss"] = losses[record["eval_step"]]
        write(log, record)

    monkeypatch.setattr(trainer.MetricsLog, "write", write_scripted)

    def run(**keys: Any) -> str:
        console = Console(record=True, width=300, file=StringIO())
        file = config_file(start, tmp_path, steps=6, **{**KEYS, **keys})
        trainer.train(load_config(file, torch=True), console, ALONE)
        return console.export_text()

    return run


def steps_of(output: Path) -> list[int]:
    return sorted(int(step.name) for step in (output / "checkpoints").iterdir())


def facts_of(output: Path) -> tuple[int, int, bool]:
    facts = read_facts(output)
    return facts["exported_step"], facts["model_step"], facts["ended_early"]


def assert_exported(output: Path, step: int) -> None:
    """The exported weights are those of the step's checkpoint."""
    exported = load_file(output / "model/model.safetensors")
    saved = torch.load(output / f"checkpoints/{step}/state.pt", weights_only=True)["weights"]
    assert exported.keys() == saved.keys()
    assert all(torch.equal(exported[name], saved[name]) for name in saved)


def test_the_best_step_is_saved_kept_beside_the_newest_and_exported(train: Train, tmp_path: Path) -> None:
    printed = train(**BEST)
    assert "the best model by eval_loss is that of step 2; it is exported" in printed
    assert steps_of(tmp_path / "run") == [2, 6]
    assert_exported(tmp_path / "run", 2)
    assert facts_of(tmp_path / "run") == (6, 2, False)


def test_a_metric_may_be_better_when_it_is_greater(train: Train, tmp_path: Path) -> None:
    train(**BEST, greater_is_better=True)
    assert steps_of(tmp_path / "run") == [6] and facts_of(tmp_path / "run") == (6, 6, False)
    assert_exported(tmp_path / "run", 6)


def test_early_stopping_saves_the_step_and_the_run_is_finished(train: Train, tmp_path: Path) -> None:
    printed = train(**PATIENCE)
    assert "2 evaluations without a better eval_loss; the run ends at step 4 of 6" in printed
    assert [r["step"] for r in read_metrics(tmp_path / "run") if "step" in r] == [1, 2, 3, 4]
    assert steps_of(tmp_path / "run") == [4] and facts_of(tmp_path / "run") == (4, 4, True)
    assert_exported(tmp_path / "run", 4)
    with pytest.raises(CheckpointError, match="finished by early stopping at step 4: nothing is left to train"):
        train(**PATIENCE)


def test_early_stopping_saves_nothing_where_nothing_is_to_be_saved(train: Train, tmp_path: Path) -> None:
    train(**PATIENCE, save_strategy="no")
    assert not (tmp_path / "run/checkpoints").exists() and facts_of(tmp_path / "run") == (4, 4, True)


def test_a_resumed_run_decides_as_the_whole_one(train: Train, tmp_path: Path) -> None:
    output, keys = tmp_path / "run", {**BEST, **PATIENCE, "save_total_limit": None}
    train(**keys)
    whole = untimed(output)
    assert steps_of(output) == [1, 2, 3, 4]  # 1 and 2 were each the best so far, 4 was the last
    shutil.rmtree(output / "model")
    shutil.rmtree(output / "checkpoints/4")
    assert "resuming at step 3 of 6" in train(**keys)
    assert untimed(output) == whole
    assert facts_of(output) == (4, 2, True)
    assert_exported(output, 2)


def untimed(output: Path) -> list[Mapping[str, Any]]:
    timed = ("per_second", "runtime")
    return [{k: v for k, v in r.items() if not any(part in k for part in timed)} for r in read_metrics(output)]


def test_a_run_that_early_stopping_ended_before_its_export_takes_no_further_step(train: Train, tmp_path: Path) -> None:
    train(**BEST, **PATIENCE)
    shutil.rmtree(tmp_path / "run/model")
    printed = train(**BEST, **PATIENCE)
    assert "resuming at step 4 of 6" in printed and "the run ends at step 4 of 6" in printed
    assert facts_of(tmp_path / "run") == (4, 2, True)
    assert_exported(tmp_path / "run", 2)


def test_a_best_step_whose_checkpoint_is_gone_is_told(train: Train, tmp_path: Path) -> None:
    train(**BEST)
    shutil.rmtree(tmp_path / "run/model")
    shutil.rmtree(tmp_path / "run/checkpoints/2")
    with pytest.raises(CheckpointError, match=r"that of step 2, which has no checkpoint; there are \[6\]"):
        train(**BEST)


def test_an_unknown_metric_is_refused_before_anything_is_written(train: Train, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"have no `eval_accuracy`; they have eval_loss, .*eval_sft_loss, eval_pairs"):
        train(**BEST, metric_for_best_model="accuracy")
    assert not list((tmp_path / "run").iterdir())
