"""Runs contenders in processes of their own, so that memory can be measured, and sends them requests through a pipe.

A worker is started as `python -m MODULE ARGUMENTS`. It answers requests, one JSON object a line each way. Everything
else that it prints goes to its log.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.facts import ROOT

_LAST_LINES = 15


class WorkerFailed(RuntimeError):
    """A worker's process ended before it answered. The message has the end of the worker's log."""


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
                text=True,
            )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends a request and waits for the answer.

        Raises:
            WorkerFailed: the process ended before it answered.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            answer = ""
        else:
            answer = self._process.stdout.readline()
        if not answer:
            status = self._process.wait()
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-_LAST_LINES:])
            raise WorkerFailed(f"ended with status {status}; its output is in {self._log}:\n{tail}")
        values: dict[str, Any] = json.loads(answer)
        return values

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Requests:
    """The worker's end of the pipe. Create it before you import anything that might print."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def next(self) -> dict[str, Any] | None:
        """Waits for the next request; returns None when there are no more."""
        line = sys.stdin.readline()
        return json.loads(line) if line else None

    def answer(self, values: Mapping[str, Any]) -> None:
        """Answers a request."""
        self._answers.write(json.dumps(values) + "\n")
        self._answers.flush()

    def serve(self, handle: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
        """Answers requests until there are no more."""
        while (request := self.next()) is not None:
            self.answer(handle(request))
