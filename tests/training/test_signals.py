"""A run that a signal ends has saved its step, and the same command goes on with the same numbers."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from jax_simpo.errors import StoppedError
from jax_simpo.run.metrics import read_metrics
from jax_simpo.training.loop import TrainingLoop
from tests.training.runs import config_of, losses, run

KEYS: dict[str, Any] = {"max_steps": 5, "save_steps": 100, "do_eval": True, "eval_strategy": "steps", "eval_steps": 2}


def signalled_in(name: str, number: signal.Signals, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends this process a signal as the loop enters a method for the `at`-th time."""
    original, calls = getattr(TrainingLoop, name), [0]

    def method(self: Any, *args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            os.kill(os.getpid(), number)
        return original(self, *args, **options)

    monkeypatch.setattr(TrainingLoop, name, method)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    run(config_of(folder, **KEYS))
    return folder / "run"


@pytest.mark.parametrize(
    ("method", "number", "at", "step"),
    [
        ("_after", signal.SIGINT, 3, 3),  # after a step
        ("_evaluate", signal.SIGTERM, 2, 2),  # in an evaluation; the first one is before the first step
        ("_after", signal.SIGHUP, 5, 5),  # after the last step
    ],
)
def test_a_signal_ends_the_run_after_its_step_and_nothing_is_lost(
    method: str,
    number: signal.Signals,
    at: int,
    step: int,
    unbroken: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_of(tmp_path, **KEYS)
    with monkeypatch.context() as patch:
        signalled_in(method, number, at, patch)
        with pytest.raises(StoppedError, match=f"ended by {number.name} after step {step} of 5, which is saved") as end:
            run(config)
    assert (end.value.status, end.value.saved) == (128 + number, True)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [str(step)]
    records = run(config)
    expected = read_metrics(unbroken)
    assert losses(records) == losses([record for record in expected if "step" in record])
    assert [r["eval_loss"] for r in read_metrics(tmp_path / "run") if "eval_step" in r] == [
        r["eval_loss"] for r in expected if "eval_step" in r
    ]
    weights = (Path(output) / "model" / "model.safetensors" for output in (config.output_dir, unbroken))
    assert len({path.read_bytes() for path in weights}) == 1


def test_a_signal_before_the_first_step_changes_nothing(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path, **KEYS)
    with monkeypatch.context() as patch:
        signalled_in("_evaluate", signal.SIGINT, 1, patch)
        with pytest.raises(StoppedError, match="ended by SIGINT"):
            run(config)
    assert not list((tmp_path / "run").rglob("checkpoints/*")) and read_metrics(tmp_path / "run") == []
    assert losses(run(config)) == [record["loss"] for record in read_metrics(unbroken) if "step" in record]
