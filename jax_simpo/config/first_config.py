"""Writes somebody's first config from the answers to five questions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax_simpo.config import help, objectives, yaml_files
from jax_simpo.config.schema import TrainConfig
from jax_simpo.errors import ConfigError
from jax_simpo.pages import page_url

# Peak learning rates to begin with, of whole models; adapters take ten times as much. SimPO: the published runs have
# 3e-7 to 1e-6. DPO: 5e-7, as Zephyr and Tulu 3. ORPO: 5e-6, as the alignment handbook's recipes.
_RATES = {"simpo": 1e-6, "alphapo": 1e-6, "orpo": 5e-6}
_OTHER_RATE = 5e-7
METHODS = ("full", "lora")


@dataclass(frozen=True)
class Question:
    """One of the questions: the option that answers it, its text, and the answer if nothing is said."""

    option: str
    text: str
    default: str


QUESTIONS = (
    Question("model", "Model to start from (hub id, folder or GGUF file)", "Qwen/Qwen2.5-0.5B-Instruct"),
    Question("data", "Preference data (file, folder or hub id)", "trl-lib/ultrafeedback_binarized"),
    Question("objective", f"Objective ({', '.join(objectives.OBJECTIVE_KEYS)})", "simpo"),
    Question("method", f"What is trained: the whole model or an adapter ({', '.join(METHODS)})", "full"),
    Question("output_dir", "Folder of the run", "outputs/run"),
)


@dataclass(frozen=True)
class Answers:
    """The answers to the questions."""

    model: str
    data: str
    objective: str
    method: str
    output_dir: str


def write_config(answers: Answers) -> str:
    """Returns the text of the config.

    Raises:
        ConfigError: an answer is none of those that a question takes.
    """
    if answers.method not in METHODS:
        raise ConfigError(f"--method {answers.method}: expected one of {', '.join(METHODS)}")
    if answers.objective not in objectives.OBJECTIVE_KEYS:
        raise ConfigError(
            f"--objective {answers.objective}: expected one of {', '.join(objectives.OBJECTIVE_KEYS)} "
            f"({page_url('objectives')})"
        )
    sections = list(_sections(answers))
    values: dict[str, Any] = {key: value for _, keys in sections for key, value in keys.items()}
    TrainConfig(**values)  # raises what is wrong before anything is written
    lines = [
        f"# Made by `jax-simpo init`. All keys: {page_url('config')}; `jax-simpo inspect` shows what is trained on."
    ]
    for comment, keys in sections:
        lines += ["", f"# {comment}", yaml_files.dump(keys).rstrip("\n")]
    return "\n".join(lines) + "\n"


def _sections(answers: Answers) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the parts of the config, each with a comment."""
    yield "The model, and the type computed in.", {"model_name_or_path": answers.model, "dtype": "bfloat16"}
    yield _data(answers.data)
    read = objectives.defaults(answers.objective)
    keys = {key: value for key, value in read.items() if value is not None}
    yield "What is minimised, with its keys at their defaults.", {"objective": answers.objective, **keys}
    rate = _RATES.get(answers.objective, _OTHER_RATE) * (10 if answers.method == "lora" else 1)
    if answers.method == "lora":
        adapter = {key: help.default_of(TrainConfig, key) for key in ("lora_r", "lora_alpha")}
        yield "The adapter, on all linear layers.", {"use_peft": True, **adapter}
    yield (
        "The learning rate is the first thing to try others of. Published runs have 128 pairs a step.",
        {
            "learning_rate": float(f"{rate:.3g}"),
            "lr_scheduler_type": "cosine",
            "warmup_ratio": 0.1,
            "num_train_epochs": 1.0,
            "global_batch_size": 64,
        },
    )
    yield (
        "Evaluation, and the folder of everything that is written.",
        {"eval_strategy": "epoch", "logging_steps": 1, "output_dir": answers.output_dir},
    )


def _data(name: str) -> tuple[str, dict[str, Any]]:
    """Returns the keys of the data, and what they say of evaluation."""
    folder = Path(name).expanduser()
    has_test = folder.is_dir() and any(file.name.startswith("test") for file in folder.iterdir())
    lengths = {"max_length": 2048, "max_prompt_length": 1800}
    if has_test or name.startswith("builtin:"):
        return "The pairs, and their splits.", {
            "dataset_mixer": {name: 1.0},
            "dataset_splits": ["train", "test"],
            **lengths,
        }
    return (
        "The pairs. A twentieth of the prompts is held out; if there is a split `test`, name it in `dataset_splits`.",
        {"dataset_mixer": {name: 1.0}, "dataset_splits": ["train"], "test_size": 0.05, **lengths},
    )
