"""The Python API: every example of its page runs, and mistakes are the command line's, as exceptions."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from typer.testing import CliRunner

import jax_simpo as js
from jax_simpo.cli import app
from jax_simpo.errors import ConfigError, DataError, ModelError
from tests.training.runs import MODEL
from tests.whole_runs import quick_runs

__all__ = ["quick_runs"]

ROOT = Path(__file__).parents[1]
PAIRS = [
    {
        "prompt": f"Could I have a small {drink} with honey? The name is {guest}.",
        "chosen": f"Thank you, {guest}. Here is your small {drink} with honey.",
        "rejected": f"Thank you, {guest}. Here is your small {drink} with ice.",
    }
    for guest in ("Anna", "Ben", "Clara")
    for drink in ("tea", "coffee", "cocoa", "juice")
]


def config_of(folder: Path, **changes: Any) -> js.TrainConfig:
    settings = {
        "model_config": MODEL,
        "tokenizer_name_or_path": "builtin:cafe",
        "max_length": 128,
        "learning_rate": 1e-3,
        "global_batch_size": 4,
        "max_steps": 4,
        "dtype": "float32",
        "beta": 2.5,
        "output_dir": str(folder / "run"),
        "data_cache_dir": str(folder / "cache"),
    }
    return js.TrainConfig(**{**settings, **changes})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> js.TrainRun:
    return js.train(config_of(tmp_path_factory.mktemp("api")), PAIRS, PAIRS[:4], quiet=True)


def test_every_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/api.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) > 6
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/api.md", "exec"), namespace)
    for name in js.__all__:
        assert f"`{name}" in (ROOT / "docs/api.md").read_text(), f"docs/api.md does not mention {name}"


def test_importing_the_package_imports_nothing_heavy() -> None:
    program = (
        "import sys, jax_simpo; heavy = {'jax', 'numpy', 'pydantic', 'flax', 'transformers', 'datasets', 'rich'};"
        "print(sorted(heavy & set(sys.modules)), sorted(dir(jax_simpo)) == sorted([*jax_simpo.__all__, '__version__']))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] True"


def test_train_is_a_function_whatever_was_imported_before() -> None:
    program = "import jax_simpo.training.step, jax_simpo as js; print(callable(js.train), callable(js.score))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True True"


def test_a_name_that_does_not_exist_is_told_with_those_that_do() -> None:
    with pytest.raises(AttributeError, match=r"has no attribute 'trian'; its public names are .*train"):
        _ = js.trian


def test_a_run_returns_its_records_and_paths(run: js.TrainRun) -> None:
    written = [json.loads(line) for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert run.metrics == written
    assert [r["step"] for r in run.metrics if "step" in r] == [1, 2, 3, 4]
    assert run.metrics[-1]["eval_pairs"] == 4
    assert run.steps == 4 and not run.stopped_early
    assert (run.model_path / "config.json").exists() and "Evaluation (eval_pairs)" in run.report_path.read_text()


def test_pairs_in_memory_train_as_the_same_pairs_in_a_file(run: js.TrainRun, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    from_file = js.train(config_of(tmp_path, dataset_mixer={str(file): 1.0}), quiet=True)
    dataset = datasets.Dataset.from_list(PAIRS)
    from_dataset = js.train(config_of(tmp_path, output_dir=str(tmp_path / "dataset")), dataset, quiet=True)
    losses = [[r["loss"] for r in each.metrics if "step" in r] for each in (run, from_file, from_dataset)]
    assert losses[0] == losses[1] == losses[2]


def test_a_callback_sees_every_record_and_can_stop_a_run_that_then_continues(run: js.TrainRun, tmp_path: Path) -> None:
    config, records = config_of(tmp_path), []

    def stop_after_two(record: dict[str, Any]) -> bool:
        records.append(record)
        return record.get("step") == 2

    stopped = js.train(config, PAIRS, PAIRS[:4], callbacks=[stop_after_two], quiet=True)
    assert stopped.stopped_early and stopped.steps == 2
    assert records == stopped.metrics
    assert (stopped.output_dir / "checkpoints" / "2").is_dir() and (stopped.model_path / "config.json").exists()
    continued = js.train(
        config, PAIRS, PAIRS[:4], callbacks=[lambda record: record["loss"] if "loss" in record else None]
    )
    assert not continued.stopped_early and continued.steps == 4
    assert [r["loss"] for r in continued.metrics if "step" in r] == [r["loss"] for r in run.metrics if "step" in r]


def test_score_returns_what_the_command_writes(run: js.TrainRun, tmp_path: Path) -> None:
    file, output = tmp_path / "pairs.jsonl", tmp_path / "scores.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    arguments = ["--split=train", f"--output={output}", f"--model={run.model_path}"]
    overrides = ["--dataset_mixer={" + str(file) + ": 1.0}"]
    result = CliRunner().invoke(app, ["score", str(run.output_dir / "config.yaml"), *arguments, *overrides])
    assert result.exit_code == 0, result.output
    written = [json.loads(line) for line in output.read_text().splitlines()]
    model = js.load_model(run.model_path)
    assert js.score(model, PAIRS) == written
    metrics = js.evaluate(model, PAIRS)
    assert metrics["loss"] == pytest.approx(np.mean([record["loss"] for record in written]))
    assert model.tokenizer.eos_token and "llama model of" in repr(model)


def test_a_run_s_model_is_loaded_with_the_run_s_settings(run: js.TrainRun) -> None:
    config = js.load_model(run.model_path).setup.config
    assert (config.beta, config.dtype, config.max_length) == (2.5, "float32", 128)
    assert js.load_model(run.model_path, beta=1.0).setup.config.beta == 1.0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: js.TrainConfig(lerning_rate=1),
            ConfigError,
            r"unknown key `lerning_rate` \(value 1\).*`learning_rate`",
        ),
        (lambda: js.TrainConfig(model_name_or_path="x", beta="a"), ConfigError, "`beta` is 'a'; expected a number > 0"),
        (lambda: js.TrainConfig(model_name_or_path="x", fp16=True), ConfigError, "`fp16: true` cannot be honoured"),
        (lambda: js.TrainConfig(model_name_or_path="x", bf16=1), ConfigError, r"TrainConfig\(bf16\): .*true or false"),
        (lambda: js.TrainConfig(), ConfigError, "no model: give `model_name_or_path`"),
        (lambda: js.load_config("builtin:quikstart"), ConfigError, "did you mean `builtin:quickstart`"),
        (lambda: js.load_model("no/such/folder"), ModelError, "no such folder"),
    ],
)
def test_a_mistake_is_the_command_line_s_error(call: Any, error: type[js.UserError], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_mistake_in_pairs_names_the_row(run: js.TrainRun, tmp_path: Path) -> None:
    config = config_of(tmp_path)
    with pytest.raises(ConfigError, match="no data: give `dataset_mixer`"):
        js.train(config, quiet=True)
    with pytest.raises(DataError, match="pairs: there are no rows"):
        js.train(config, [], quiet=True)
    with pytest.raises(DataError, match="str is no list of pairs"):
        js.train(config, "pairs.jsonl", quiet=True)
    with pytest.raises(DataError, match="pairs, row 1"):
        js.train(config, [PAIRS[0], "text"], quiet=True)
    with pytest.raises(DataError, match="pairs, row 1"):
        js.score(js.load_model(run.model_path), [PAIRS[0], {**PAIRS[1], "rejected": 7}])


def test_keys_of_other_trainers_are_understood_in_python() -> None:
    config = js.TrainConfig(model_name_or_path="x", bf16=True, gradient_checkpointing=False, gamma=1.0, beta=2.0)
    assert (config.dtype, config.remat, config.gamma_beta_ratio) == ("bfloat16", "none", 0.5)
    assert any("`bf16: true` is read as `dtype: bfloat16`" in notice for notice in config.notices)


def test_test_size_holds_pairs_in_memory_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr("jax_simpo.training.trainer.train", lambda config, console, **splits: given.update(splits))
    renamed = [{"order": pair["prompt"], "chosen": pair["chosen"], "rejected": pair["rejected"]} for pair in PAIRS]
    config = config_of(tmp_path, test_size=4, dataset_columns={"prompt": "order"})
    assert config.do_eval and config.eval_splits == ["held_out"]
    js.train(config, renamed, quiet=True)
    sides = [{given[name].row(i)["prompt"] for i in range(len(given[name]))} for name in ("pairs", "eval_pairs")]
    assert [len(side) for side in sides] == [8, 4] and sides[0].isdisjoint(sides[1])
    with pytest.raises(ConfigError, match="`test_size` and `eval_pairs` are two ways"):
        js.train(config, renamed, renamed[:2], quiet=True)
