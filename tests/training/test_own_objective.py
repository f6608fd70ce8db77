"""An objective of the user's own: from a file, once the command line allows it, or as an object in Python."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml

import jax_simpo as js
from jax_simpo.config import identity_of, load_config
from jax_simpo.errors import ConfigError
from jax_simpo.objectives import Objective, Responses
from jax_simpo.training.objective import objective_of

FILE = '''
from dataclasses import dataclass
import jax
from jax_simpo.objectives import Objective

@dataclass(frozen=True, kw_only=True)
class MyObjective(Objective):
    """SimPO without a margin."""

    def losses(self, chosen, rejected):
        return jax.nn.softplus(-self.beta * (chosen.mean - rejected.mean))

class NotOne:
    pass

@dataclass(frozen=True, kw_only=True)
class NeedsMore(MyObjective):
    more: float

@dataclass(frozen=True, kw_only=True)
class Scalar(MyObjective):
    def losses(self, chosen, rejected):
        return super().losses(chosen, rejected).mean()

@dataclass(frozen=True, kw_only=True)
class Raises(MyObjective):
    def losses(self, chosen, rejected):
        return chosen.median
'''
SETTINGS: dict[str, Any] = {
    "model_config": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
    "tokenizer_name_or_path": "builtin:cafe",
    "dataset_mixer": {"builtin:cafe": 0.01},
    "max_length": 128,
    "global_batch_size": 16,
    "max_steps": 1,
    "dtype": "float32",
}


@dataclass(frozen=True, kw_only=True)
class Own(Objective):
    def losses(self, chosen: Responses, rejected: Responses) -> Any:
        return jax.nn.softplus(-self.beta * (chosen.mean - rejected.mean))


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(FILE)
    settings = {**SETTINGS, "objective": f"{tmp_path}/mine.py:MyObjective", "beta": 2.0}
    settings |= {"output_dir": str(tmp_path / "run"), "data_cache_dir": str(tmp_path / "cache")}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def test_a_file_that_names_code_is_refused_unless_the_command_line_allows_it(config_file: Path) -> None:
    refusal = re.escape(f"{config_file}, line ") + r"\d+: .*runs the code of that file.*add `--allow_code`"
    with pytest.raises(ConfigError, match=refusal):
        load_config(config_file)
    with pytest.raises(ConfigError, match=r"--objective=x.py:Y: .*runs the code"):
        load_config(config_file, ["--objective=x.py:Y"])
    assert load_config(config_file, ["--allow_code"]).objective == f"{config_file.parent}/mine.py:MyObjective"


def test_an_objective_in_a_file_and_one_in_python_train_as_simpo_without_a_margin_does(
    config_file: Path, tmp_path: Path
) -> None:
    from_file = js.train(load_config(config_file, ["--allow_code"]), quiet=True)
    settings = {**SETTINGS, "data_cache_dir": str(tmp_path / "cache")}
    runs = {
        "python": js.TrainConfig(objective=Own(beta=2.0), output_dir=str(tmp_path / "python"), **settings),
        "simpo": js.TrainConfig(beta=2.0, gamma_beta_ratio=0.0, output_dir=str(tmp_path / "simpo"), **settings),
    }
    losses = [run.metrics[0]["loss"] for run in (from_file, *(js.train(c, quiet=True) for c in runs.values()))]
    np.testing.assert_allclose(losses, losses[2], rtol=1e-6)
    assert "Own(beta=2.0" in (tmp_path / "python" / "config.yaml").read_text()
    assert "the objective `" in (tmp_path / "python" / "README.md").read_text()
    with pytest.raises(ConfigError, match="loading a model runs nobody's code"):
        js.load_model(from_file.model_path)
    with pytest.raises(ConfigError, match="made in Python"):
        js.load_model(tmp_path / "python" / "model")
    assert js.load_model(from_file.model_path, objective="simpo").setup.objective.beta == 2.0


def test_a_run_is_another_one_when_the_code_of_its_objective_has_changed(config_file: Path) -> None:
    config = load_config(config_file, ["--allow_code"])
    before = identity_of(config)
    assert identity_of(config) == before
    (config_file.parent / "mine.py").write_text(FILE.replace("softplus(-self", "softplus(-2 * self"))
    assert identity_of(config)["objective"] != before["objective"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine.py:Missing", "has no such class"),
        ("mine.py:NotOne", "derives from jax_simpo.objectives.Objective"),
        ("mine.py:NeedsMore", "cannot be made from the keys of the config: .*'more'"),
        ("mine.py:Scalar", "Scalar.losses returns .*expected one loss for each pair"),
        ("mine.py:Raises", "Raises.losses raises AttributeError: .*median"),
        ("gone.py:X", "there is no file"),
        ("broken.py:X", "cannot be run: SyntaxError"),
    ],
)
def test_what_is_no_objective_is_told(name: str, message: str, config_file: Path) -> None:
    (config_file.parent / "broken.py").write_text("def (")
    config = load_config(config_file, ["--allow_code", f"--objective={config_file.parent}/{name}"])
    with pytest.raises(ConfigError, match=message):
        objective_of(config)


def test_keys_that_the_class_does_not_have_and_objects_that_are_no_objective_are_refused(config_file: Path) -> None:
    config = load_config(config_file, ["--allow_code", "--alpha=0.5"])
    with pytest.raises(ConfigError, match=r"`alpha` has no effect with .*which has no such field"):
        objective_of(config)
    beside = js.TrainConfig(objective=Own(beta=2.0), beta=5.0, **SETTINGS)
    with pytest.raises(ConfigError, match="`beta` has no effect beside an `objective` made in Python"):
        objective_of(beside)
    unread = js.TrainConfig(objective=Own(beta=2.0), ref_model_name_or_path="x", **SETTINGS)
    with pytest.raises(ConfigError, match="`ref_model_name_or_path` has no effect with `objective` Own"):
        objective_of(unread)
    with pytest.raises(ConfigError, match="an objective of your own"):
        js.TrainConfig(objective=3, **SETTINGS)
