"""Every script runs on its tiny preset and writes well-formed results. These tests check no speed."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
# Script -> a key of the measurements in its JSON.
SCRIPTS = {
    "throughput": "measured",
    "layers": "cells",
    "peers": "measured",
    "loss_head": "1000",
    "remat": "seconds",
    "host": "host",
    "streaming": "equal",
}
SLOW = ("throughput", "layers", "peers", "loss_head", "remat", "host")


def results(script: str, folder: Path, *options: str) -> dict[str, Any]:
    """Runs a script and reads its JSON."""
    environment = {key: value for key, value in os.environ.items() if key != "SIMPO_SHARED"}
    environment |= {"JAX_NUM_CPU_DEVICES": "1"}
    ran = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{script}", *options, "--output", str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    content: dict[str, Any] = json.loads((folder / f"{script}.json").read_text())
    return content


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_says_what_it_asks_expects_and_takes(script: str) -> None:
    text = importlib.import_module(f"benchmarks.{script}").__doc__ or ""
    assert "?" in text.splitlines()[0]
    assert "\nExpected" in text and "\nTakes about" in text


@pytest.mark.parametrize("script", [pytest.param(s, marks=pytest.mark.slow) if s in SLOW else s for s in SCRIPTS])
def test_a_script_writes_well_formed_results(script: str, tmp_path: Path) -> None:
    content = results(script, tmp_path, "--quick")
    assert content["data"][SCRIPTS[script]]
    assert not content["data"].get("failed")
    assert {"device", "machine", "versions", "date", "commit"} <= content["facts"].keys()
    assert f"benchmarks.{script}" in content["command"]
    page = (tmp_path / f"{script}.md").read_text()
    for table in content["tables"]:
        assert table["rows"] and all(len(row) == len(table["columns"]) for row in table["rows"])
        assert f"## {table['title']}" in page
    for picture in tmp_path.glob("*.png"):
        assert f"({picture.name})" in page


@pytest.mark.slow
@pytest.mark.parametrize("tensor", ["1", "2"])
def test_a_billion_parameters_stream_in_less_memory_than_a_third_more_than_the_largest_file(
    tensor: str, tmp_path: Path
) -> None:
    measured = results("streaming", tmp_path, "--tensor", tensor)["data"]
    assert measured["equal"] and measured["parameters"] > 10**9 and measured["files"] > 1
    for direction in ("load", "export"):
        assert measured[direction]["times_largest_file"] < 1.3, measured
