"""What was measured is not lost, whatever kills a benchmark, and not measured twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cells as module
from benchmarks.cells import MOST_STARTS, Cells, failed

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
            patch.setattr(module, name, lambda: "another")
            assert measure(path, {"width": 64, "of": [1]}, 3.5) == (3.5, True)
            assert Cells(path).counts() == (1, 0) and Cells(path).elsewhere
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
        assert Cells(path).measured({}) is None and Cells(path).counts() == (1, 1)
        assert Cells(path).to_try_again() == (tries < MOST_STARTS)
    assert measure(path, {}, 1) == (data, False)
    assert Cells(path).measure({}, lambda: 5, always=True) == 5, "what all else depends on is never given up"
    assert measure(path, {}, 1) == (5, False) and Cells(path).counts() == (1, 0)


def test_a_cell_that_never_comes_to_an_end_is_given_up(tmp_path: Path) -> None:
    def run() -> None:
        raise KeyboardInterrupt

    for _ in range(MOST_STARTS):
        with pytest.raises(KeyboardInterrupt):
            Cells(tmp_path / "cells.jsonl").measure({}, run)
    data, measured = measure(tmp_path / "cells.jsonl", {}, 1)
    assert failed(data) and not measured
    assert Cells(tmp_path / "cells.jsonl").counts() == (1, 1) and not Cells(tmp_path / "cells.jsonl").to_try_again()
