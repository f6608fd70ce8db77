"""Runs a command that ends with its caller, however that ends: `python -m parity.leash COMMAND ...`.

The caller holds the other end of this process's standard input. When it is killed, the system closes that end, and the
whole group of this process is killed: the command, and what the command has started. torchrun starts its ranks outside
of the group; they watch it themselves.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

_SECONDS_BETWEEN_LOOKS = 0.5


def main() -> int:
    """Runs the command and returns its status. It must lead a process group of its own."""
    threading.Thread(target=_watch, daemon=True).start()
    return subprocess.call(sys.argv[1:], stdin=subprocess.DEVNULL)


def end_with_parent() -> None:
    """Ends this process soon after the process that started it."""
    threading.Thread(target=_watch_parent, args=(os.getppid(),), daemon=True).start()


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:  # an orphan is given another one
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    os.kill(os.getpid(), signal.SIGKILL)


def _watch() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
