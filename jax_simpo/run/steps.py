"""The folders `checkpoints/STEP`: each appears, is replaced and disappears as a whole. Both trainers use them.

A step is written to `.STEP.writing`, sealed there, and then moved to its place. A kill at any moment leaves the former
step, the new one, or the new one sealed beside its place, where `clean` finds it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from jax_simpo.run import files
from jax_simpo.run.whole import remove, sync_folder

_WRITING = re.compile(r"\.(\d+)\.writing(\..*)?|\d+\.orbax-checkpoint-tmp.*")  # Orbax adds to a name while it writes
_REMOVED = re.compile(r"\.\d+\.removed")
_DAMAGED = re.compile(r"\d+\.damaged")


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

    def leave_behind(self, step: int, damaged: Collection[int]) -> None:
        """Clears away the steps after the one that a run goes on from. Damaged ones are set aside as `STEP.damaged`."""
        for later in [other for other in self.all() if other > step]:
            if later in damaged:
                aside = self.directory / f"{later}.damaged"
                remove(aside)
                self[later].rename(aside)
            else:
                remove(self[later])

    def thin_out(self, newest: int | None, *, besides: Collection[int | None]) -> None:
        """Removes all steps but the newest ones.

        Args:
            newest: how many to keep; None keeps all.
            besides: steps that stay, however old they are.
        """
        for step in self.all()[:-newest] if newest else []:
            if step not in besides:
                remove(self[step])

    def clean(self) -> None:
        """Removes what killed saves and removals left. A step that only had to be moved to its place is moved there."""
        for entry in list(self.directory.iterdir()) if self.directory.is_dir() else []:
            found = _WRITING.fullmatch(entry.name)
            if found and found[1] and (entry / files.SEAL).exists():
                self.finish(int(found[1]))
        for entry in list(self.directory.iterdir()) if self.directory.is_dir() else []:
            if _WRITING.fullmatch(entry.name) or _REMOVED.fullmatch(entry.name):
                shutil.rmtree(entry, ignore_errors=True)


def is_beside_steps(name: str) -> bool:
    """Returns True for what the trainers leave in `checkpoints` beside whole steps."""
    patterns = (_WRITING, _REMOVED, _DAMAGED)
    return any(pattern.fullmatch(name) for pattern in patterns) or name in ("zero_to_fp32.py", "latest")


def kept_steps(output: Path) -> str:
    """Says from where a run would go on; for `signals.keeping`."""
    steps = StepFolders(output / files.CHECKPOINTS).all()
    return f"{output} keeps step {steps[-1]}, from which the run goes on" if steps else f"{output} holds no step yet"
