"""The output directory of a run: checked before anything is done, cleared only when everything is known to be good."""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from pathlib import Path

from jax_simpo.config import TrainConfig
from jax_simpo.errors import CheckpointError
from jax_simpo.run import files
from jax_simpo.run.manifest import check_free, check_unchanged, claim, read_manifest, write_manifest
from jax_simpo.run.steps import is_beside_steps
from jax_simpo.run.whole import check_replaceable, remove


def make_output(output: Path) -> None:
    """Makes the output directory, or makes sure that it can be written to.

    Raises:
        CheckpointError: it cannot.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise CheckpointError(
            f"`output_dir` {output} cannot be written to: {error.strerror}. Give a folder that can"
        ) from error


def check_output(config: TrainConfig, output: Path, *, writes: Collection[str] = files.OF_EVERY_RUN) -> None:
    """Makes sure that this run may write to its output directory. Nothing in it is changed.

    Args:
        config: the settings of the run.
        output: its `output_dir`.
        writes: names of the files that the run will write.

    Raises:
        CheckpointError: it holds a file that the run would replace and no run wrote, a file that has changed since its
            run wrote it, or a finished run that `overwrite_output_dir` does not give away; or `overwrite_output_dir`
            would remove something that this run starts from.
        ModelError: its `model` folder holds files that are no part of a model.
    """
    check_free(output, writes)
    if config.overwrite_output_dir:
        _check_nothing_needed_is_removed(config, output)
    else:
        check_unchanged(output, (files.FACTS, files.SAMPLES))
        if _has_model(output) and not any((output / files.CHECKPOINTS).glob("*")):
            raise CheckpointError(
                f"{output} holds a finished run without checkpoints, which would be lost. Give another `output_dir`, "
                "or set `overwrite_output_dir: true` to train it again"
            )
    check_replaceable(output / files.MODEL)


def _has_model(output: Path) -> bool:
    return (output / files.MODEL).is_dir() and any((output / files.MODEL).iterdir())


def _check_nothing_needed_is_removed(config: TrainConfig, output: Path) -> None:
    """A second round that starts from the first one's model must not begin by deleting it."""
    keys = ("model_name_or_path", "ref_model_name_or_path", "tokenizer_name_or_path")
    needed = {key: getattr(config, key) for key in keys}
    needed |= {f"dataset_mixer.{source}": source for source in config.dataset_mixer}
    removed = [(output / name).resolve() for name in read_manifest(output)]
    for key, name in needed.items():
        if name is not None and any(Path(name).expanduser().resolve().is_relative_to(path) for path in removed):
            raise CheckpointError(
                f"`{key}` {name} lies in `output_dir` {output}, which `overwrite_output_dir` would clear first. Give "
                "another `output_dir`"
            )


def prepare_output(config: TrainConfig, output: Path) -> None:
    """Makes way for a run: with `overwrite_output_dir` it removes the former one.

    The trainers call it last, once everything that the new run needs is known to be good.

    Raises:
        CheckpointError: there is a folder `checkpoints` by now that no run wrote.
        ModelError: the `model` folder holds files that are no part of a model.
    """
    if config.overwrite_output_dir:
        remove_run(output)
    claim(output, files.CHECKPOINTS)


def remove_run(output: Path) -> None:
    """Removes what a run wrote, as its manifest lists it, and nothing else.

    Of the folder `checkpoints` the step folders are removed, and the folder itself once it is empty.

    Raises:
        ModelError: the `model` folder holds files that are no part of a model.
    """
    names = read_manifest(output)
    check_replaceable(output / files.MODEL)
    write_manifest(output, names)  # an older run has none, and may be killed half way through this
    for name in names - {files.CHECKPOINTS}:
        remove(output / name)
    checkpoints = output / files.CHECKPOINTS
    if files.CHECKPOINTS in names and checkpoints.is_dir():
        for entry in list(checkpoints.iterdir()):
            if entry.name.isdecimal() or is_beside_steps(entry.name):
                remove(entry)
        if not any(checkpoints.iterdir()):
            checkpoints.rmdir()
    write_manifest(output, names & {files.CHECKPOINTS} if checkpoints.exists() else ())
