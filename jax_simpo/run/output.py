"""The output directory of a run: what may be written there, continued there, or removed from there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from jax_simpo.config import TrainConfig
from jax_simpo.errors import CheckpointError, ConfigError
from jax_simpo.run.checkpoint import Checkpoints
from jax_simpo.run.files import CHECKPOINTS, MODEL
from jax_simpo.run.metrics import METRICS_FILE
from jax_simpo.run.report import FACTS_FILE
from jax_simpo.run.samples import SAMPLES_FILE
from jax_simpo.run.whole import check_replaceable

# What a run writes, and all that `overwrite_output_dir` removes.
RUN_FILES = (
    *("config.yaml", METRICS_FILE, CHECKPOINTS, MODEL, SAMPLES_FILE),
    *(FACTS_FILE, "README.md", "report.html", "curves.png"),
)


def check_output(config: TrainConfig, output: Path) -> None:
    """Makes the output directory, or makes sure that it may be written to.

    Raises:
        CheckpointError: it cannot, or it holds a run that `overwrite_output_dir` does not give away, or one that this
            run starts from.
        ModelError: its `model` folder holds files that are no part of a model.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CheckpointError(
            f"`output_dir` {output} cannot be written to: {error.strerror}. Give a folder that can"
        ) from error
    if config.overwrite_output_dir:
        _check_nothing_needed_is_removed(config, output)
    elif (output / MODEL).exists() and not any((output / CHECKPOINTS).glob("*")):
        raise CheckpointError(
            f"{output} holds a finished run without checkpoints, which would be lost. Give another `output_dir`, or "
            "set `overwrite_output_dir: true` to train it again"
        )
    check_replaceable(output / MODEL)


def _check_nothing_needed_is_removed(config: TrainConfig, output: Path) -> None:
    """A second round that starts from the first one's model must not begin by deleting it."""
    needed = {"model_name_or_path": config.model_name_or_path, "tokenizer_name_or_path": config.tokenizer_name_or_path}
    needed |= {f"dataset_mixer.{source}": source for source in config.dataset_mixer}
    removed = [(output / name).resolve() for name in RUN_FILES]
    for key, name in needed.items():
        if name is not None and any(Path(name).resolve().is_relative_to(path) for path in removed):
            raise CheckpointError(
                f"`{key}` {name} lies in `output_dir` {output}, which `overwrite_output_dir` would clear first. Give "
                "another `output_dir`"
            )


def remove_run(output: Path) -> None:
    """Removes what a run wrote, and nothing else."""
    for name in RUN_FILES:
        path = output / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def starting_point(config: TrainConfig, output: Path) -> tuple[int, dict[str, Any]]:
    """The step to continue from and the identity saved with it; step 0 starts afresh.

    Raises:
        CheckpointError, ConfigError: `resume_from_checkpoint` asks for what is not there.
    """
    if config.overwrite_output_dir or not (output / CHECKPOINTS).is_dir():
        return _choose_step(config.resume_from_checkpoint, [], output), {}
    with Checkpoints(output / CHECKPOINTS, read_only=True) as checkpoints:
        step = _choose_step(config.resume_from_checkpoint, checkpoints.steps(), output)
        return (step, checkpoints.run(step)) if step else (0, {})


def _choose_step(wanted: bool | int | str | None, steps: list[int], output: Path) -> int:
    """Which of the steps there are `resume_from_checkpoint` means."""
    if wanted is False:
        if steps:
            raise CheckpointError(
                f"`resume_from_checkpoint` is false, but {output} holds checkpoints (steps {steps}). Give another "
                "`output_dir`, or set `overwrite_output_dir: true` to remove them"
            )
        return 0
    if wanted is None or wanted is True:
        if wanted and not steps:
            raise CheckpointError(
                f"`resume_from_checkpoint` is true, but {output / CHECKPOINTS} holds no checkpoint. Remove the key to "
                "start afresh, or correct `output_dir`"
            )
        return steps[-1] if steps else 0
    folder = Path(str(wanted))
    step = folder.name.removeprefix("checkpoint-")
    elsewhere = len(folder.parts) > 1 and folder.parent.absolute() != (output / CHECKPOINTS).absolute()
    if not step.isdecimal() or elsewhere:
        raise ConfigError(
            f"`resume_from_checkpoint` is {wanted!r}; expected true, false, a step number, or a folder "
            f"{output / CHECKPOINTS}/STEP"
        )
    if int(step) not in steps:
        raise CheckpointError(f"{output / CHECKPOINTS}: there is no step {step}; there are: {steps or 'none'}")
    return int(step)


def check_not_finished(output: Path, step: int, total_steps: int) -> None:
    """Refuses to train nothing. A run that was killed before its last step was exported is not finished.

    Raises:
        CheckpointError: all steps are done and the model of the last one is exported.
    """
    exported = _facts(output).get("exported_step") if (output / MODEL).exists() else None
    if step >= total_steps and exported == step:
        raise CheckpointError(
            f"{output} holds this run, finished at step {step}: nothing is left to train. Give another `output_dir`, "
            "or set `overwrite_output_dir: true` to train it again"
        )


def note_export(output: Path, step: int) -> None:
    """Notes in `run.json` of which step `model/` is."""
    (output / FACTS_FILE).write_text(json.dumps({**_facts(output), "exported_step": step}, indent=2) + "\n")


def _facts(output: Path) -> dict[str, Any]:
    path = output / FACTS_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
