"""Follows a run's folder while the run writes to it: reads what has been added, and writes nothing there."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_simpo.errors import CheckpointError
from jax_simpo.run import files
from jax_simpo.run.metrics import parse_record

_MOST_COMPARED = 4096  # bytes before the place to go on from, which must be those that were read there


class RunFollower:
    """The records of a run so far.

    Attributes:
        output: the run's folder.
        generation: how often reading has begun anew, because the run was resumed from an earlier step or replaced.
        train: training records.
        evals: evaluation records.
    """

    def __init__(self, output: Path) -> None:
        self.output, self.generation = output, 0
        self.train: list[Mapping[str, Any]] = []
        self.evals: list[Mapping[str, Any]] = []
        self._read_bytes, self._last_bytes, self._lines = 0, b"", 0

    def read(self) -> None:
        """Reads the records that were added since the last call. A last line that is still being written waits.

        Raises:
            CheckpointError: a line is no record.
        """
        path = self.output / files.METRICS
        try:
            file = path.open("rb")
        except FileNotFoundError:  # the run has not begun, or is being replaced
            self._begin_anew()
            return
        with file:
            file.seek(self._read_bytes - len(self._last_bytes))
            if file.read(len(self._last_bytes)) != self._last_bytes:  # a resumed run drops records
                self._begin_anew()
                file.seek(0)
            added = file.read()
        whole = added[: added.rfind(b"\n") + 1]
        lines = enumerate(whole.decode(errors="replace").splitlines(keepends=True), start=self._lines + 1)
        records = [parse_record(line, path, number) for number, line in lines]  # all of them, or nothing is taken
        self.train += [record for record in records if "step" in record]
        self.evals += [record for record in records if "step" not in record]
        self._lines += len(records)
        self._read_bytes += len(whole)
        self._last_bytes = (self._last_bytes + whole)[-_MOST_COMPARED:]

    def _begin_anew(self) -> None:
        if self._read_bytes:
            self.generation += 1
        self.train, self.evals = [], []
        self._read_bytes, self._last_bytes, self._lines = 0, b"", 0


def is_running(output: Path) -> bool:
    """Returns True if a run seems to be writing to the folder: its lock is there, and its process too where that shows.

    The lock is not tried: a run that starts at that moment would find it taken.
    """
    try:
        owner = json.loads((output / files.LOCK).read_text(encoding="utf-8"))
        if owner["host"] == socket.gethostname():
            os.kill(owner["process"], 0)  # sends nothing
        return True
    except PermissionError:  # another user's process
        return True
    except (OSError, ValueError, KeyError, TypeError):
        return False


def check_runs(outputs: list[Path]) -> None:
    """Makes sure that folders hold runs, finished or just begun.

    Raises:
        CheckpointError: one does not; the message says what to give.
    """
    for output in outputs:
        if not output.is_dir():
            raise CheckpointError(f"{output}: there is no such folder. Give the `output_dir` of a run, or its config")
        if not any((output / name).exists() for name in (files.METRICS, files.LOCK, files.MANIFEST)):
            raise CheckpointError(
                f"{output}: holds no run: there is neither {files.METRICS} nor {files.MANIFEST}. Give the `output_dir` "
                "of a run, and start the run first"
            )


def folder_names(outputs: list[Path]) -> list[str]:
    """Names runs by their folders, with as many parents as it takes to tell them apart."""
    parts = [output.resolve().parts for output in outputs]
    longest = max(map(len, parts))
    for depth in range(1, longest + 1):
        names = ["/".join(own[-depth:]) for own in parts]
        if len(set(names)) == len(names):
            break
    return names
