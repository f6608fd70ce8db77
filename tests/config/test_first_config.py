"""`init` writes a config that loads, and the JSON schema says of files what the loader says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from jax_simpo.config import TrainConfig, help, json_schema, load_config
from jax_simpo.config.builtin import configs_folder
from jax_simpo.config.first_config import METHODS, QUESTIONS, Answers, write_config
from jax_simpo.config.objectives import OBJECTIVE_KEYS
from jax_simpo.errors import ConfigError

DEFAULTS = {question.option: question.default for question in QUESTIONS}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("objective", OBJECTIVE_KEYS)
def test_every_answer_gives_a_config_that_loads(objective: str, method: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(write_config(Answers(**{**DEFAULTS, "objective": objective, "method": method})))
    config = load_config(file)
    assert (config.objective, config.use_peft) == (objective, method == "lora")
    assert not config.notices
    assert config.eval_splits == ["held_out"] and config.do_eval


def test_a_folder_with_test_rows_is_evaluated_on_them(tmp_path: Path) -> None:
    for name in ("train.jsonl", "test.jsonl.gz"):
        (tmp_path / name).write_text("")
    config = yaml.safe_load(write_config(Answers(**{**DEFAULTS, "data": str(tmp_path)})))
    assert config["dataset_splits"] == ["train", "test"] and "test_size" not in config


@pytest.mark.parametrize("answer", [{"method": "qlora"}, {"objective": "kto"}, {"model": " "}])
def test_a_wrong_answer_is_an_error(answer: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(answer.values()))}: expected one of|is empty"):
        write_config(Answers(**{**DEFAULTS, **answer}))


# --- the JSON schema


@pytest.fixture(scope="module")
def validator() -> Any:
    jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema")
    written = json_schema.schema(TrainConfig)
    jsonschema.Draft202012Validator.check_schema(written)
    return jsonschema.Draft202012Validator(written)


def test_every_config_of_the_program_and_every_resolved_one_is_valid(validator: Any) -> None:
    files = list(configs_folder().glob("*.yaml"))
    assert files
    for file in files:
        validator.validate(yaml.safe_load(file.read_text()) | {"learning_rate": 1e-6})
        validator.validate(yaml.safe_load(load_config(file).to_yaml()) | {"learning_rate": 1e-6})


@pytest.mark.parametrize(
    "wrong",
    [
        {"lerning_rate": 1e-6},
        {"objective": 3},
        {"beta": 0},
        {"loss_type": "sigmiod"},
        {"mesh": {"fsd": 2}},
        {"dataset_splits": "train"},
        {"lora_r": 1.5},
        {"rows_per_device": "many"},
        {"dataset_columns": {"prompt": 3}},
    ],
)
def test_what_the_loader_refuses_is_marked_by_the_schema(wrong: dict[str, Any], validator: Any) -> None:
    values = {"model_name_or_path": "m", "dataset_mixer": {"pairs.jsonl": 1.0}}
    validator.validate(values)
    TrainConfig(**values)
    assert not validator.is_valid(values | wrong)
    with pytest.raises(ConfigError):
        TrainConfig(**{**values, **wrong})


def test_every_key_has_a_description() -> None:
    properties = json_schema.schema(TrainConfig)["properties"]
    assert properties.keys() >= help.keys_of(TrainConfig).keys() | {"bf16", "gamma"}
    assert all(entry["description"] for entry in properties.values())


def test_the_module_prints_the_schema() -> None:
    done = subprocess.run([sys.executable, "-m", "jax_simpo.config", "--schema"], capture_output=True, text=True)
    assert json.loads(done.stdout) == json.loads(json.dumps(json_schema.schema(TrainConfig)))
