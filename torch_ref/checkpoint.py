"""Checkpoints of a run, in `checkpoints/STEP/`: the engine's files, `run.json` with the run's identity, and the seal.

Nothing is read from a step before its files are known to be those that were saved. But engines unpickle what they read
(DeepSpeed's checkpoints are pickles), and a seal is no signature: resume from folders you trust only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_simpo.config import TrainConfig
from jax_simpo.errors import CheckpointError, ConfigError
from jax_simpo.run import files
from jax_simpo.run.resume import ENGINE, Resume, check_trainer, choose_step
from jax_simpo.run.seal import Seal, file_names, find_damage
from jax_simpo.run.steps import StepFolders
from jax_simpo.run.sums import Sum, sums_of
from jax_simpo.run.whole import write_text
from torch_ref.distributed import Ranks
from torch_ref.engine import Engine


class Checkpoints:
    """The checkpoints of one output directory.

    Args:
        output: the output directory.
        ranks: the ranks of the run.
        keep: number of checkpoints to keep, the newest, besides one that `save` is told to keep; None keeps all.
    """

    def __init__(self, output: Path, ranks: Ranks, *, keep: int | None = None) -> None:
        self._folders = StepFolders(output / files.CHECKPOINTS)
        self._output, self._ranks, self._keep = output, ranks, keep
        self._whole: set[int] = set()

    def steps(self) -> list[int]:
        """The steps, oldest first."""
        return self._folders.all()

    def choose(self, config: TrainConfig) -> Resume:
        """Chooses the step to go on from. The first rank calls it.

        Raises:
            CheckpointError: there is no whole step such as `resume_from_checkpoint` asks for, or `jax-simpo train`
                wrote it.
            ConfigError: the value of `resume_from_checkpoint` is none that the key may have.
        """
        steps: list[int] = []
        if not config.overwrite_output_dir:
            check_trainer(self._output, "python -m torch_ref train")
            self._folders.clean()
            steps = self.steps()
        return choose_step(config.resume_from_checkpoint, steps, self._output, self.damage)

    def damage(self, step: int) -> str | None:
        """Returns what is wrong with a step in a line that begins with a file's name; None if it is as it was saved."""
        found = None if step in self._whole else find_damage(self._folders[step], step)
        if found is None:
            self._whole.add(step)
        return found

    def metrics(self, step: int) -> Sum:
        """The sum of the run's records up to a step."""
        return Seal.read(self._folders[step]).metrics

    def run(self, step: int) -> dict[str, Any]:
        """Returns the identity of the run that saved a step, and the name of its engine."""
        return dict(json.loads((self._folders[step] / files.STEP_RUN).read_text(encoding="utf-8")))

    def save(
        self, step: int, engine: Engine, run: Mapping[str, Any], metrics: Sum, *, keep_step: int | None = None
    ) -> None:
        """Writes a step, with the run's identity, and then removes the oldest ones. All ranks call it.

        Args:
            step: optimizer steps done.
            engine: the model with its optimizer.
            run: the run's identity.
            metrics: the sum of the run's records so far, on the first rank.
            keep_step: a step that is not removed, however old it is.

        Raises:
            CheckpointError: the step cannot be written; the former steps are as they were.
        """
        writing = self._folders.writing(step)

        def finish() -> None:
            try:
                write_text(writing / files.STEP_RUN, json.dumps({**run, ENGINE: engine.name}, indent=2))
                Seal(step, metrics, sums_of(writing, file_names(writing), to_disk=True)).write(writing)
                self._folders.finish(step)
            except (OSError, ConfigError) as error:
                raise self._not_saved(step, str(error)) from error
            self._folders.thin_out(self._keep, besides=(step, keep_step))

        self._ranks.first(self._folders.begin)
        failure = None
        try:
            engine.save(writing)
        except (OSError, RuntimeError) as error:  # a full disk, a quota, a folder that is gone
            failure = (str(error).splitlines() or [type(error).__name__])[0]
        if failure := next(filter(None, self._ranks.collect(failure)), None):
            self._ranks.first(self._folders.clean)
            raise self._not_saved(step, failure)
        self._ranks.first(finish)

    def _not_saved(self, step: int, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{self._folders.directory}: step {step} cannot be saved: {reason}. Make room and start the same command "
            "again: the run goes on from the newest step"
        )

    def leave_behind(self, resume: Resume) -> None:
        """Makes the steps go that come after the one that the run goes on from. The first rank calls it."""
        self._folders.leave_behind(resume.step, resume.damaged)

    def load(self, step: int, engine: Engine) -> None:
        """Restores a step into an engine. All ranks call it.

        Raises:
            CheckpointError: there is no such step, another engine wrote it, or it is damaged.
        """
        writer = self._ranks.first(lambda: self._writer(step))
        if writer != engine.name:
            raise CheckpointError(
                f"{self._folders[step]} was written by {writer}, this is {engine.name}. Continue the run as it was "
                "started, or start another from its exported model"
            )
        engine.load(self._folders[step])

    def _writer(self, step: int) -> str:
        """Returns the name of the engine that wrote a step."""
        steps = self.steps()
        if step not in steps:
            there_are = ", ".join(map(str, steps)) or "none"
            raise CheckpointError(
                f"{self._folders.directory}: there is no checkpoint of step {step}; there are: {there_are}"
            )
        if damage := self.damage(step):
            raise CheckpointError(f"{self._folders[step]}: {damage}")
        return str(self.run(step)[ENGINE])
