"""The PyTorch reference says so in one line where there is no PyTorch, and how to get it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.doc_stages import ROOT

# Runs the program in a process whose imports find no torch.
WITHOUT_TORCH = """
import runpy, sys
from importlib.machinery import PathFinder

find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.partition(".")[0] == "torch" else find(name, *rest)
sys.argv[0] = "torch_ref"
runpy.run_module("torch_ref", run_name="__main__", alter_sys=True)
"""


def test_the_reference_says_that_it_needs_torch_and_writes_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    environment.pop("RANK", None)
    command = [sys.executable, "-c", WITHOUT_TORCH, "train", "builtin:quickstart"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    said = "error: torch_ref needs PyTorch, which is not installed here: pip install 'jax-simpo[torch]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", said)
    assert list(tmp_path.iterdir()) == []
