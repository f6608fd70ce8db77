"""Keeps every measurement from the moment it is made, so that a killed benchmark goes on where it was.

A cell is one measurement with all its settings. A file of cells has two lines of JSON for each: one when the cell
begins, one when it is done. Every line is a single write at the end of the file, so whatever kills the process takes
at most the cell in progress, and the beginning of a line that was not finished is dropped when the file is opened next.

A cell counts as measured only with the same settings, the same source code of its script (`sources.py`) and in the same
place: machine, driver, versions of what computes there, and `XLA_FLAGS`. A measurement that failed, or of which a part
failed, is tried again by the next process, three times at most.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.facts import accelerator, commit, computing_versions, driver, main_module
from benchmarks.sources import code_digest

# A cell that began so often without an end is not tried again: it hangs, or takes more time than there is. Nor is one
# that failed so often.
MOST_STARTS = 3
# The variable that `gpu.py` sets for a part that gets less time than its limit. What is cut off then may only have been
# short of time, and that it began does not count.
SHORT_OF_TIME = "BENCHMARK_SHORT_OF_TIME"
# The variable that it sets for a part that has not come to its end yet: what failed waits until all else is measured.
NOT_AGAIN_YET = "BENCHMARK_NOT_AGAIN_YET"
# The exit status of a script that has measured everything, when what it measured is wrong.
WRONG = 3
CELLS_HELP = "File that keeps each measurement, to go on from after a kill."


def failed(data: Any) -> bool:
    """Returns True if a cell's data is the reason why there are no data."""
    return isinstance(data, Mapping) and "failed" in data


def failures_in(data: Any) -> list[str]:
    """Returns the reasons of everything in a cell's data that failed, however deep in them."""
    if failed(data):
        return [str(data["failed"])]
    parts = data.values() if isinstance(data, Mapping) else data if isinstance(data, list) else ()
    return [reason for part in parts for reason in failures_in(part)]


def first_line(error: BaseException) -> str:
    """Returns an exception's type and the first line of its message, for a cell that failed."""
    return f"{type(error).__name__}: {error}".partition("\n")[0][:300]


@dataclass(frozen=True)
class Counts:
    """The numbers of a file's cells.

    Attributes:
        cells: those that have an end.
        failed: of these, those that failed or are given up.
        partly: of these, those that have data, and in which something failed.
    """

    cells: int
    failed: int
    partly: int


class Cells:
    """The cells of a file, for one process that writes."""

    def __init__(self, path: Path | None, script: str | None = None) -> None:
        """Opens a file of cells, which need not exist.

        Args:
            path: the file; None keeps cells for this process alone.
            script: the module that measures them; the one that Python was started with when not given.
        """
        self._path = path
        self._place = {
            **{"code": code_digest(script or main_module()), "machine": accelerator(), "driver": driver()},
            **{"versions": list(computing_versions()), "xla_flags": os.environ.get("XLA_FLAGS", "")},
        }
        self._data: dict[str, Any] = {}
        self._cut_off: dict[str, int] = {}  # key -> how often it began without an end
        # key -> the data of each time that it failed, as a whole or in parts
        self._failures: dict[str, list[Any]] = {}
        self._tried_now: set[str] = set()  # keys that were measured in this process
        self.elsewhere = 0  # data of other code or from another place, which do not count
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            for line in _whole_lines(path):
                key = _key(line["cell"])
                if line["place"] != self._place:
                    self.elsewhere += "data" in line
                elif "data" in line:
                    self._keep(key, line["data"], line.get("short", False))
                elif not line.get("short"):
                    self._cut_off[key] = self._cut_off.get(key, 0) + 1

    def measured(self, settings: Mapping[str, Any]) -> Any:
        """Returns the data of a cell, or None if there are none. A failure is no data, unless only a part failed."""
        return self._data.get(_key(settings))

    def counts(self) -> Counts:
        """Counts the cells."""
        without = self._without_data()
        partly = sum(bool(failures_in(data)) for data in self._data.values())
        return Counts(len(self._data) + len(without), len(without), partly)

    def to_try_again(self) -> int:
        """Returns the number of cells that failed, also in parts, and are tried again by the next process."""
        partly = {key for key, data in self._data.items() if failures_in(data)}
        return sum(self._given_up(key) is None for key in self._without_data() | partly)

    def _without_data(self) -> set[str]:
        cut_off = {key for key, times in self._cut_off.items() if times >= MOST_STARTS}
        return (self._failures.keys() | cut_off) - self._data.keys()

    def put(self, settings: Mapping[str, Any], data: Any, seconds: float | None = None) -> Any:
        """Writes a cell and returns its data as they will be read back."""
        date = datetime.now(UTC).isoformat(timespec="seconds")
        taken = {} if seconds is None else {"seconds": round(seconds, 3)}
        place = {"place": self._place, "commit": commit(), "date": date}
        self._append({"cell": settings, **place, **_short(), **taken, "data": data})
        data = json.loads(json.dumps(data))
        self._keep(_key(settings), data, bool(_short()))
        return data

    def _keep(self, key: str, data: Any, was_short: bool) -> None:
        """Takes the data of a cell, whose last beginning now has its end.

        Of several measurements of which parts failed it keeps the one with the fewest failures, and of these the last.
        """
        if not was_short:
            self._cut_off[key] = max(0, self._cut_off.get(key, 0) - 1)
        if reasons := failures_in(data):
            self._failures.setdefault(key, []).append(data)
        if not failed(data) and (key not in self._data or len(reasons) <= len(failures_in(self._data[key]))):
            self._data[key] = data

    def _given_up(self, key: str, always: bool = False) -> Any:
        """Returns the data of a cell that is not tried again, its last failure; None if it is tried."""
        cut_off, failures = self._cut_off.get(key, 0), self._failures.get(key, [])
        if cut_off >= MOST_STARTS:
            return {"failed": f"was cut off {cut_off} times before it had a result"}
        if failures and (key in self._tried_now or (len(failures) >= MOST_STARTS and not always)):
            return failures[-1]
        return None

    def measure(self, settings: Mapping[str, Any], run: Callable[[], Any], *, always: bool = False) -> Any:
        """Returns the data of a cell, which is measured and written if it is not there yet.

        A measurement that raises has the data `{"failed": REASON, "details": MORE}`; of one that is given up, `details`
        may be missing. Both count in this process alone: the next one tries again what failed. Parts of the data may be
        `{"failed": REASON}` too; the next process measures the whole cell again, and the better data are kept.

        Args:
            settings: what is measured, with everything that it depends on.
            run: measures it.
            always: tries it again however often it failed, because nothing else can be measured without it.
        """
        key = _key(settings)
        known = self.measured(settings)
        given_up = self._given_up(key, always)
        if given_up is None and os.environ.get(NOT_AGAIN_YET) and not always:
            given_up = next(reversed(self._failures.get(key, [])), None)
        if known is not None and (not failures_in(known) or given_up is not None):
            return known
        if given_up is not None:
            return given_up
        if not _short():
            self._cut_off[key] = self._cut_off.get(key, 0) + 1
        self._append({"cell": settings, "place": self._place, **_short()})
        self._tried_now.add(key)
        started = time.perf_counter()
        try:
            data = run()
        except Exception as error:  # no kernel for this device, out of memory, a worker that died: other cells go on
            data = {"failed": first_line(error), "details": str(error)}
        if failed(data):
            print(f"failed: {json.dumps(settings)}: {data.get('details', data['failed'])}", flush=True)
        now = self.put(settings, data, time.perf_counter() - started)
        return self._data.get(key, now)

    def _append(self, line: Mapping[str, Any]) -> None:
        if self._path is None:
            return
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, json.dumps(line).encode() + b"\n")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _short() -> dict[str, bool]:
    return {"short": True} if os.environ.get(SHORT_OF_TIME) else {}


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
