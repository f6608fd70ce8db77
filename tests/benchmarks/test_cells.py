"""What was measured is not lost, whatever kills a benchmark, and not measured twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cells as module
from benchmarks.cells import MOST_STARTS, NOT_AGAIN_YET, SHORT_OF_TIME, Cells, Counts, failed

# Measures three cells and notes each; the process is killed in the middle of the second one the first time.
KILLED = """
import os, sys
from pathlib import Path
from benchmarks.cells import Cells

folder = Path(sys.argv[1])
def run(number):
    with (folder / "runs").open("a") as runs:
        runs.write(f"{number}\\n")
    if number == 1 and not (folder / "killed").exists():
        (folder / "killed").touch()
        os.kill(os.getpid(), 9)
    return {"squared": number**2}

cells = Cells(folder / "cells.jsonl")
print([cells.measure({"number": n}, lambda: run(n))["squared"] for n in range(3)])
"""


def measure(path: Path, settings: dict[str, Any], value: Any) -> tuple[Any, bool]:
    """Measures a cell in a store that is opened anew; returns its data, and True if it had to be measured."""
    runs = []
    data = Cells(path).measure(settings, lambda: runs.append(value) or value)
    return data, bool(runs)


def test_a_benchmark_that_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    assert subprocess.run(command).returncode == -9
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[0, 1, 4]"
    assert (tmp_path / "runs").read_text().split() == ["0", "1", "1", "2"]


def test_a_cell_is_known_by_its_settings_its_code_and_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cells.jsonl"
    assert measure(path, {"width": 64, "of": [1]}, 1.5) == (1.5, True)
    assert measure(path, {"of": [1], "width": 64}, 2.5) == (1.5, False)
    assert measure(path, {"width": 128, "of": [1]}, 2.5) == (2.5, True)
    for name in ("code_digest", "accelerator", "driver", "computing_versions"):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda *_: "another")
            assert measure(path, {"width": 64, "of": [1]}, 3.5) == (3.5, True)
            assert Cells(path).counts() == Counts(1, 0, 0) and Cells(path).elsewhere
    with monkeypatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--xla_another=true")
        assert measure(path, {"width": 64, "of": [1]}, 3.5) == (3.5, True)
    assert measure(path, {"width": 64, "of": [1]}, 2.5) == (1.5, False)


@pytest.mark.parametrize("cut", [1, 20, -1])
def test_a_line_that_was_not_finished_is_dropped(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    measure(path, {"n": 1}, 1)
    whole = path.read_bytes()
    measure(path, {"n": 2}, 2)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(whole + lines[2] + lines[3][:cut])
    assert measure(path, {"n": 2}, 3) == (3, True)
    assert measure(path, {"n": 1}, 3) == (1, False)
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_measurement_that_raises_is_tried_again_by_the_next_process_three_times_at_most(tmp_path: Path) -> None:
    path, runs = tmp_path / "cells.jsonl", []

    def run() -> None:
        runs.append(1)
        raise ValueError("no kernel\nand details")

    for tries in range(1, MOST_STARTS + 1):
        cells = Cells(path)
        data = cells.measure({}, run)
        assert failed(data) and data["failed"] == "ValueError: no kernel" and "details" in data["details"]
        assert cells.measure({}, run) == data and len(runs) == tries, "tried once a process"
        assert Cells(path).measured({}) is None and Cells(path).counts() == Counts(1, 1, 0)
        assert Cells(path).to_try_again() == (tries < MOST_STARTS)
    assert measure(path, {}, 1) == (data, False)
    assert Cells(path).measure({}, lambda: 5, always=True) == 5, "what all else depends on is never given up"
    assert measure(path, {}, 1) == (5, False) and Cells(path).counts() == Counts(1, 0, 0)


def test_a_cell_that_never_comes_to_an_end_is_given_up(tmp_path: Path) -> None:
    def run() -> None:
        raise KeyboardInterrupt

    for _ in range(MOST_STARTS):
        with pytest.raises(KeyboardInterrupt):
            Cells(tmp_path / "cells.jsonl").measure({}, run)
    data, measured = measure(tmp_path / "cells.jsonl", {}, 1)
    assert failed(data) and not measured
    assert Cells(tmp_path / "cells.jsonl").counts() == Counts(1, 1, 0)
    assert not Cells(tmp_path / "cells.jsonl").to_try_again()


def test_a_measurement_that_was_cut_off_for_want_of_time_is_not_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> None:
        raise KeyboardInterrupt

    monkeypatch.setenv(SHORT_OF_TIME, "1")
    for _ in range(MOST_STARTS + 1):
        with pytest.raises(KeyboardInterrupt):
            Cells(tmp_path / "cells.jsonl").measure({}, run)
    assert measure(tmp_path / "cells.jsonl", {}, 1) == (1, True)


def test_a_failure_inside_good_data_is_counted_and_tried_again_and_the_best_data_are_kept(tmp_path: Path) -> None:
    path, bad = tmp_path / "cells.jsonl", {"failed": "no memory"}
    one, two = {"a": 1, "b": {"c": bad}}, {"a": bad, "b": [bad]}
    assert measure(path, {}, two) == (two, True)
    assert Cells(path).counts() == Counts(1, 0, 1) and Cells(path).to_try_again() == 1
    assert measure(path, {}, one) == (one, True), "the next process tries again"
    assert measure(path, {}, two) == (one, True), "and what is worse does not count"
    assert Cells(path).counts() == Counts(1, 0, 1) and not Cells(path).to_try_again()
    assert measure(path, {}, {}) == (one, False), "three times at most"
    assert measure(path, {"n": 2}, two) == (two, True) and measure(path, {"n": 2}, {"a": 2}) == ({"a": 2}, True)
    assert Cells(path).counts() == Counts(2, 0, 1) and not Cells(path).to_try_again()


def test_what_failed_waits_until_a_part_has_come_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, bad = tmp_path / "cells.jsonl", {"failed": "no memory"}
    measure(path, {"n": 1}, bad)
    measure(path, {"n": 2}, {"a": bad})
    with monkeypatch.context() as patch:
        patch.setenv(NOT_AGAIN_YET, "1")
        assert measure(path, {"n": 1}, 1) == (bad, False)
        assert measure(path, {"n": 2}, 1) == ({"a": bad}, False)
        assert measure(path, {"n": 3}, 1) == (1, True)
    assert measure(path, {"n": 1}, 1) == measure(path, {"n": 2}, 1) == (1, True)
