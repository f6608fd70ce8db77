"""Sets the stage for the commands of each page of the documentation when a test runs them.

A reader has models of the hub, GPUs and hours; a test has a model of a few thousand parameters, two cores and seconds.
A page says here which of its words become others for that, and nothing else of its commands is changed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# Commands that no test starts: they install, build images, or hand the run to machines that are not here.
ELSEWHERE = ("pip install", "docker ", "sbatch ", "kubectl ")

_SHORT = {"max_steps": 2, "global_batch_size": 4, "dtype": "float32", "report_to": "none"}
_DATA = {"dataset_mixer": {"pairs": 1.0}, "dataset_splits": ["train", "test"]}
MY_RUN = {"model_name_or_path": "small", **_DATA, **_SHORT, "do_eval": True, "output_dir": "outputs/my-run"}


def text(page: str) -> str:
    """Returns the Markdown of a page, named from the folder docs/."""
    return (DOCS / page).read_text("utf-8")


def blocks(page: str, language: str = "bash|console") -> list[str]:
    """Returns the blocks of a page in a language."""
    return re.findall(rf"^```(?:{language})\n(.*?)^```", text(page), re.DOTALL | re.MULTILINE)


def block(page: str, language: str, part: str) -> str:
    """Returns the only block in a language that has a certain part."""
    (found,) = (own for own in blocks(page, language) if part in own)
    return found


def _settings(values: Mapping[str, object]) -> str:
    """Returns a config's keys as they are given on a command line."""
    return " ".join(f"--{key}='{json.dumps(value)}'" for key, value in values.items())


def _my_run(**more: object) -> str:
    return yaml.safe_dump({**MY_RUN, **more})


_ON_SMALL = _settings({key: MY_RUN[key] for key in ("model_name_or_path", *_DATA, *_SHORT)})


@dataclass(frozen=True)
class Stage:
    """Says what a page's commands find.

    Attributes:
        files: name of a file -> what makes its text.
        before: commands that run before those of the page.
        instead: words of a command -> those that a test runs, in this order.
        devices: number of CPU devices.
    """

    files: Mapping[str, Callable[[], str]] = field(default_factory=lambda: {"my-run.yaml": _my_run})
    before: Callable[[], list[str]] = list
    instead: Mapping[str, str] = field(default_factory=dict)
    devices: int = 1

    def commands(self, page: str) -> list[str]:
        """Returns what a shell is to run for a page, block by block."""
        return [*self.before(), *(self._run_here(own) for own in blocks(page))]

    def _run_here(self, commands: str) -> str:
        for word, own in self.instead.items():
            commands = commands.replace(word, own)
        return "".join(line for line in commands.splitlines(keepends=True) if not line.startswith(ELSEWHERE))


def _factory() -> str:
    return yaml.safe_dump(
        {"stage": "dpo", "pref_loss": "simpo", "pref_beta": 2.0, "simpo_gamma": 1.0, "finetuning_type": "lora"}
        | {"lora_rank": 8, "model_name_or_path": "small", "dataset": "mine", "dataset_dir": ".", "cutoff_len": 512}
        | {"max_steps": 2, "per_device_train_batch_size": 4, "output_dir": "outputs/theirs", "fp16": False}
    )


def _factory_data() -> str:
    columns = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
    return json.dumps({"mine": {"file_name": "my.jsonl", "ranking": True, "columns": columns}})


def _cafe() -> list[str]:
    """Makes the pairs and the config of the tutorial, and of it a config of two steps."""
    made = [own for own in blocks("tutorial.md") if "<<'END'" in own]
    return [*made, "sed 's/num_train_epochs: .*/max_steps: 2/' cafe.yaml > my-run.yaml"]


def _simpo_config() -> str:
    return (ROOT / "tests/fixtures/simpo_configs/llama-3-8b-instruct-v2.yaml").read_text()


_TRAIN = "jax-simpo train my-run.yaml"
_WATCH = "jax-simpo report --watch"
_UNTIL_CTRL_C = f"timeout --preserve-status -s INT 12 {_WATCH}"
_TOPOLOGIES = {"v5p:2x2x4": "cpu:16", "h100:8": "cpu:8"}
_REAL = f"builtin:quickstart-real --sample_tokens=4 {_settings({'max_steps': 1, 'global_batch_size': 4})}"
_ORIGINAL, _PUBLISHED = "training_configs/llama-3-8b-instruct-simpo-v2.yaml", "builtin:llama-3-8b-instruct-v2"

STAGES = {
    "../README.md": Stage(
        files={
            "my-run.yaml": lambda: _my_run(save_steps=1),
            "theirs.yaml": _factory,
            "dataset_info.json": _factory_data,
            "prompts.jsonl": lambda: '{"prompt": "Name a tea."}\n',
        },
        instead={
            "make ": f"make -n -C {ROOT} ",  # says what it would do; the tests are run by it, and not it by the tests
            "train builtin:quickstart": "train builtin:quickstart --max_steps=2",
            "init my-run.yaml": "init asked.yaml --model small --data pairs",
            "--output my-run.yaml": "--output converted.yaml",
            **_TOPOLOGIES,
            f"{_WATCH} outputs/my-run": f"{_UNTIL_CTRL_C} outputs/my-run",
            "chat outputs/my-run/model": "chat outputs/my-run/model < /dev/null",
            "--model 400": "--model 2",
        },
        devices=8,
    ),
    "choosing-settings.md": Stage(files={}, before=_cafe),
    "doctor.md": Stage(),
    "from-simpo-repository.md": Stage(
        files={_ORIGINAL: _simpo_config},
        instead={
            _ORIGINAL: f"{_ORIGINAL} {_ON_SMALL}",
            f"inspect {_PUBLISHED}": f"inspect {_PUBLISHED} {_ON_SMALL}",
            f"train {_PUBLISHED}": f"train {_PUBLISHED} {_ON_SMALL} --output_dir=outputs/again",
        },
    ),
    "hardware.md": Stage(instead=_TOPOLOGIES),
    "launch.md": Stage(
        instead={
            "configs/launch/multi-gpu.sh my-run.yaml": f"{ROOT}/configs/launch/multi-gpu.sh my-run.yaml",
            "train my-run.yaml": "train my-run.yaml --output_dir=outputs/two",
            # Both processes at once, on this machine.
            "10.0.0.1:8476": "127.0.0.1:PORT",
            "# on 10.0.0.1": "&",
            "# on the other": "&& wait $!",
        }
    ),
    "lora.md": Stage(
        files={"my-run.yaml": lambda: _my_run(**yaml.safe_load(block("lora.md", "yaml", "use_peft")), save_steps=1)},
        before=lambda: [_TRAIN],
    ),
    "objectives.md": Stage(
        files={
            "my_file.py": lambda: block("objectives.md", "python", "class MyObjective"),
            "config.yaml": lambda: _my_run(**yaml.safe_load(block("objectives.md", "yaml", "my_file.py"))),
        },
    ),
    "other-trainers.md": Stage(files={"llama3_lora_dpo.yaml": _factory, "dataset_info.json": _factory_data}),
    "plan.md": Stage(instead=_TOPOLOGIES),
    "real-model.md": Stage(
        instead={
            "make ": f"make -n -C {ROOT} ",
            "--max_steps=48 ": "",
            "builtin:quickstart-real --dataset_mixer='{my": f"{_REAL} --output_dir=outputs/own --dataset_mixer='{{my",
            "builtin:quickstart-real --dataset_mixer='{your-pairs": f"{_REAL} --dataset_mixer='{{pairs",
            "builtin:quickstart-real\n": f"{_REAL}\n",
            "CONFIG.yaml": "my-run.yaml",
        },
    ),
    "real-runs.md": Stage(
        files={"dpo.yaml": lambda: block("real-runs.md", "yaml", "# dpo.yaml")},
        instead={"dpo.yaml": f"dpo.yaml {_ON_SMALL} --chat_template=null --eval_steps=1 --sample_tokens=4"},
    ),
    "report.md": Stage(
        before=lambda: [f"{_TRAIN} --output_dir=outputs/{name}" for name in ("quickstart", "a", "b")],
        instead={_WATCH: _UNTIL_CTRL_C},
    ),
    "tracking.md": Stage(
        files={"run.yaml": lambda: _my_run(report_to=["tensorboard"])},
        before=lambda: ["jax-simpo train run.yaml --report_to=none"],
    ),
    "tutorial.md": Stage(files={}),
    "your-own-pairs.md": Stage(),
}
