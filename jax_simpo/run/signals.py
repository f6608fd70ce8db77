"""What a run does when it is told to end: SIGINT (Ctrl-C), SIGTERM (a scheduler), SIGHUP (a lost terminal).

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
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from jax_simpo.errors import StoppedError

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# A launcher may send SIGTERM for the Ctrl-C that its processes have had as SIGINT: one wish, two signals.
_SAME_WISH_SECONDS = 2.0


class _State:
    """What this process has been told. Signals come to a process, so there is one."""

    asked: signal.Signals | None = None
    at = 0.0  # when it came, by the monotonic clock
    takes_steps = False
    watched = False  # a thread answers signals, and not the handler


_state = _State()


def asked() -> signal.Signals | None:
    """Returns the signal that asked the run to end after its step; None where none did."""
    return _state.asked


@contextmanager
def handled(*, ends_process: bool = False) -> Iterator[None]:
    """Handles signals inside the block as this module says. Inside another such block, or in a thread, it does nothing.

    Args:
        ends_process: a signal that is not noted ends the process, also while it imports, compiles or computes. False
            is for a program that goes on after the block: it raises an exception, wherever the main thread is.

    Raises:
        StoppedError: a signal came while the run took no steps.
        KeyboardInterrupt: a second one came while it took steps.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is _on_signal:
        yield
        return
    _state.asked, _state.watched = None, ends_process
    handled = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # `nohup` ignores one
    former = {number: signal.signal(number, _on_signal) for number in handled}
    try:
        if ends_process:
            with _watching():
                yield
        else:
            yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextmanager
def noted() -> Iterator[None]:
    """Inside the block the first signal is only noted: the run asks for it when a step is done."""
    _state.takes_steps = True
    try:
        yield
    finally:
        _state.takes_steps = False


def _on_signal(number: int, frame: FrameType | None) -> None:
    if _state.watched:
        return
    asking = signal.Signals(number)
    if not _state.takes_steps:
        raise StoppedError(f"ended by {asking.name}. Start the same run again to go on", asking)
    if _note(asking):
        raise KeyboardInterrupt


def _note(asking: signal.Signals) -> bool:
    """Notes a signal, and returns True if it is a second one that is meant as such."""
    if _state.asked is not None:
        return asking == _state.asked or time.monotonic() - _state.at > _SAME_WISH_SECONDS
    _state.asked, _state.at = asking, time.monotonic()
    _say(asking, "the run ends once this step is saved; a second signal ends it at once")
    return False


def _say(asking: signal.Signals, words: str) -> None:
    print(f"\n{asking.name}: {words}", file=sys.stderr, flush=True)


@contextmanager
def _watching() -> Iterator[None]:
    """Answers signals in a thread.

    The main thread would see them only when it is back from compiling or computing, and an exception raised while it
    imports or calls back from compiled code is lost, or worse.
    """
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    taken = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(receiver,), name="signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(taken)
        sender.close()  # ends the thread


def _watch(receiver: socket.socket) -> None:
    """Notes the first signal while the run takes steps, and ends the process on any other."""
    with receiver:
        while numbers := receiver.recv(1):
            asking = signal.Signals(numbers[0])
            if asking not in _SIGNALS:
                continue
            if not _state.takes_steps or _note(asking):
                if sys.stderr.isatty():
                    print("\x1b[?25h", end="", file=sys.stderr)  # a progress bar hides the cursor
                _say(asking, "ended. Start the same command again to go on")
                os._exit(StoppedError.status_of(asking))
