"""A run that is told to end finishes and saves its step, or ends at once where nothing would be lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from jax_simpo.errors import StoppedError
from jax_simpo.run import signals

RUN = """
import hashlib, signal, sys, time
from jax_simpo.run import signals

signal.alarm(120)  # no test that fails leaves it running
with signals.handled(ends_process=True), signals.handled():  # as the command and the trainer
    print("starts", flush=True)
    if sys.argv[1] == "start":
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**30)  # no bytecode of the main thread runs, as while it compiles
    with signals.noted():
        print("steps", flush=True)
        while signals.asked() is None or sys.argv[1] == "long step":
            time.sleep(0.01)
        time.sleep(0.2)
        for stream in (sys.stdout, sys.stderr):
            print("saved", file=stream, flush=True)
        if len(sys.argv) > 2:
            open(sys.argv[2], "w").close()
"""


def start(kind: str, *arguments: str, under: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [*under, sys.executable, "-c", RUN, kind, *arguments]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
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
    assert said == f"\n{number.name}: the run ends once this step is saved; a second signal ends it at once\nsaved\n"


def test_a_signal_before_the_steps_ends_the_process_at_once_whatever_it_computes() -> None:
    run = start("start")
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate(timeout=10)
    assert (run.returncode, said.strip()) == (143, "SIGTERM: ended. Nothing was written. Start the same command again")


def test_a_second_signal_ends_the_process_at_once() -> None:
    run = start("long step")
    run.send_signal(signal.SIGINT)
    time.sleep(0.5)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=10)
    assert run.returncode == 130 and "a second signal ends it at once\n\nSIGINT: ended." in said


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_what_a_launcher_adds_to_ctrl_c_is_no_second_signal(second: signal.Signals) -> None:
    run = start("steps")
    run.send_signal(signal.SIGINT)
    time.sleep(0.02)
    run.send_signal(second)
    assert run.communicate(timeout=30)[0] == "saved\n" and run.returncode == 0


@pytest.mark.parametrize("ignored", [signal.SIGHUP, signal.SIGINT])  # by `nohup`; by a shell in what it starts with `&`
def test_a_signal_that_the_caller_ignores_stays_ignored(ignored: signal.Signals) -> None:
    run = start("steps", under=("sh", "-c", f"trap '' {ignored.name.removeprefix('SIG')}; exec \"$@\"", "sh"))
    run.send_signal(ignored)
    time.sleep(0.3)
    assert run.poll() is None
    run.send_signal(signal.SIGTERM)
    assert run.communicate(timeout=30)[0] == "saved\n" and run.returncode == 0


def test_a_step_is_saved_although_nobody_reads_the_output_any_more(tmp_path: Path) -> None:
    run = start("steps", str(tmp_path / "saved"))
    assert run.stdout is not None and run.stderr is not None
    run.stdout.close(), run.stderr.close()  # as `| tee log` does on Ctrl-C
    run.send_signal(signal.SIGINT)
    run.wait(30)
    assert (tmp_path / "saved").exists()


def test_a_step_is_saved_although_the_terminal_is_lost(tmp_path: Path) -> None:
    terminal, end = os.openpty()
    command = [sys.executable, "-c", RUN, "steps", str(tmp_path / "saved")]
    run = subprocess.Popen(command, stdin=end, stdout=end, stderr=end, start_new_session=True)
    os.close(end)
    said = b""
    while b"steps\r\n" not in said:
        said += os.read(terminal, 100)
    os.close(terminal)
    run.send_signal(signal.SIGHUP)
    run.wait(30)
    assert (tmp_path / "saved").exists()


def test_somebody_is_told_before_the_process_ends() -> None:
    program = RUN.replace(
        "ends_process=True", "ends_process=True, before_end=lambda end: print(end.status, flush=True)"
    )
    run = subprocess.Popen([sys.executable, "-c", program, "start"], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None and run.stdout.readline() == "starts\n"
    run.send_signal(signal.SIGINT)
    assert run.communicate(timeout=10)[0] == "130\n" and run.returncode == 130


FORK = """
import os, signal
from jax_simpo.run import signals

with signals.handled():
    child = os.fork()
    if not child:
        os._exit(0 if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert signal.getsignal(signal.SIGTERM) is signals._on_signal
"""


def test_a_forked_process_has_the_systems_answers() -> None:
    assert subprocess.run([sys.executable, "-c", FORK]).returncode == 0


def test_in_a_program_that_goes_on_signals_are_exceptions_and_handlers_are_given_back() -> None:
    former = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedError, match="ended by SIGTERM") as stopped, signals.handled():
        with suppress(Exception):  # such as a library has
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
    assert (stopped.value.status, stopped.value.saved) == (143, False)
    with signals.handled():
        with signals.handled(ends_process=True), signals.noted():  # the inner one does nothing
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
            assert signals.asked() == signal.SIGINT
            time.sleep(0.3)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(10)
    assert signal.getsignal(signal.SIGTERM) is former
    assert signals.asked() is None and type(sys.stdout) is not signals._Lossy  # for another run


def test_a_thread_handles_no_signals(tmp_path: Path) -> None:
    former, seen = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with signals.handled():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [former]


KEEPING = """
import signal, sys, time
from pathlib import Path
from jax_simpo.run import signals
from jax_simpo.run.steps import kept_steps
from jax_simpo.run.whole import writing

with signals.handled(ends_process=True):
    run, output = Path(sys.argv[1]), Path(sys.argv[2])
    signals.keeping(lambda: f"{kept_steps(run)}; {output.name} was not written")
    with writing(output) as file:
        file.write("half")
        print("starts", flush=True)
        time.sleep(60)
"""


def test_an_end_says_what_is_kept_and_leaves_no_half_of_a_file(tmp_path: Path) -> None:
    steps = tmp_path / "run/checkpoints"
    for step, kept in ((None, "holds no step yet"), (40, "keeps step 40, from which the run goes on")):
        if step is not None:
            (steps / str(step)).mkdir(parents=True)
        arguments = (str(tmp_path / "run"), str(tmp_path / "scores.jsonl"))
        with subprocess.Popen(
            [sys.executable, "-c", KEEPING, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None and process.stdout.readline() == "starts\n"
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=30)
        wanted = f"{tmp_path}/run {kept}; scores.jsonl was not written"
        assert (process.returncode, said.strip()) == (130, f"SIGINT: ended. {wanted}. Start the same command again")
        assert not list(tmp_path.glob("*scores*"))


def test_ctrl_c_while_the_program_is_imported_is_no_traceback() -> None:
    program = (
        "import sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'jax_simpo.cli': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from jax_simpo.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    said = "SIGINT: ended. Nothing was written. Start the same command again"
    assert (done.returncode, done.stderr.strip()) == (130, said)
