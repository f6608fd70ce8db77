"""Every script runs on its tiny preset and writes well-formed results. These tests check no speed."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
QuickRun = Callable[[str], tuple[dict[str, Any], Path]]


class Page(NamedTuple):
    """A script with the options that write a page, and a key of the measurements in the page's JSON."""

    script: str
    key: str
    options: tuple[str, ...] = ()


PAGES = {
    "throughput": Page("throughput", "measured"),
    "layers": Page("layers", "cells"),
    "peers": Page("peers", "measured"),
    "peers-dpo": Page("peers", "measured", ("--objective", "dpo")),
    "loss_head": Page("loss_head", "1000"),
    "remat": Page("remat", "seconds"),
    "trees": Page("trees", "measured"),
    "host": Page("host", "host"),
    "streaming": Page("streaming", "equal"),
    "saving": Page("saving", "measured"),
    "decoding": Page("decoding", "measured"),
    "facts": Page("peaks", "jax matmul"),
    "attention_speed": Page("attention_speed", "cells", ("--width", "64", "--layout", "shared")),
    "plans": Page("plans", "plans"),
    "kernel_schedule": Page("kernel_schedule", "profiles"),
}
QUICK = ("streaming",)


def results(name: str, folder: Path, *options: str) -> dict[str, Any]:
    """Runs the script of a page and reads the page's JSON."""
    page = PAGES[name]
    environment = {key: value for key, value in os.environ.items() if key != "SIMPO_SHARED"}
    environment |= {"JAX_NUM_CPU_DEVICES": "1"}
    ran = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{page.script}", *page.options, *options, "--output", str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    content: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return content


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> QuickRun:
    """Runs a page's script on its tiny preset, once; gives the JSON and the folder of the results."""

    @cache
    def run(name: str) -> tuple[dict[str, Any], Path]:
        folder = tmp_path_factory.mktemp(name)
        return results(name, folder, "--quick"), folder

    return run


@pytest.mark.parametrize("script", sorted({page.script for page in PAGES.values()}))
def test_a_script_says_what_it_asks_expects_and_takes(script: str) -> None:
    text = importlib.import_module(f"benchmarks.{script}").__doc__ or ""
    assert "?" in text.splitlines()[0]
    assert "\nExpected" in text and "\nTakes about" in text


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in PAGES])
def test_a_script_writes_well_formed_results(name: str, quick_run: QuickRun) -> None:
    content, folder = quick_run(name)
    assert content["data"][PAGES[name].key]
    assert not content["data"].get("failed")
    assert {"device", "machine", "versions", "date", "commit"} <= content["facts"].keys()
    assert f"benchmarks.{PAGES[name].script}" in content["command"]
    page = (folder / f"{name}.md").read_text()
    for table in content["tables"]:
        assert table["rows"] and all(len(row) == len(table["columns"]) for row in table["rows"])
        assert f"## {table['title']}" in page
    for picture in folder.glob("*.png"):
        assert f"({picture.name})" in page


@pytest.mark.slow
@pytest.mark.parametrize("name", ["peers", "peers-dpo"])
def test_all_contenders_start_from_the_same_loss(name: str, quick_run: QuickRun) -> None:
    measured = quick_run(name)[0]["data"]["measured"]
    losses = {contender: answers[0]["loss"] for contender, answers in measured.items()}
    exact = [loss for contender, loss in losses.items() if contender.endswith("float32")]
    assert len(exact) == 4 and max(exact) - min(exact) < 1e-5, losses
    assert max(losses.values()) - min(losses.values()) < 1e-3, losses
    assert min(abs(loss - math.log(2)) for loss in exact) > 1e-3  # DPO's loss under the start model


@pytest.mark.slow
def test_a_step_of_dpo_takes_the_memory_of_a_step_of_simpo(
    quick_run: QuickRun,
) -> None:
    compared = quick_run("throughput")[0]["data"]["dpo"]
    for measured in compared.values():
        assert measured["bytes"]["DPO"] == pytest.approx(measured["bytes"]["SimPO"], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("tensor", ["1", "2"])
def test_a_billion_parameters_stream_in_less_memory_than_a_third_more_than_the_largest_file(
    tensor: str, tmp_path: Path
) -> None:
    measured = results("streaming", tmp_path, "--tensor", tensor)["data"]
    assert measured["equal"] and measured["parameters"] > 10**9 and measured["files"] > 1
    for direction in ("load", "export"):
        assert measured[direction]["times_largest_file"] < 1.3, measured
