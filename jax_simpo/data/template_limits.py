"""Limits the time and the memory that a chat template may take to write one conversation.

A chat template is code of whoever made the tokenizer. jinja2's sandbox keeps it away from files and from Python's
insides, but lets it loop for ever or fill the memory. While a template runs,

- a timer of the processor's time raises an exception after `SECONDS`, and
- the address space of the process may grow by `BYTES`: the allocation that needs more raises MemoryError.

What it has written is compared with what it was given (`check_written`), because tokens take more memory than text.

Python raises nothing inside a single call of C. Powers of whole numbers, the simplest of the calls that take for ever,
are found before a template runs (`line_of_a_power`). Out of any other, such as comparing lists that hold each other
thousands of times, the process is ended after `LOST_SECONDS`: by SIGPROF, with the template's line on stderr.

What is not limited: a template that runs in another thread than the main one; time and memory on Windows, which has
neither timers nor limits; memory on macOS, which does not enforce the limit. A template that nests objects so deeply
that Python itself overflows its stack may crash the process.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

Written = TypeVar("Written")

SECONDS, LOST_SECONDS = 10.0, 60.0  # a usual conversation takes 0.0003
BYTES = 1 << 30
_LENGTH, _TIMES = 200_000, 10  # characters of a system prompt and the like; how much longer than its turns a text is
_MEASURED = 32  # texts are kept until they are tokenised, so the size of the process is read again after so many


class TooMuchError(Exception):
    """A template takes more time or memory than it may. The text is a clause that says of which."""


class _TimeIsUp(BaseException):
    """Leaves a template. No `except Exception` of jinja2's takes it."""


class _State(threading.local):
    """Holds where the main thread is. In every other thread nothing is ever prepared."""

    prepared = False
    runs = False
    conversations = 0
    former = (-1, -1)  # the limits of the address space before


_state = _State()


@contextmanager
def prepared() -> Iterator[None]:
    """Prepares the limits once for several conversations: that takes a quarter of the time that writing one takes."""
    if _state.prepared or not _can_be_limited():
        yield
        return
    with _memory(), _timers():
        _state.prepared = True
        try:
            yield
        finally:
            _state.prepared = False


def limited(write: Callable[[], Written]) -> Written:
    """Calls a function that lets the template write one conversation, and returns what it returns.

    Raises:
        TooMuchError: it takes too much time or memory.
    """
    if not _state.prepared and _can_be_limited():
        with prepared():
            return limited(write)
    try:
        try:
            if _state.prepared:
                _start()
            return write()
        finally:
            _state.runs = False
    except _TimeIsUp:
        raise TooMuchError(f"it takes more than {SECONDS:g} seconds for a conversation") from None
    except MemoryError:
        raise TooMuchError(f"it takes more than {BYTES / 1e9:.1f} GB of memory for a conversation") from None


def check_written(texts: Sequence[str], given: object) -> None:
    """Makes sure that a template has written text, and not far more than it was given.

    Args:
        texts: what it has written.
        given: the turns.

    Raises:
        TooMuchError: it has written far more.
        UnicodeEncodeError: it has written half of a surrogate pair.
    """
    written = sum(map(len, texts))
    if written > _LENGTH and written > _LENGTH + _TIMES * (length := len(repr(given))):
        raise TooMuchError(f"it writes {written:,} characters for a conversation of {length:,}")
    for text in texts:
        if not text.isascii():
            text.encode()


def line_of_a_power(template: str) -> int | None:
    """Returns the first line of a template in which `**` stands for a power; None if there is none.

    Raises:
        jinja2.TemplateSyntaxError: the template is not jinja.
    """
    from jinja2 import Environment

    before = ""
    for line, kind, text in Environment().lex(template):
        if kind == "whitespace":
            continue
        if text == "**" and kind == "operator" and before not in ("(", ","):  # there it unpacks a mapping
            return line
        before = text
    return None


def _can_be_limited() -> bool:
    return sys.platform != "win32" and threading.current_thread() is threading.main_thread()


def _start() -> None:
    """Gives a conversation the whole time, and from time to time its memory."""
    _state.conversations += 1
    if _state.conversations % _MEASURED == 0:
        _limit_memory()
    signal.setitimer(signal.ITIMER_PROF, LOST_SECONDS)
    # The exception may be lost, in a finalizer say, so it is raised again every second.
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS, 1.0)
    _state.runs = True


def _raise(number: int, frame: FrameType | None) -> None:
    if _state.runs:
        raise _TimeIsUp


@contextmanager
def _timers() -> Iterator[None]:
    """Prepares what the two timers do, and stops them at the end."""
    handler = signal.signal(signal.SIGVTALRM, _raise)
    faulthandler.register(signal.SIGPROF, file=2, all_threads=False, chain=True)
    former = {timer: signal.getitimer(timer) for timer in (signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)}
    try:
        yield
    finally:
        for timer, (seconds, interval) in former.items():
            signal.setitimer(timer, seconds, interval)
        faulthandler.unregister(signal.SIGPROF)
        signal.signal(signal.SIGVTALRM, signal.SIG_DFL if handler is None else handler)  # None: not one of Python's


@contextmanager
def _memory() -> Iterator[None]:
    """Limits the memory, and takes the limit away at the end."""
    if sys.platform != "linux":
        yield
        return
    import resource

    _state.former = resource.getrlimit(resource.RLIMIT_AS)
    _limit_memory()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, _state.former)


def _limit_memory() -> None:
    """Lets the address space grow by `BYTES` from now on, unless the user allows less."""
    if sys.platform != "linux":
        return
    import resource

    try:
        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # a machine without /proc
        return
    soft, hard = _state.former
    most = size + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most if soft == resource.RLIM_INFINITY else min(most, soft), hard))
