"""Keeps every measurement from the moment it is made, so that a killed benchmark goes on where it was.

A cell is one measurement with all its settings. A file of cells has two lines of JSON for each: one when the cell
begins, one when it is done. Every line is a single write at the end of the file, so whatever kills the process takes
at most the cell in progress, and the beginning of a line that was not finished is dropped when the file is opened next.

A cell counts as measured only with the same settings, the same source code and the same machine.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.facts import accelerator, code_digest, commit

# A cell that began so often without an end is not tried again: it hangs, or takes more time than there is.
MOST_STARTS = 3
# The exit status of a script that has measured everything, when what it measured is wrong.
WRONG = 3
CELLS_HELP = "File that keeps each measurement, to go on from after a kill."


def failed(data: Any) -> bool:
    """Returns True if a cell's data is the reason why there are no data."""
    return isinstance(data, Mapping) and "failed" in data


def first_line(error: BaseException) -> str:
    """Returns an exception's type and the first line of its message, for a cell that failed."""
    return f"{type(error).__name__}: {error}".partition("\n")[0][:300]


class Cells:
    """The cells of a file, for one process that writes."""

    def __init__(self, path: Path | None) -> None:
        """Opens a file of cells, which need not exist.

        Args:
            path: the file; None keeps cells for this process alone.
        """
        self._path = path
        self._place = {"code": code_digest(), "machine": accelerator()}
        self._data: dict[str, Any] = {}
        self._starts: dict[str, int] = {}
        self.elsewhere = 0  # data of other code or another machine, which do not count
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            for line in _whole_lines(path):
                key = _key(line["cell"])
                if line["place"] != self._place:
                    self.elsewhere += "data" in line
                elif "data" in line:
                    self._data[key] = line["data"]
                else:
                    self._starts[key] = self._starts.get(key, 0) + 1

    def measured(self, settings: Mapping[str, Any]) -> Any:
        """Returns the data of a cell, or None if there are none."""
        return self._data.get(_key(settings))

    def counts(self) -> tuple[int, int]:
        """Returns the number of cells that are measured, and how many of them failed."""
        return len(self._data), sum(failed(data) for data in self._data.values())

    def put(self, settings: Mapping[str, Any], data: Any, seconds: float | None = None) -> Any:
        """Writes a cell and returns its data as they will be read back."""
        date = datetime.now(UTC).isoformat(timespec="seconds")
        taken = {} if seconds is None else {"seconds": round(seconds, 3)}
        self._append({"cell": settings, "place": self._place, "commit": commit(), "date": date, **taken, "data": data})
        data = json.loads(json.dumps(data))
        self._data[_key(settings)] = data
        return data

    def measure(self, settings: Mapping[str, Any], run: Callable[[], Any]) -> Any:
        """Returns the data of a cell, which is measured and written if it is not there yet.

        A measurement that raises is a cell too: its data is `{"failed": REASON}`.
        """
        known = self.measured(settings)
        if known is not None:
            return known
        key = _key(settings)
        starts = self._starts.get(key, 0)
        if starts >= MOST_STARTS:
            return self.put(settings, {"failed": f"was cut off {starts} times before it had a result"})
        self._starts[key] = starts + 1
        self._append({"cell": settings, "place": self._place})
        started = time.perf_counter()
        try:
            data = run()
        except Exception as error:  # no kernel for this device, out of memory, a worker that died: other cells go on
            data = {"failed": first_line(error), "details": str(error)}
        if failed(data):
            print(f"failed: {json.dumps(settings)}: {data.get('details', data['failed'])}", flush=True)
        return self.put(settings, data, time.perf_counter() - started)

    def _append(self, line: Mapping[str, Any]) -> None:
        if self._path is None:
            return
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, json.dumps(line).encode() + b"\n")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """Reads the lines of a file of cells, after it has cut off a last line that was not finished."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def _key(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)
