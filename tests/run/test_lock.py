"""One run at a time writes to an output directory, and a lock never outlives its process."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jax_simpo.errors import CheckpointError
from jax_simpo.run.lock import locked

HOLD = """
import sys, time
from pathlib import Path
from jax_simpo.run.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    return holder


def test_a_second_run_is_told_who_holds_the_folder_and_takes_it_when_that_one_is_killed(tmp_path: Path) -> None:
    holder = hold(tmp_path)
    with pytest.raises(
        CheckpointError, match=rf"is writing to .* \(process {holder.pid} on .*, for 0 minutes\)\. Wait"
    ):
        with locked(tmp_path):
            pytest.fail("two runs hold the folder")
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with locked(tmp_path):
        assert json.loads((tmp_path / ".jax-simpo.lock").read_text())["process"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_a_damaged_lock_file_is_no_crash(tmp_path: Path) -> None:
    (tmp_path / ".jax-simpo.lock").write_bytes(b"\xff{")
    with locked(tmp_path):
        pass
    holder = hold(tmp_path)
    (tmp_path / ".jax-simpo.lock").write_text("[]")
    with pytest.raises(CheckpointError, match="it has not yet said which"), locked(tmp_path):
        pass
    holder.kill()
    holder.communicate()


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock, calls = fcntl.flock, []

    def removed_before_it_is_locked(descriptor: int, operation: int) -> None:
        if not calls:
            (tmp_path / ".jax-simpo.lock").unlink()
        calls.append(descriptor)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", removed_before_it_is_locked)
    with locked(tmp_path):
        assert len(calls) == 2 and (tmp_path / ".jax-simpo.lock").exists()


def test_a_file_system_without_locks_is_used_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with locked(tmp_path), locked(tmp_path):
        assert not list(tmp_path.iterdir())


def test_a_lock_of_somebody_else_is_not_removed(tmp_path: Path) -> None:
    with locked(tmp_path):
        (tmp_path / ".jax-simpo.lock").unlink()  # somebody takes it for left over
        (tmp_path / ".jax-simpo.lock").write_text("another run's")
    assert (tmp_path / ".jax-simpo.lock").read_text() == "another run's"


def test_a_full_disk_takes_the_owners_name_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with locked(tmp_path), pytest.raises(CheckpointError, match="it has not yet said which"), locked(tmp_path):
        pass
