"""Contenders run in processes of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.facts import forget_peak, machine_facts, peak_resident_bytes
from benchmarks.workers import Worker, WorkerFailed


def test_a_worker_that_ends_says_what_it_printed_last(tmp_path: Path) -> None:
    with (
        Worker(["benchmarks.contenders.no_such_contender"], tmp_path / "log") as worker,
        pytest.raises(WorkerFailed, match="No module named"),
    ):
        worker.ask(do="warm")


def test_peak_memory_sees_what_was_given_back() -> None:
    forget_peak()  # an earlier test may have raised the peak of this process
    before = peak_resident_bytes()
    block = bytearray(b"x" * (64 << 20))
    del block
    assert peak_resident_bytes() >= before + (32 << 20)


def test_facts_name_machine_versions_date_and_commit() -> None:
    facts = machine_facts("cpu")
    assert facts["device"] == "cpu"
    assert "cores" in facts["machine"] and "jax " in facts["versions"]
    assert len(facts["date"]) == 10 and facts["commit"]
