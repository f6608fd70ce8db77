"""Killed at any file operation and at any moment, again and again, a run ends with the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from jax_simpo.run.samples import read_samples
from tests.training.runs import MODEL

ROOT = Path(__file__).parents[2]
QUICK = {
    "model_config": MODEL,
    "tokenizer_name_or_path": "builtin:cafe",
    "dataset_mixer": {"builtin:cafe": 0.01},
    "max_length": 128,
    "learning_rate": 1e-3,
    "global_batch_size": 8,
    "max_steps": 5,
    "save_steps": 1,
    "save_total_limit": 2,
    "dtype": "float32",
    "output_dir": "run",
    "data_cache_dir": "cache",
}
# With a reference, whose cache is killed half written too, evaluations, a best model, and samples.
FULL = {
    **QUICK,
    "objective": "dpo",
    "beta": 0.1,
    "dataset_splits": ["train", "test"],
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "sample_prompts": 1,
    "sample_tokens": 2,
    "generate_during_eval": True,
}
TIMES = ("seconds", "per_second", "waited", "idle", "runtime")


def killed(folder: Path, config: dict[str, Any], kills: int) -> list[list[list[int]]]:
    """Runs to the end once, and then with kills; returns for each run the status and the changes of each life."""
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "tests.training.kills_child", str(folder), str(kills), "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lives: list[list[list[int]]] = json.loads((folder / "lives.json").read_text())
    return lives


def records(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: v for key, v in line.items() if not any(time in key for time in TIMES)} for line in lines]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(("kills", "config"), [(6, QUICK), pytest.param(100, FULL, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(
    kills: int, config: dict[str, Any], tmp_path: Path
) -> None:
    [whole], *runs = killed(tmp_path, config, kills)
    assert whole[0] == 0 and whole[1] > 100
    assert sum(status == -signal.SIGKILL for lives in runs for status, _ in lives) == kills
    for number, lives in enumerate(runs, start=1):
        log = (tmp_path / str(number) / "log.txt").read_text()
        # A kill may come when everything is written, right before the end.
        assert lives[-1][0] == 0 or "finished at step 5: nothing is left to train" in log[-300:], log[-3000:]
        run, oracle = tmp_path / str(number) / "run", tmp_path / "0" / "run"
        assert records(run) == records(oracle)
        assert [s.during for s in read_samples(run)] == [s.during for s in read_samples(oracle)]
        model = "model/model.safetensors"
        assert (run / model).read_bytes() == (oracle / model).read_bytes()
        assert names(run) == names(oracle) and names(run / "checkpoints") == names(oracle / "checkpoints")
