"""The lock of an output directory: one run at a time writes to it. Both trainers take it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from jax_simpo.errors import CheckpointError
from jax_simpo.run import files


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Holds the lock of an output directory. The system frees it when the process ends, however it ends.

    On a file system without locks the run goes on without one.

    Raises:
        CheckpointError: another run holds it, and the message says which and since when; or its file cannot be opened.
    """
    path = output / files.LOCK
    descriptor = _take(path)
    try:
        if descriptor is not None:
            owner = {"host": socket.gethostname(), "process": os.getpid(), "since": time.time()}
            with suppress(OSError):  # the owner is a courtesy, for which a full disk has no room
                os.truncate(descriptor, 0)
                os.write(descriptor, json.dumps(owner).encode())
        yield
    finally:
        if descriptor is not None:
            if _is_at(path, descriptor):  # and nobody else can take it meanwhile
                path.unlink(missing_ok=True)
            os.close(descriptor)


def _take(path: Path) -> int | None:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be opened: {error.strerror}. It is left of another user's run, perhaps; remove it"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _owner(path)
            os.close(descriptor)
            raise CheckpointError(
                f"another run is writing to `output_dir` {path.parent} ({owner}). Wait for it or end it, or give "
                "another `output_dir`"
            ) from None
        except OSError:  # this file system has no locks
            os.close(descriptor)
            path.unlink(missing_ok=True)
            return None
        if _is_at(path, descriptor):
            return descriptor
        os.close(descriptor)  # its owner removed it after this process had opened it


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _owner(path: Path) -> str:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        minutes = max(0.0, time.time() - owner["since"]) / 60
        return f"process {owner['process']} on {owner['host']}, for {minutes:.0f} minutes"
    except (OSError, ValueError, KeyError, TypeError):
        return "it has not yet said which"
