"""Of sixty recorded runs the spoilt ones are flagged in their first half, and the good ones never.

The runs are real: `benchmarks/healthy_runs.py` trained them, and the slow test trains some of them again.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.healthy_runs import GOOD, SEEDS, Recorded, cases, read_recorded

ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "docs" / "benchmarks"


@pytest.fixture(scope="module", params=["tuning", "test"])
def runs(request: pytest.FixtureRequest) -> list[Recorded]:
    return read_recorded(RECORDED / f"healthy_runs-{request.param}.json.gz")


def test_there_are_thirty_good_runs_and_thirty_spoilt_in_five_ways(runs: list[Recorded]) -> None:
    kinds = Counter(run.kind for run in runs)
    assert kinds.pop(GOOD) == 30 and list(kinds.values()) == [6] * 5
    expected = [(case.name, seed) for seed in sorted({run.seed for run in runs}) for case in cases(seed)]
    assert [(run.name, run.seed) for run in runs] == expected
    for run in runs:
        steps = [record["step"] for record in run.records if "step" in record]
        assert steps == list(range(1, run.traits.total_steps + 1))


def test_all_spoilt_runs_are_flagged_in_their_first_half_and_no_good_one_ever(runs: list[Recorded]) -> None:
    missed = [(run.name, run.seed) for run in runs if run.kind != GOOD and not run.early()]
    alarms = [(run.name, run.seed, run.findings()) for run in runs if run.kind == GOOD and run.findings()]
    assert missed == [] and alarms == []


def test_what_is_said_first_is_what_was_done(runs: list[Recorded]) -> None:
    names = {
        "learning rate": "learning-rate",
        "gamma": "gamma",
        "double BOS": "double-bos",
        "swapped labels": "swapped-labels",
        "missing EOS": "missing-eos",
    }
    for run in runs:
        if run.kind != GOOD:
            assert run.findings()[0].name == names[run.kind], (run.name, run.seed)


@pytest.mark.slow
def test_runs_that_are_made_anew_are_judged_as_those_recorded(tmp_path: Path) -> None:
    seed, environment = SEEDS["test"][0], {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, "-m", "benchmarks.healthy_runs", "--quick", "--work", str(tmp_path)]
    printed = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout
    made = dict(re.findall(rf"^{seed} (\S+): (.*)$", printed, flags=re.MULTILINE))
    recorded = [run for run in read_recorded(RECORDED / "healthy_runs-test.json.gz") if run.seed == seed]
    assert list(made) == [run.name for run in recorded]
    for run in recorded:
        names = [finding.name for finding in run.findings()]
        assert set(re.findall(r"(\S+) at \d+", made[run.name])) == set(names), run.name
