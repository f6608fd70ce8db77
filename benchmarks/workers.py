"""Runs contenders in processes of their own, so that memory can be measured, and sends them requests through a pipe.

A worker is started as `python -m MODULE ARGUMENTS`. It answers requests, one JSON object a line each way. Everything
else that it prints goes to its log. It ends with the process that started it, however that one ends.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.facts import ROOT

_LAST_LINES = 15
_BEGINS = "begins"  # the key of a line that is no answer yet
_PR_SET_PDEATHSIG = 1  # of Linux's prctl


class WorkerFailed(RuntimeError):
    """A worker's process ended before it answered, or took too long. The message has the end of the worker's log.

    Attributes:
        doing: what the worker had begun last (`Requests.begin`) since it was asked; None if it named nothing.
    """

    def __init__(self, message: str, doing: str | None = None) -> None:
        super().__init__(message)
        self.doing = doing


class Worker:
    """A contender's process, for the script that compares contenders."""

    def __init__(self, arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        """Starts the process.

        Args:
            arguments: the arguments after `python -m`.
            log: the file for the process's prints and errors.
            environment: variables to set for the process.
        """
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                cwd=ROOT,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        self._read = b""  # of its answers, up to the end of the pipe so far

    def ask(self, limit: float | None = None, **request: Any) -> dict[str, Any]:
        """Sends a request and waits for the answer.

        Args:
            limit: the most seconds to wait, from the request or from the last thing that the worker said it begins; the
                process is killed when they are over.
            request: the request.

        Raises:
            WorkerFailed: the process ended before it answered, or did not answer in time.
        """
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended already; its status and its log say why
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        doing: str | None = None
        while True:
            try:
                line = self._line(limit)
            except TimeoutError:
                self._process.kill()
                self._process.wait()
                raise self._failed(f"did not answer within {limit:g} s", doing) from None
            if line is None:
                raise self._failed(f"ended with {_status(self._process.wait())}", doing)
            values: dict[str, Any] = json.loads(line)
            if _BEGINS not in values:
                return values
            doing = values[_BEGINS]

    def _failed(self, what: str, doing: str | None) -> WorkerFailed:
        return WorkerFailed(f"{f'{doing}: ' if doing else ''}{what}{self._log_tail()}", doing)

    def _line(self, limit: float | None) -> bytes | None:
        """Returns the next line of the worker's answers; None if it ended, perhaps in the middle of one.

        Raises:
            TimeoutError: the line did not end within the limit.
        """
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        ends = None if limit is None else time.monotonic() + limit
        while b"\n" not in self._read:
            left = None if ends is None else max(0.0, ends - time.monotonic())
            if not select.select([pipe], [], [], left)[0]:
                raise TimeoutError
            chunk = os.read(pipe, 1 << 16)
            if not chunk:
                return None
            self._read += chunk
        line, _, self._read = self._read.partition(b"\n")
        return line

    def _log_tail(self) -> str:
        """Returns the last line of the log, which as a rule names the error, and below it the last few."""
        lines = self._log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
        if not lines:
            return " and printed nothing"
        return "\n".join([f"; it printed last: {lines[-1]}", f"The end of its output, {self._log}:", *lines])

    def close(self) -> None:
        """Ends the process, if it has not ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        with suppress(BrokenPipeError):  # a request that a dead process did not read is still in the buffer
            self._process.stdin.close()
        self._process.stdout.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RestartedWorker:
    """A contender's process that is started when it is first asked, and anew after a request that failed.

    After an error a GPU may refuse whatever its process asks for next.
    """

    def __init__(self, arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        """Takes the arguments of a `Worker`."""
        self._start = partial(Worker, arguments, log, environment)
        self._worker: Worker | None = None

    def ask(self, limit: float | None = None, **request: Any) -> dict[str, Any]:
        """Sends a request and waits for the answer, as `Worker.ask` does. An answer with the key `failed` is a failure.

        Raises:
            WorkerFailed: the process ended before it answered, or did not answer in time.
        """
        self._worker = self._worker or self._start()
        answer: dict[str, Any] = {"failed": "no answer"}
        try:
            answer = self._worker.ask(limit, **request)
        finally:
            if "failed" in answer:
                self.close()
        return answer

    def close(self) -> None:
        """Ends the process, if there is one."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def __enter__(self) -> RestartedWorker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Requests:
    """The worker's end of the pipe. Create it before you import anything that might print."""

    def __init__(self) -> None:
        end_with_parent()
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def next(self) -> dict[str, Any] | None:
        """Waits for the next request; returns None when there are no more."""
        line = sys.stdin.readline()
        return json.loads(line) if line else None

    def begin(self, what: str) -> None:
        """Says what comes next in the work on a request. The limit of the request counts from here on."""
        self.answer({_BEGINS: what})

    def answer(self, values: Mapping[str, Any]) -> None:
        """Answers a request."""
        self._answers.write(json.dumps(values) + "\n")
        self._answers.flush()

    def serve(self, handle: Callable[[dict[str, Any]], Mapping[str, Any]], *, keep_on: bool = False) -> None:
        """Answers requests until there are no more.

        Args:
            handle: makes the answer to a request.
            keep_on: answers `{"failed": REASON}` to a request whose handling raised; otherwise the process ends.
        """
        while (request := self.next()) is not None:
            try:
                answer = handle(request)
            except Exception as error:
                if not keep_on:
                    raise
                print(f"{request}:\n{traceback.format_exc()}", file=sys.stderr)
                answer = {"failed": f"{type(error).__name__}: {error}"[:1000]}
            self.answer(answer)


def end_with_parent() -> None:
    """Has Linux kill this process when its parent ends, so that nothing goes on computing; elsewhere does nothing."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call
        os.kill(os.getpid(), signal.SIGKILL)


def _status(code: int) -> str:
    """Says how a process ended: negative numbers are signals."""
    return f"status {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
