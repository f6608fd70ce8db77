"""Contenders run in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import facts
from benchmarks.facts import forget_peak, machine_facts, peak_resident_bytes
from benchmarks.workers import RestartedWorker, Worker, WorkerFailed

DYING = ["tests.benchmarks.dying"]


def test_a_worker_that_ends_says_what_it_printed_last(tmp_path: Path) -> None:
    with (
        Worker(["benchmarks.contenders.no_such_contender"], tmp_path / "log") as worker,
        pytest.raises(WorkerFailed, match="No module named"),
    ):
        worker.ask(do="warm")


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("says why and ends", r"status 1.*the reason"),
        ("is killed", "signal SIGKILL"),
        ("hangs", "did not answer within 2 s"),
    ],
)
def test_a_worker_that_gives_no_answer_is_told_with_the_reason(how: str, reason: str, tmp_path: Path) -> None:
    with Worker(DYING, tmp_path / "log") as worker:
        assert worker.ask(how="answers")
        with pytest.raises(WorkerFailed, match=reason):
            worker.ask(2.0, how=how)


@pytest.mark.parametrize("how", ["hangs", "is killed"])
def test_the_last_thing_that_a_worker_began_is_known(how: str, tmp_path: Path) -> None:
    with Worker(DYING, tmp_path / "log") as worker:
        assert worker.ask(how="answers")
        with pytest.raises(WorkerFailed, match="the second: ") as failure:
            worker.ask(1.0, how=f"{how} in the second")
    assert failure.value.doing == "the second"


def test_a_limit_counts_from_the_last_thing_that_a_worker_began(tmp_path: Path) -> None:
    with Worker(DYING, tmp_path / "log") as worker:
        assert worker.ask(how="answers")
        assert worker.ask(1.0, how="takes its time for each") == {}


def test_closing_a_dead_worker_hides_no_error(tmp_path: Path) -> None:
    with pytest.raises(WorkerFailed, match=r"status 5.*after the answer"), Worker(DYING, tmp_path / "log") as worker:
        worker.ask(how="answers and ends")
        worker._process.wait()
        worker.ask(how="answers")  # cannot be sent, and is still in the buffer when the worker is closed


def test_a_worker_ends_when_the_process_that_started_it_is_killed(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from benchmarks.workers import Worker\n"
        f"worker = Worker({DYING}, Path(sys.argv[1])); print(worker.ask(how='answers')['pid'], flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "log")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == -9
    pid = int(done.stdout)
    for _ in range(500):  # the kernel takes a moment; a process that nobody has waited for yet is a zombie
        status = Path(f"/proc/{pid}/stat")
        try:
            if status.read_text().rpartition(")")[2].split()[0] in "ZX":
                return
        except FileNotFoundError:
            return
        os.sched_yield()
    raise AssertionError(f"process {pid} goes on")


def test_a_worker_is_started_anew_after_a_failure(tmp_path: Path) -> None:
    with RestartedWorker(DYING, tmp_path / "log") as worker:
        first = worker.ask(how="answers")
        assert worker.ask(how="answers") == first
        with pytest.raises(WorkerFailed):
            worker.ask(how="is killed")
        assert worker.ask(how="answers") != first


def test_peak_memory_sees_what_was_given_back() -> None:
    forget_peak()  # an earlier test may have raised the peak of this process
    before = peak_resident_bytes()
    block = bytearray(b"x" * (64 << 20))
    del block
    assert peak_resident_bytes() >= before + (32 << 20)


GPUS = """0, GPU-aa11, NVIDIA H100 80GB HBM3
1, GPU-bb22, NVIDIA L4
"""


@pytest.mark.parametrize(
    ("visible", "named"),
    [
        (None, ["NVIDIA H100 80GB HBM3", "NVIDIA L4"]),
        ("1", ["NVIDIA L4"]),
        ("1,0", ["NVIDIA L4", "NVIDIA H100 80GB HBM3"]),
        ("GPU-aa", ["NVIDIA H100 80GB HBM3"]),
        ("", []),
        ("MIG-1", ["NVIDIA H100 80GB HBM3 (MIG-1)", "NVIDIA L4 (MIG-1)"]),
    ],
)
def test_the_accelerator_is_that_which_a_process_may_use(
    visible: str | None, named: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\ncat <<END\n{GPUS}END\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert facts._of_gpus("name") == named


def test_facts_name_machine_versions_date_and_commit() -> None:
    told = machine_facts("cpu")
    assert told["device"] == "cpu"
    assert "cores" in told["machine"] and "jax " in told["versions"]
    assert len(told["date"]) == 10 and told["commit"]
