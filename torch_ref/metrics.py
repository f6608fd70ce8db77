"""`metrics.jsonl`: one JSON object per logged step."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

METRICS_FILE = "metrics.jsonl"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run so far; a last line that a killed run left half written is dropped."""
    path = folder / METRICS_FILE
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


class MetricsLog:
    """Appends records, if it was given a folder; the ranks other than the first give none."""

    def __init__(self, file: IO[str] | None) -> None:
        self._file = file

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes a record at once, so that a killed run loses none."""
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()


@contextmanager
def open_metrics(folder: Path | None, *, first_step: int) -> Iterator[MetricsLog]:
    """Opens the log; a resumed run first drops what it is about to write again."""
    if folder is None:
        yield MetricsLog(None)
        return
    kept = (
        [r for r in read_metrics(folder) if r["step" if "step" in r else "eval_step"] <= first_step]
        if first_step
        else []
    )
    path = folder / METRICS_FILE
    rewritten = path.with_suffix(".tmp")
    rewritten.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    rewritten.replace(path)
    with path.open("a", encoding="utf-8") as file:
        yield MetricsLog(file)


class Clock:
    """Seconds, tokens and pairs since the last logged step, without the time spent evaluating and saving."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Counts from nothing again."""
        self._started, self._tokens, self._pairs = time.perf_counter(), 0, 0

    def add(self, tokens: int, pairs: int) -> None:
        """Counts a finished step."""
        self._tokens += tokens
        self._pairs += pairs

    def speeds(self) -> dict[str, float]:
        """Tokens and pairs per second."""
        seconds = time.perf_counter() - self._started
        return {"tokens_per_second": self._tokens / seconds, "pairs_per_second": self._pairs / seconds}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Does not count the time inside."""
        stopped = time.perf_counter()
        yield
        self._started += time.perf_counter() - stopped
