"""Ends a run that is told to end: by SIGINT (Ctrl-C), SIGTERM (a scheduler) or SIGHUP (a lost terminal).

While a run takes steps, the first signal is noted: the step is finished and saved, and then the run ends. At all other
times it ends at once, because nothing would be lost. A second signal ends it at once, whatever it does; the same
command then goes on from the newest checkpoint. Both trainers use it.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from jax_simpo.errors import StoppedError

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# One wish may come as several signals: a launcher sends SIGTERM for the Ctrl-C that its processes have had as SIGINT,
# or passes on a signal that the whole group of processes has had.
_SAME_WISH_SECONDS, _SAME_SIGNAL_SECONDS = 2.0, 0.25


NOTHING_WRITTEN = "Nothing was written"


class _State:
    """Holds what this process has been told. Signals come to a process, so there is one."""

    def __init__(self) -> None:
        self.clean_ups: list[Callable[[], object]] = []  # before a signal ends the process
        self.kept: Callable[[], str] = lambda: NOTHING_WRITTEN

    handling = False
    watched = False  # a thread answers signals, and not the handler
    interrupt: Callable[[], object] | None = None  # what SIGINT calls in place of ending anything
    takes_steps = False
    asked: signal.Signals | None = None
    at = 0.0  # when it was answered, by the monotonic clock


_state = _State()


class _Ended(BaseException):
    """Carries a signal up to `handled`. No `except Exception` on the way takes it."""

    def __init__(self, asking: signal.Signals) -> None:
        self.asking = asking


def asked() -> signal.Signals | None:
    """Returns the signal that asked the run to end after its step; None where none did."""
    return _state.asked


@contextmanager
def handled(
    *, ends_process: bool = False, sigterm: bool = True, before_end: Callable[[StoppedError], object] = lambda _: None
) -> Iterator[None]:
    """Handles signals inside the block as this module says. Inside another such block, or in a thread, it does nothing.

    A signal that the process ignores, as under `nohup`, stays ignored.

    Args:
        ends_process: a signal that is not noted ends the process, also while it imports, compiles or computes. False
            is for a program that goes on after the block: it raises an exception, wherever the main thread is.
        sigterm: False leaves SIGTERM to somebody else.
        before_end: called before a signal ends the process.

    Raises:
        StoppedError: a signal came while the run took no steps.
        KeyboardInterrupt: a second one came while it took steps.
    """
    if _state.handling or threading.current_thread() is not threading.main_thread():
        yield
        return
    _state.handling, _state.watched = True, ends_process
    numbers = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    former = {number: signal.signal(number, _on_signal) for number in numbers if sigterm or number != signal.SIGTERM}
    try:
        if ends_process:
            with _watching(before_end):
                yield
        else:
            yield
    except _Ended as end:
        name = end.asking.name
        raise StoppedError(f"ended by {name}. Nothing is lost; start the same run again", end.asking) from None
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        _state.handling, _state.watched, _state.asked = False, False, None
        _state.kept = lambda: NOTHING_WRITTEN


def keeping(words: Callable[[], str]) -> None:
    """Sets what is said of a command's results when a signal ends the process: a sentence without its full stop."""
    _state.kept = words


@contextmanager
def before_ending(work: Callable[[], object]) -> Iterator[None]:
    """Calls `work` if a signal ends the process inside the block: such an end runs no `finally`."""
    _state.clean_ups.append(work)
    try:
        yield
    finally:
        _state.clean_ups.remove(work)


@contextmanager
def interrupting(stop: Callable[[], object]) -> Iterator[None]:
    """Inside the block SIGINT calls `stop`, perhaps from another thread, and ends nothing."""
    _state.interrupt = stop
    try:
        yield
    finally:
        _state.interrupt = None


@contextmanager
def noted() -> Iterator[None]:
    """Inside the block the first signal is only noted: the run asks for it when a step is done.

    Output that cannot be written is dropped: whoever read it may be gone, with the terminal or with a pipe, and the
    steps are still to be saved.
    """
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Lossy(sys.stdout), _Lossy(sys.stderr)
    _state.takes_steps = True
    try:
        yield
    finally:
        _state.takes_steps = False
        sys.stdout, sys.stderr = streams


def _on_signal(number: int, frame: FrameType | None) -> None:
    if _state.watched or _interrupts(number):
        return
    asking = signal.Signals(number)
    if not _state.takes_steps:
        raise _Ended(asking)
    if _note(asking):
        raise KeyboardInterrupt


def _interrupts(number: int) -> bool:
    """Calls what SIGINT interrupts, and returns True if there is such a thing and the signal is SIGINT."""
    stop = _state.interrupt
    if stop is None or number != signal.SIGINT:
        return False
    stop()
    return True


def _note(asking: signal.Signals) -> bool:
    """Notes a signal, and returns True if it is a second one that is meant as such."""
    if _state.asked is not None:
        window = _SAME_SIGNAL_SECONDS if asking == _state.asked else _SAME_WISH_SECONDS
        return time.monotonic() - _state.at > window
    _state.asked = asking
    _say(asking, "the run ends once this step is saved; a second signal ends it at once")
    _state.at = time.monotonic()  # a second signal answers what was said
    return False


def _say(asking: signal.Signals, words: str) -> None:
    with suppress(OSError, ValueError):
        print(f"\n{asking.name}: {words}", file=sys.stderr, flush=True)


def _kept() -> str:
    """Says what is kept. Nothing may stop the end of the process, such as a folder that cannot be read."""
    try:
        return _state.kept()
    except OSError:
        return "What is on the disk stays there"


class _Lossy:
    """A stream that drops what cannot be written."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()


@contextmanager
def _watching(before_end: Callable[[StoppedError], object]) -> Iterator[None]:
    """Answers signals in a thread.

    The main thread would see them only when it is back from compiling or computing, and an exception raised while it
    imports or calls back from compiled code is lost, or worse.
    """
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    taken = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(receiver, before_end), name="signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(taken)
        sender.close()  # ends the thread


def _watch(receiver: socket.socket, before_end: Callable[[StoppedError], object]) -> None:
    """Notes the first signal while the run takes steps, and ends the process on any other."""
    with receiver:
        while numbers := receiver.recv(1):
            if numbers[0] not in _SIGNALS or _interrupts(numbers[0]):
                continue
            asking = signal.Signals(numbers[0])
            if not _state.takes_steps or _note(asking):
                _end(asking, before_end)


def _end(asking: signal.Signals, before_end: Callable[[StoppedError], object]) -> None:
    words = f"ended. {_kept()}. Start the same command again"
    with suppress(OSError, ValueError):
        if sys.stderr.isatty():
            print("\x1b[?25h", end="", file=sys.stderr)  # a progress bar hides the cursor
    _say(asking, words)
    try:
        for work in [*_state.clean_ups]:
            work()
        before_end(StoppedError(words, asking))
    finally:
        os._exit(StoppedError.status_of(asking))


def _forget_in_child() -> None:
    """Gives a forked process the system's answers to signals: those here are its parent's."""
    if _state.handling:
        signal.set_wakeup_fd(-1)
        for number in _SIGNALS:
            if signal.getsignal(number) is _on_signal:
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        _state.handling = _state.takes_steps = False


os.register_at_fork(after_in_child=_forget_in_child)
