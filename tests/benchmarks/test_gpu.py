"""The GPU measurements keep what they have, whatever ends a part or a call."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.gpu import PARTS, Part
from benchmarks.sources import ROOT


def part(ends: str, limit: float = 30, needs: tuple[str, ...] = (), least: float = 1) -> Part:
    return Part("a test", limit, "tests.benchmarks.part", ("--ends", ends), needs, least)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES"):  # `--device cpu` sets them; here they are set back
        monkeypatch.setenv(name, "cpu" if name == "JAX_PLATFORMS" else "")
    return tmp_path / "gpu"


def call(folder: Path, *options: str) -> int:
    return gpu.main([str(folder), "--device", "cpu", *options])


def numbers(folder: Path, name: str) -> list[int]:
    """Returns the data of a part's cells in the order in which they were measured."""
    return [line["data"] for line in lines(folder, name) if "data" in line]


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "cells" / f"{name}.jsonl").read_text().splitlines()]


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
    assert call(folder, "--minutes", str((gpu.ENDING + 2) / 60)) == 1
    summary = (folder / "summary.txt").read_text()
    assert "stuck: stopped after 2 s" in summary and "never: not begun" in summary
    assert all(line["short"] for line in lines(folder, "stuck")), "it got less than its limit"


def test_a_part_that_needs_more_time_than_is_left_lets_the_others_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "PARTS", {"long": part("well", least=60), "brief": part("well", limit=5)})
    minutes = f"{(gpu.ENDING + 20) / 60:.3f}"
    assert call(folder, "--minutes", minutes) == 1
    summary = (folder / "summary.txt").read_text()
    assert "long: not begun" in summary and "brief: ok" in summary
    assert f"long cannot begin in {float(minutes):g} minutes: give more with --minutes" in capfd.readouterr().out
    assert not any("short" in line for line in lines(folder, "brief"))


def test_what_failed_is_told_and_tried_again_when_all_else_is_measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "PARTS", {"bad": part("fails"), "dead": part("killed")})
    assert call(folder) == 1
    assert "bad: ok, 3 cells, 1 of them failed" in (folder / "summary.txt").read_text()
    capfd.readouterr()
    assert call(folder, "--resume") == 0
    shown = capfd.readouterr().out
    assert shown.index("== dead: ok") < shown.index("== bad: ok")
    assert "bad: ok, 3 cells," in (folder / "summary.txt").read_text()
    assert numbers(folder, "bad") == [0, {"failed": "no kernel"}, 2, 1]


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
        assert gpu.LEAST <= each.least < each.limit <= 60 * gpu.CALL_MINUTES - gpu.ENDING, name


@pytest.mark.slow
def test_a_real_part_that_is_killed_in_its_middle_goes_on_to_its_end(tmp_path: Path) -> None:
    folder = tmp_path / "gpu"
    command = [sys.executable, "-m", "benchmarks.gpu", str(folder), "--device", "cpu", "--part", "facts"]
    with subprocess.Popen([*command, "--slower", "3"], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("jax: matmul: "):  # printed when it is written
                process.kill()
                break
    assert process.wait() == -signal.SIGKILL
    before = numbers(folder, "facts")
    assert len(before) >= 3 and not (folder / "facts.md").exists() and not (folder / "summary.txt").exists()

    done = subprocess.run([*command, "--resume", "--slower", "3"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing is left" in done.stdout
    after = numbers(folder, "facts")
    assert after[: len(before)] == before and len(after) == 7, "nothing is measured twice"
    assert "facts: ok, 7 cells" in (folder / "summary.txt").read_text()
    assert before[2]["text"] in (folder / "facts.md").read_text()
    with tarfile.open(f"{folder}.tar.gz") as archive:
        assert {"gpu/facts.md", "gpu/cells/facts.jsonl"} <= set(archive.getnames())
