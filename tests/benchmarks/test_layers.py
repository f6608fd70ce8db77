"""The layers' benchmark leaves out what fails and says why; with nothing measured it ends in an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import layers
from benchmarks.workers import WorkerFailed

RUNS = ("dense, mlp", "pallas, mlp")


class Side:
    """A side's process in which some runs raise."""

    def __init__(self, failing: set[str], ending: tuple[str | None, ...] = ()) -> None:
        self.failing = failing
        self.ending = ending
        self.asked: list[list[str]] = []

    def ask(self, limit: float, *, without: list[str] = (), do: str = "time", **_: Any) -> dict[str, Any]:  # type: ignore[assignment]
        if do == "facts":
            return {"device": "cpu (test)", "implementations": ["dense"], "matmul_flops_per_second": 1e9}
        self.asked.append(list(without))
        for run in self.ending:
            if run is None or run not in without:
                raise WorkerFailed(f"{run}: did not answer within 1 s\nthe log", run)
        for run in RUNS:
            if run in self.failing and run not in without:
                return {"failed": f"{run} has no kernel", "run": run}
        return {run: {"seconds": [1.0, 2.0]} for run in RUNS if run not in without}

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_a_run_that_fails_is_left_out_with_its_reason_and_the_others_are_timed() -> None:
    side: Any = Side({RUNS[0]})
    times = layers._ask(side, 1.0, {"prefix": 8})
    assert times == {RUNS[0]: {"failed": f"{RUNS[0]} has no kernel"}, RUNS[1]: {"seconds": [1.0, 2.0]}}
    assert side.asked == [[], [RUNS[0]]]


def test_a_run_that_hangs_or_ends_its_process_is_left_out_too() -> None:
    side: Any = Side(set(), ending=RUNS[:1])
    times = layers._ask(side, 1.0, {"prefix": 8})
    assert times[RUNS[0]] == {"failed": f"WorkerFailed: {RUNS[0]}: did not answer within 1 s"}
    assert times[RUNS[1]] == {"seconds": [1.0, 2.0]}
    assert side.asked == [[], [RUNS[0]]]


def test_a_process_that_ends_before_it_begins_a_run_fails_the_cell() -> None:
    side: Any = Side(set(), ending=(None,))
    with pytest.raises(WorkerFailed):
        layers._ask(side, 1.0, {})
    assert len(side.asked) == 1


def test_a_cell_fails_if_every_run_does() -> None:
    side: Any = Side(set(RUNS))
    with pytest.raises(RuntimeError, match="dense, mlp has no kernel; pallas, mlp: pallas, mlp has no kernel"):
        layers._ask(side, 1.0, {})


def test_the_script_ends_in_an_error_if_nothing_could_be_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(layers, "RestartedWorker", lambda *_: Side(set(RUNS)))
    with pytest.raises(SystemExit, match=r"nothing could be measured: .*jax, prefix 128, response 128"):
        layers.main(tmp_path, quick=True)
    assert not list(tmp_path.iterdir())


def test_the_script_ends_in_an_error_if_jax_cannot_say_what_device_it_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Broken(Side):
        def ask(self, *_: Any, **__: Any) -> dict[str, Any]:
            raise RuntimeError("no plugin")

    monkeypatch.setattr(layers, "RestartedWorker", lambda *_: Broken(set()))
    with pytest.raises(SystemExit, match="the side of JAX cannot run: no plugin"):
        layers.main(tmp_path, quick=True)
