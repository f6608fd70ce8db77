"""Of sixty recorded runs the spoilt ones are flagged in their first half, and the good ones never.

The runs are real: `benchmarks/healthy_runs.py` trained them, and the slow test trains some of them again.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.healthy_runs import GOOD, SEEDS, Recorded, cases, read_recorded, train_case

RECORDED = Path(__file__).parents[2] / "docs" / "benchmarks"


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
    seed = SEEDS["test"][0]
    recorded = read_recorded(RECORDED / "healthy_runs-test.json.gz")
    for case, before in zip(cases(seed), recorded, strict=False):
        made = train_case(case, seed, tmp_path)
        assert made.traits == before.traits
        assert [finding.name for finding in made.early()] == [finding.name for finding in before.early()], case.name
        assert bool(made.findings()) == bool(before.findings()), case.name
