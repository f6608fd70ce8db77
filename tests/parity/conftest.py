"""The float32 matrix, run once for all tests: two processes of PyTorch, two ranks of ZeRO-3, one process of JAX."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from parity.__main__ import main
from parity.cases import Job
from parity.compare import Outcome, compare


@dataclass(frozen=True)
class Matrix:
    """What `python -m parity --quick` left behind."""

    status: int
    folder: Path
    job: Job
    outcome: Outcome

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.folder / "report.json").read_text())


def run(folder: Path, *arguments: str) -> Matrix:
    status = main([*arguments, "--output", str(folder)])
    job = Job.load(folder / "job.json")
    return Matrix(status, folder, job, compare(job))


@pytest.fixture(scope="session")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    pytest.importorskip("deepspeed")
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # the first worker runs it, the others read what it left behind
        base = base.parent
    folder, done = base / "parity", base / "parity.status"
    with FileLock(base / "parity.lock"):
        if done.exists():
            job = Job.load(folder / "job.json")
            return Matrix(int(done.read_text()), folder, job, compare(job))
        found = run(folder, "--quick")
        done.write_text(str(found.status))
        return found
