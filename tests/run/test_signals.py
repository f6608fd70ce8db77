"""A run that is told to end finishes and saves its step, or ends at once where nothing would be lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jax_simpo.errors import StoppedError
from jax_simpo.run import signals

RUN = """
import hashlib, sys, time
from jax_simpo.run import signals

with signals.handled(ends_process=True):
    print("starts", flush=True)
    if sys.argv[1] == "start":
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**30)  # no bytecode of the main thread runs, as while it compiles
    with signals.noted():
        print("steps", flush=True)
        while signals.asked() is None or sys.argv[1] == "long step":
            time.sleep(0.01)
        time.sleep(0.2)
        print("saved", flush=True)
"""


def start(kind: str, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN, kind]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    run = subprocess.Popen(command, **pipes, **options)  # type: ignore[call-overload]
    assert run.stdout is not None and run.stdout.readline() == "starts\n"
    if kind != "start":
        assert run.stdout.readline() == "steps\n"
    return run


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_steps_are_taken_waits_for_the_step(number: signal.Signals) -> None:
    run = start("steps")
    run.send_signal(number)
    out, said = run.communicate(timeout=30)
    assert (run.returncode, out) == (0, "saved\n")
    assert said.strip() == f"{number.name}: the run ends once this step is saved; a second signal ends it at once"


def test_a_signal_before_the_steps_ends_the_process_at_once_whatever_it_computes() -> None:
    run = start("start")
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate(timeout=10)
    assert (run.returncode, said.strip()) == (143, "SIGTERM: ended. Start the same command again to go on")


def test_a_second_signal_ends_the_process_at_once() -> None:
    run = start("long step")
    run.send_signal(signal.SIGINT)
    time.sleep(0.3)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=10)
    assert run.returncode == 130 and "a second signal ends it at once\n\nSIGINT: ended." in said


def test_what_a_launcher_adds_to_ctrl_c_is_no_second_signal() -> None:
    run = start("steps")
    run.send_signal(signal.SIGINT)
    run.send_signal(signal.SIGTERM)
    assert run.communicate(timeout=30)[0] == "saved\n" and run.returncode == 0


def test_a_signal_that_the_caller_ignores_stays_ignored() -> None:
    run = start("steps", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))  # as `nohup` does
    run.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert run.poll() is None
    run.send_signal(signal.SIGTERM)
    assert run.communicate(timeout=30)[1].strip().startswith("SIGTERM: the run ends once")


def test_in_a_program_that_goes_on_signals_are_exceptions_and_handlers_are_given_back() -> None:
    former = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedError, match="ended by SIGTERM") as stopped, signals.handled():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    assert (stopped.value.status, stopped.value.saved) == (143, False)
    with signals.handled():
        with signals.handled(ends_process=True), signals.noted():  # the inner one does nothing
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
            assert signals.asked() == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(10)
    assert signal.getsignal(signal.SIGTERM) is former
    with signals.handled():
        assert signals.asked() is None  # another run


def test_a_thread_handles_no_signals(tmp_path: Path) -> None:
    former, seen = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with signals.handled():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [former]
