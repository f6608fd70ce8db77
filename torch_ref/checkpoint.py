"""Checkpoints of a run, in `checkpoints/STEP/`: what the engine writes, and `run.json`, which says what run it is.

`run.json` is written last: a step without it was not finished, is never restored, and is removed when the run goes on.
Engines unpickle what they read (DeepSpeed's checkpoints are pickles): resume from folders you trust only.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from jax_simpo.config import TrainConfig
from jax_simpo.data.pairs import PairLengths
from jax_simpo.errors import CheckpointError, ConfigError
from torch_ref.distributed import Ranks
from torch_ref.engine import Engine

CHECKPOINTS = "checkpoints"
RUN_FILE = "run.json"
JAX_MARK = "_CHECKPOINT_METADATA"  # Orbax leaves it in its folders


class Checkpoints:
    """The checkpoints of one output directory; `keep` of them are kept, the newest, or all if it is None."""

    def __init__(self, output: Path, ranks: Ranks, *, keep: int | None = None) -> None:
        self.folder = output / CHECKPOINTS
        self._ranks, self._keep = ranks, keep

    def steps(self) -> list[int]:
        """The finished steps, oldest first.

        Raises:
            CheckpointError: the folder is that of a run of `jax-simpo`.
        """
        if not self.folder.is_dir():
            return []
        numbered = [child for child in self.folder.iterdir() if child.name.isdecimal()]
        if any((child / JAX_MARK).exists() for child in numbered):
            raise CheckpointError(
                f"{self.folder} holds checkpoints of `jax-simpo train`, which torch_ref cannot read. Give another "
                "`output_dir`; to start from its model, set `model_name_or_path` to its folder `model`"
            )
        return sorted(int(child.name) for child in numbered if (child / RUN_FILE).exists())

    def run(self, step: int) -> dict[str, Any]:
        """What run a step is of."""
        return json.loads((self.folder / str(step) / RUN_FILE).read_text(encoding="utf-8"))

    def save(self, step: int, engine: Engine, run: Mapping[str, Any]) -> None:
        """Writes a step; all ranks call it."""
        folder = self.folder / str(step)
        self._ranks.first(lambda: self._clear(folder))
        engine.save(folder)
        self._ranks.wait()
        self._ranks.first(lambda: self._finish(folder, {**run, "engine": engine.name}))

    def load(self, step: int, engine: Engine) -> None:
        """Restores a step into an engine; all ranks call it.

        Raises:
            CheckpointError: another engine wrote it, or it is damaged.
        """
        wrote = self.run(step)["engine"]
        if wrote != engine.name:
            raise CheckpointError(
                f"{self.folder / str(step)} was written by {wrote}, this is {engine.name}. Continue the run as it was "
                "started, or start another from its exported model"
            )
        engine.load(self.folder / str(step))

    def _clear(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)

    def _finish(self, folder: Path, run: Mapping[str, Any]) -> None:
        temporary = folder / f"{RUN_FILE}.tmp"
        temporary.write_text(json.dumps(run, indent=2), encoding="utf-8")
        temporary.replace(folder / RUN_FILE)
        for step in self.steps()[: -self._keep] if self._keep else []:
            (self.folder / str(step) / RUN_FILE).unlink()  # first, so that a half removed step is none
            shutil.rmtree(self.folder / str(step))


def resume_step(config: TrainConfig, checkpoints: Checkpoints) -> int:
    """The step to continue from, as `resume_from_checkpoint` says; 0 starts afresh.

    Raises:
        ConfigError: the key's value is none it may have.
        CheckpointError: there is no such checkpoint, or there are some that would be lost.
    """
    wanted, steps, folder = config.resume_from_checkpoint, checkpoints.steps(), checkpoints.folder
    if wanted is False:
        if steps:
            raise CheckpointError(
                f"`resume_from_checkpoint` is false, but {folder} holds checkpoints (steps {steps}). Give another "
                "`output_dir`, or set `overwrite_output_dir: true` to remove them"
            )
        return 0
    if wanted is None or wanted is True:
        if wanted and not steps:
            raise CheckpointError(
                f"`resume_from_checkpoint` is true, but {folder} holds no checkpoint. Remove the key to start afresh, "
                "or correct `output_dir`"
            )
        return steps[-1] if steps else 0
    name = Path(str(wanted)).name.removeprefix("checkpoint-")
    parent = Path(str(wanted)).parent
    if not name.isdecimal() or (parent != Path(".") and parent.absolute() != folder.absolute()):
        raise ConfigError(
            f"`resume_from_checkpoint` is {wanted!r}; expected true, false, a step number, or a folder {folder}/STEP"
        )
    if int(name) not in steps:
        raise CheckpointError(f"{folder}: there is no step {name}; there are: {steps or 'none'}")
    return int(name)


def identity(config: TrainConfig, batch: int, lengths: PairLengths) -> dict[str, Any]:
    """What makes this run this run: what a resume must have in common with it."""
    digest = sha256()
    for column in (lengths.chosen_inputs, lengths.rejected_inputs, lengths.shared_inputs, lengths.chosen_targets):
        digest.update(column.tobytes())
    pairs = f"{len(lengths)} pairs, lengths {digest.hexdigest()[:16]}"
    values = {**config.run_identity(), "global_batch_size": batch, "training pairs": pairs}
    return json.loads(json.dumps(values))  # as it reads after a round trip through a file


def check_same_run(saved: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
    """Refuses to continue a run as another one.

    Raises:
        CheckpointError: names every key that differs, with both values, and what to do.
    """
    keys = [key for key in {**saved, **now} if key != "engine" and saved.get(key) != now.get(key)]
    if keys:
        differ = "\n".join(f"  {key}: was {saved.get(key)!r}, is {now.get(key)!r}" for key in keys)
        raise CheckpointError(
            f"{where} holds a checkpoint of another run; these settings differ:\n{differ}\nSet them back to continue "
            "it, give another `output_dir`, or set `overwrite_output_dir: true` to remove it and start afresh"
        )
