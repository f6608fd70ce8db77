"""The folders `checkpoints/STEP`: each appears, is replaced and disappears as a whole. Both trainers use them.

A step is written to `.STEP.writing`, sealed there, and then moved to its place. A kill at any moment leaves the former
step, the new one, or the new one sealed beside its place, where `clean` finds it.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from jax_simpo.run import files
from jax_simpo.run.whole import remove, sync_folder

_WRITING = re.compile(r"\.(\d+)\.writing(\..*)?|\d+\.orbax-checkpoint-tmp.*")  # Orbax adds to a name while it writes
_REMOVED = re.compile(r"\.\d+\.removed")


@dataclass(frozen=True)
class StepFolders:
    """The folders of the steps of one run.

    Attributes:
        directory: the folder that holds them.
    """

    directory: Path

    def __getitem__(self, step: int) -> Path:
        return self.directory / str(step)

    def all(self) -> list[int]:
        """Lists the steps, oldest first."""
        entries = self.directory.iterdir() if self.directory.is_dir() else ()
        return sorted(int(entry.name) for entry in entries if entry.name.isdecimal() and entry.is_dir())

    def writing(self, step: int) -> Path:
        """The path that a step is written to before it has its place."""
        return self.directory / f".{step}.writing"

    def begin(self) -> None:
        """Makes way for a step that is written next."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.clean()

    def finish(self, step: int) -> None:
        """Moves a step that is written and sealed to its place. A former one of the same number goes."""
        removed = self.directory / f".{step}.removed"
        shutil.rmtree(removed, ignore_errors=True)
        if self[step].exists():
            self[step].rename(removed)
        self.writing(step).rename(self[step])
        sync_folder(self.directory)
        shutil.rmtree(removed, ignore_errors=True)

    def thin_out(self, newest: int | None, *, saved: int, best: int | None) -> None:
        """Removes the older steps once a step is saved, and those that come after it: the run went back behind them.

        Args:
            newest: how many to keep; None keeps all.
            saved: the step that was saved.
            best: a step that stays, however old it is.
        """
        steps = [step for step in self.all() if step <= saved]
        old = steps[:-newest] if newest else []
        for step in self.all():
            if step > saved or (step in old and step != best):
                remove(self[step])

    def clean(self) -> None:
        """Removes what killed saves and removals left. A step that only had to be moved to its place is moved there."""
        for entry in list(self.directory.iterdir()) if self.directory.is_dir() else []:
            if found := _WRITING.fullmatch(entry.name):
                if found[1] and (entry / files.SEAL).exists():
                    self.finish(int(found[1]))
                else:
                    shutil.rmtree(entry)
        for entry in list(self.directory.iterdir()) if self.directory.is_dir() else []:
            if _REMOVED.fullmatch(entry.name):
                shutil.rmtree(entry)


def is_beside_steps(name: str) -> bool:
    """Returns True for what the trainers leave in `checkpoints` beside step folders: unfinished steps and helpers."""
    return bool(_WRITING.fullmatch(name) or _REMOVED.fullmatch(name)) or name in ("zero_to_fp32.py", "latest")
