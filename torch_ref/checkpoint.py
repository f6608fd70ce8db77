"""Checkpoints of a run, in `checkpoints/STEP/`: the files of the engine, and `run.json` with the run's identity.

`run.json` is written last: a step without it was not finished, is never restored, and is replaced when the run goes on.
Engines unpickle what they read (DeepSpeed's checkpoints are pickles): resume from folders you trust only.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jax_simpo.errors import CheckpointError
from jax_simpo.run import files
from jax_simpo.run.resume import ENGINE, check_trainer
from jax_simpo.run.whole import remove, write_text
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
        self.folder = output / files.CHECKPOINTS
        self._output, self._ranks, self._keep = output, ranks, keep

    def steps(self) -> list[int]:
        """The finished steps, oldest first.

        Raises:
            CheckpointError: `jax-simpo train` wrote them.
        """
        check_trainer(self._output, "python -m torch_ref train")
        if not self.folder.is_dir():
            return []
        finished = [child.name for child in self.folder.iterdir() if (child / files.STEP_RUN).exists()]
        return sorted(int(name) for name in finished if name.isdecimal())

    def run(self, step: int) -> dict[str, Any]:
        """Returns the identity of the run that saved a step, and the name of its engine."""
        return dict(json.loads((self.folder / str(step) / files.STEP_RUN).read_text(encoding="utf-8")))

    def save(self, step: int, engine: Engine, run: Mapping[str, Any], *, keep_step: int | None = None) -> None:
        """Writes a step, with the run's identity, and then removes the oldest ones. All ranks call it.

        Args:
            step: optimizer steps done.
            engine: the model with its optimizer.
            run: the run's identity.
            keep_step: a step that is not removed, however old it is.
        """
        folder = self.folder / str(step)
        self._ranks.first(lambda: self._clear(folder))
        engine.save(folder)
        self._ranks.wait()
        self._ranks.first(lambda: self._finish(folder, {**run, ENGINE: engine.name}))
        self._ranks.first(lambda: self._remove_old((step, keep_step)))

    def load(self, step: int, engine: Engine) -> None:
        """Restores a step into an engine. All ranks call it.

        Raises:
            CheckpointError: there is no such step, another engine wrote it, or it is damaged.
        """
        writer = self._ranks.first(lambda: self._writer(step))
        if writer != engine.name:
            raise CheckpointError(
                f"{self.folder / str(step)} was written by {writer}, this is {engine.name}. Continue the run as it was "
                "started, or start another from its exported model"
            )
        engine.load(self.folder / str(step))

    def _clear(self, folder: Path) -> None:
        remove(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)

    def _finish(self, folder: Path, run: Mapping[str, Any]) -> None:
        write_text(folder / files.STEP_RUN, json.dumps(run, indent=2))

    def _remove_old(self, kept: Collection[int | None]) -> None:
        """Removes all steps but the newest and these."""
        for step in self.steps()[: -self._keep] if self._keep else []:
            if step not in kept:
                remove(self.folder / str(step))

    def _writer(self, step: int) -> str:
        """Returns the name of the engine that wrote a step."""
        steps = self.steps()
        if step not in steps:
            there_are = ", ".join(map(str, steps)) or "none"
            raise CheckpointError(f"{self.folder}: there is no checkpoint of step {step}; there are: {there_are}")
        return str(self.run(step)[ENGINE])
