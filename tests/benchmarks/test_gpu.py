"""The GPU measurements keep what they have, whatever ends a part or a call."""

from __future__ import annotations

import json
import tarfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.gpu import PARTS, Part


def part(ends: str, limit: float = 30, needs: tuple[str, ...] = ()) -> Part:
    return Part("a test", limit, "tests.benchmarks.part", ("--ends", ends), needs)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES"):  # `--device cpu` sets them; here they are set back
        monkeypatch.setenv(name, "cpu" if name == "JAX_PLATFORMS" else "")
    return tmp_path / "gpu"


def call(folder: Path, *options: str) -> int:
    return gpu.main([str(folder), "--device", "cpu", *options])


def numbers(folder: Path, name: str) -> list[int]:
    """Returns the data of a part's cells in the order in which they were measured."""
    lines = [json.loads(line) for line in (folder / "cells" / f"{name}.jsonl").read_text().splitlines()]
    return [line["data"] for line in lines if "data" in line]


def test_parts_that_are_cut_off_are_finished_by_the_next_call(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    parts = {"dead": part("killed"), "stuck": part("hangs", limit=2), "fine": part("well"), "bad": part("wrong")}
    monkeypatch.setattr(gpu, "PARTS", parts)
    assert call(folder) == 1
    summary = (folder / "summary.txt").read_text()
    assert "dead: failed (SIGKILL): cell 1, 2 cells" in summary
    assert "stuck: stopped after 2 s, 2 cells" in summary
    assert "fine: ok, 3 cells" in summary
    assert "bad: done, and something is WRONG: a number is wrong, 3 cells" in summary
    assert (
        f"not done: dead, stuck; go on with: benchmarks/gpu.sh {folder} --resume --device cpu\n"
        in capfd.readouterr().out
    )

    assert call(folder) == 2, "measurements that exist are not begun anew"
    assert call(folder, "--resume") == 0
    shown = capfd.readouterr().out
    assert "nothing is left\n" in shown
    assert "== dead: ok" in shown and "== stuck: ok" in shown and "== fine" not in shown and "== bad" not in shown
    assert all(numbers(folder, name) == [0, 1, 2] for name in parts)
    with tarfile.open(f"{folder}.tar.gz") as archive:
        names = archive.getnames()
    assert {f"gpu/{name}.md" for name in parts} | {"gpu/summary.txt", "gpu/logs/dead.log"} <= set(names)


def test_a_call_ends_in_its_time_and_begins_no_part_that_it_has_no_time_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "PARTS", {"stuck": part("hangs"), "never": part("well")})
    monkeypatch.setattr(gpu, "LEAST", 1.0)
    assert call(folder, "--minutes", str((gpu.ENDING + 2) / 60)) == 1
    summary = (folder / "summary.txt").read_text()
    assert "stuck: stopped after 2 s" in summary and "never: not begun" in summary


def test_a_part_whose_packages_are_missing_is_told_first_and_the_rest_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "PARTS", {"more": part("well", needs=("no_such_package",)), "rest": part("well")})
    assert call(folder) == 0
    shown = capfd.readouterr().out
    assert shown.index("more cannot run: no_such_package missing. The rest runs.") < shown.index("== rest")
    assert "more: not run: no_such_package missing" in (folder / "summary.txt").read_text()


def test_every_part_is_a_script_and_its_time_is_that_of_a_call() -> None:
    for name, each in PARTS.items():
        assert find_spec(each.module), name
        assert gpu.LEAST < each.limit <= 60 * gpu.CALL_MINUTES - gpu.ENDING, name
