"""`metrics.jsonl`: the records of a run, one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Appends one JSON object per logged step; a resumed run first drops what it is about to write again.

    With `write` off it does nothing: of several processes one writes.
    """

    def __init__(self, folder: Path, *, first_step: int, write: bool = True) -> None:
        self.path = folder / METRICS_FILE
        self._file: TextIO | None = None
        if not write:
            return
        kept = [r for r in read_metrics(folder) if record_step(r) <= first_step] if first_step else []
        rewritten = self.path.with_suffix(".tmp")
        rewritten.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        rewritten.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes a record at once, so that a killed run loses none."""
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run so far; a last line that a killed run left half written is dropped."""
    path = folder / METRICS_FILE
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def record_step(record: Mapping[str, Any]) -> int:
    """The step of a training or evaluation record."""
    return record["step"] if "step" in record else record["eval_step"]
