"""Two processes of four devices each do what one process of eight does, and share one fate."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from jax_simpo import cli
from jax_simpo.data.synthetic import make_rows
from jax_simpo.run.facts import read_facts
from jax_simpo.run.metrics import read_metrics
from jax_simpo.run.samples import read_samples
from tests.ports import free_port

ROOT = Path(__file__).parents[2]
CONFIG = {
    "model_config": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    },
    "tokenizer_name_or_path": "builtin:cafe",
    "dataset_splits": ["train", "test"],
    "max_length": 128,
    "row_length": 128,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "warmup_ratio": 0,
    "global_batch_size": 24,
    "max_steps": 4,
    "save_steps": 2,
    "do_eval": True,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "dtype": "float32",
}
WITHIN = 60.0  # seconds in which a dead process must have taken the others down


class Hosts:
    """Two processes on this machine that run the same commands, as two hosts would.

    Each has a cache and a working directory of its own, which nothing lies in unless a command's path is relative.
    """

    def __init__(self, folder: Path, commands: Sequence[Sequence[str]], **job: Any) -> None:
        self.folder = folder
        file = folder / "job.json"
        file.write_text(json.dumps({"commands": [list(command) for command in commands], **job}))
        address = f"127.0.0.1:{free_port()}"
        self.processes = []
        for number in range(2):
            place = place_of(number, folder, address)
            own = folder / f"cwd.{number}"
            own.mkdir()
            with ExitStack() as files:
                out, err = (
                    files.enter_context((folder / f"{name}.{number}").open("w")) for name in ("stdout", "stderr")
                )
                command = [sys.executable, "-m", "tests.training.hosts_child", str(file)]
                process = subprocess.Popen(command, cwd=own, env={**os.environ, **place}, stdout=out, stderr=err)
            self.processes.append(process)

    def wait(self, seconds: float) -> list[int]:
        """The exit status of each, when all have ended; those that have not by then are killed, and it is an error."""
        until = time.monotonic() + seconds
        try:
            return [process.wait(max(0.1, until - time.monotonic())) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
                process.wait()

    def await_file(self, pattern: str, seconds: float = 180) -> None:
        """Waits until a run has written a file."""
        until = time.monotonic() + seconds
        while not any(self.folder.glob(pattern)):
            assert time.monotonic() < until and all(process.poll() is None for process in self.processes), self.said(0)
            time.sleep(0.1)

    def said(self, number: int, name: str = "stderr") -> str:
        """Returns the output of a process."""
        return (self.folder / f"{name}.{number}").read_text()


def place_of(number: int, folder: Path, address: str) -> dict[str, str]:
    """Returns the variables that make a process one of two."""
    return {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(number),
        "JAX_NUM_CPU_DEVICES": "4",
        "HF_DATASETS_CACHE": str(folder / f"cache.{number}"),
        "PYTHONPATH": str(ROOT),
    }


def here(command: Sequence[str]) -> None:
    """Runs a command in this process, with its eight devices."""
    cli.app(list(command), standalone_mode=False)


@dataclass(frozen=True)
class Runs:
    """The folders that one process and two processes have written, `one` and `two`."""

    folder: Path
    hosts: Hosts
    one_evaluated: dict[str, float]

    def losses(self, run: str) -> np.ndarray:
        return np.array([r["loss"] for r in read_metrics(self.folder / run) if "step" in r])

    def tensors(self, model: str) -> dict[str, np.ndarray]:
        files = sorted((self.folder / model).glob("*.safetensors"))
        return {name: tensor for file in files for name, tensor in load_file(file).items()}


def stopped_at_2(run: Path, copy: Path) -> str:
    """A copy of a run that was killed after its second step."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "4")
    shutil.rmtree(copy / "model")
    return f"--output_dir={copy}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("hosts")
    (folder / "pairs").mkdir()
    for split, count in (("train", 48), ("test", 12)):
        rows = make_rows("cafe", split)[:count]
        (folder / "pairs" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = folder / "config.yaml"
    mixer = {str(folder / "pairs"): 1.0}
    # A cache for each, so that two processes tokenise for themselves.
    config.write_text(yaml.safe_dump({**CONFIG, "dataset_mixer": mixer, "sample_prompts": 1, "sample_tokens": 3}))

    def commands(name: str) -> list[list[str]]:
        model, split = f"--model={folder}/one/model", "--split=test"
        cache = f"--data_cache_dir={folder}/cache-{name}"
        return [
            ["score", str(config), split, model, f"--output={folder}/scores-{name}.jsonl", cache],
            ["eval", str(config), split, model, cache],
            ["export", str(config), "--model=2", "--max_shard_size=30KB", f"--output={folder}/export-{name}",
             f"--output_dir={folder}/one", cache],
        ]  # fmt: skip

    from contextlib import redirect_stdout
    from io import StringIO

    train = ["train", str(config)]

    def with_reference(name: str) -> list[str]:
        """A run whose processes share the reference's pass, a factored optimizer state and the choice of a step."""
        settings = ["objective=dpo", "max_steps=2", "eval_steps=1", "load_best_model_at_end=true", "optim=adafactor"]
        settings += [
            "sample_prompts=0",
            "save_steps=1",
            "save_total_limit=1",
            f"output_dir={folder}/dpo-{name}",
            f"data_cache_dir={folder}/cache-{name}",
        ]
        return [*train, *(f"--{setting}" for setting in settings)]

    here([*train, f"--output_dir={folder}/one", f"--data_cache_dir={folder}/cache-one"])
    here(with_reference("one"))
    with redirect_stdout(StringIO()) as printed:
        for command in commands("one"):
            here(command)
    resumed = stopped_at_2(folder / "one", folder / "one-then-two")
    cache = f"--data_cache_dir={folder}/cache-two"
    hosts = Hosts(
        folder,
        [
            [*train, f"--output_dir={folder}/two", "--mesh.fsdp=4", "--mesh.tensor=2", cache],
            [*train, resumed, "--mesh.fsdp=4", "--mesh.tensor=2", cache],
            [*with_reference("two"), "--mesh.fsdp=4", "--mesh.tensor=2"],
            *commands("two"),
        ],
    )
    assert hosts.wait(400) == [0, 0], hosts.said(0) + hosts.said(1)
    here([*train, stopped_at_2(folder / "two", folder / "two-then-one"), cache])
    yield Runs(folder, hosts, json.loads(printed.getvalue()))


def test_two_processes_train_as_one_does_on_another_mesh(runs: Runs) -> None:
    np.testing.assert_allclose(runs.losses("two"), runs.losses("one"), rtol=0, atol=1e-5)
    one, two = (
        [{k: v for k, v in r.items() if k.startswith("eval_") and "runtime" not in k} for r in read_metrics(folder)]
        for folder in (runs.folder / "one", runs.folder / "two")
    )
    assert len(two) == len(one)
    for ours, theirs in zip(two, one, strict=True):
        assert_close(ours, theirs)
    assert read_samples(runs.folder / "two") == read_samples(runs.folder / "one")
    assert [r["tokens"] for r in read_metrics(runs.folder / "two") if "step" in r] == [
        r["tokens"] for r in read_metrics(runs.folder / "one") if "step" in r
    ]


@pytest.mark.parametrize("run", ["one-then-two", "two-then-one"])
def test_a_run_goes_on_with_another_number_of_processes_and_another_mesh(runs: Runs, run: str) -> None:
    assert len(runs.losses(run)) == 4
    np.testing.assert_allclose(runs.losses(run), runs.losses("one"), rtol=0, atol=1e-5)


def test_two_processes_write_the_model_that_one_does(runs: Runs) -> None:
    one, two = runs.tensors("one/model"), runs.tensors("two/model")
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_allclose(two[name], one[name], atol=1e-5)
    names = [sorted(path.name for path in (runs.folder / run).rglob("*") if "checkpoints" not in path.parts)
             for run in ("one", "two")]  # fmt: skip
    assert names[0] == names[1]


def assert_close(ours: Any, theirs: Any) -> None:
    """Compares what two runs of `score` wrote: numbers within 1e-5, all else exactly."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert_close(value, theirs[key])
    elif isinstance(ours, list):
        for a, b in zip(ours, theirs, strict=True):
            assert_close(a, b)
    else:
        assert ours == (pytest.approx(theirs, rel=0, abs=1e-5) if isinstance(theirs, float) else theirs)


def test_two_processes_score_evaluate_and_export_as_one_does(runs: Runs) -> None:
    one, two = (
        [json.loads(line) for line in (runs.folder / f"scores-{name}.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [r["row"] for r in two] == list(range(12))
    for ours, theirs in zip(two, one, strict=True):
        assert_close(ours, theirs)
    assert json.loads(runs.hosts.said(0, "stdout")) == pytest.approx(runs.one_evaluated, rel=0, abs=1e-5)
    one_export, two_export = runs.tensors("export-one"), runs.tensors("export-two")
    assert one_export.keys() == two_export.keys()
    assert all(np.array_equal(one_export[name], two_export[name]) for name in one_export)
    assert len(list((runs.folder / "export-two").glob("*.safetensors"))) > 1
    assert (runs.folder / "export-two" / "model.safetensors.index.json").exists()


def test_two_processes_share_the_work_of_the_reference_and_choose_the_same_step(runs: Runs) -> None:
    np.testing.assert_allclose(runs.losses("dpo-two"), runs.losses("dpo-one"), rtol=0, atol=1e-5)
    assert runs.losses("dpo-two")[0] == pytest.approx(np.log(2), abs=1e-6)
    assert runs.hosts.said(0).count("reference: computing") == 2  # the training pairs and the evaluation pairs
    caches = [sorted(p.name for p in (runs.folder / f"cache-{name}").glob("reference-*/*")) for name in ("one", "two")]
    assert caches[0] == caches[1] == ["identity.json"] * 2 + ["sums-000000.bin"] * 2
    for name in ("one", "two"):
        best = read_facts(runs.folder / f"dpo-{name}")["model_step"]
        kept = {int(path.name) for path in (runs.folder / f"dpo-{name}" / "checkpoints").iterdir()}
        assert kept == {best, 2}
    for name, tensor in runs.tensors("dpo-one/model").items():
        np.testing.assert_allclose(runs.tensors("dpo-two/model")[name], tensor, atol=1e-5)


def test_only_the_first_process_prints(runs: Runs) -> None:
    assert "step 4/4" in runs.hosts.said(0)
    assert runs.hosts.said(1) == "" == runs.hosts.said(1, "stdout")


# --- one fate


def endless(folder: Path) -> list[str]:
    """A run that does not end by itself in the time of a test."""
    config = {**CONFIG, "dataset_mixer": {"builtin:cafe": 0.02}, "do_eval": False, "eval_strategy": "no"}
    config |= {
        "max_steps": 10**6,
        "save_steps": 10**5,
        "model_config": {**CONFIG["model_config"], "num_hidden_layers": 1},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return ["train", str(folder / "config.yaml"), f"--output_dir={folder}/run"]


@pytest.mark.slow
def test_a_process_that_fails_takes_the_other_down_and_both_say_why(tmp_path: Path) -> None:
    hosts = Hosts(tmp_path, [endless(tmp_path)], fails_at=3)
    hosts.await_file("run/metrics.jsonl")
    assert hosts.wait(WITHIN + 60) == [1, 1]
    assert "process 1 of 2" in hosts.said(1) and "OSError: the disk is gone" in hosts.said(1)
    assert "ends because of process 1 of 2" in hosts.said(0) and "OSError: the disk is gone" in hosts.said(0)
    assert "1 process(es) did not find what process 0 tokenised" in hosts.said(0)


def test_a_bad_row_ends_those_that_wait_for_the_tokens_too(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "Anna", "chosen": "One tea", "rejected": "One tea"}\n')
    command = [*endless(tmp_path), "--dataset_mixer={" + str(tmp_path / "bad.jsonl") + ": 1.0}"]
    hosts = Hosts(tmp_path, [command])
    assert hosts.wait(WITHIN + 60) == [1, 1]
    assert "process 0 of 2" in hosts.said(0) and "error: 1 of 1 rows of train cannot be used" in hosts.said(0)
    assert "Traceback" not in hosts.said(0)  # it is the user's to mend
    assert "ends because of process 0 of 2" in hosts.said(1) and "rows of train cannot be used" in hosts.said(1)


@pytest.mark.slow
def test_a_process_told_to_end_saves_a_step_with_the_other(tmp_path: Path) -> None:
    hosts = Hosts(tmp_path, [endless(tmp_path)])
    hosts.await_file("run/metrics.jsonl")
    hosts.processes[1].send_signal(signal.SIGTERM)
    assert hosts.wait(WITHIN) == [143, 143], hosts.said(0) + hosts.said(1)
    (step,) = (int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert f"ended by SIGTERM after step {step} of 1000000, which is saved" in hosts.said(0)


@pytest.mark.slow
def test_an_output_directory_that_is_not_shared_is_found_out_before_training(tmp_path: Path) -> None:
    hosts = Hosts(tmp_path, [[*endless(tmp_path)[:2], "--output_dir=run"]])  # each in its own working directory
    assert hosts.wait(WITHIN + 120) == [1, 1]
    assert "`output_dir` run is not the same folder on all hosts" in hosts.said(0)
    assert not list(tmp_path.glob("cwd.*/run/*"))


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_is_killed_takes_the_other_down_within_a_minute(killed: int, tmp_path: Path) -> None:
    hosts = Hosts(tmp_path, [endless(tmp_path)])
    hosts.await_file("run/metrics.jsonl")
    hosts.processes[killed].kill()
    at = time.monotonic()
    statuses = hosts.wait(WITHIN)
    print(f"after {time.monotonic() - at:.1f} s, statuses {statuses}")
    assert statuses[1 - killed] != 0
    said = hosts.said(1 - killed)
    # JAX's service names who is missing; where it died itself, the others miss the service.
    reason = (
        "Failed to send RPC to coordination service" if killed == 0 else r"stopped sending heartbeats\):\s+\S*\b1\b"
    )
    assert re.search(reason, said), said
