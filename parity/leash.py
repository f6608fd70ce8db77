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
_LEASH = "PARITY_LEASH"  # the number of the leash, for what runs under it


def main() -> int:
    """Runs the command and returns its status. It must lead a process group of its own."""
    threading.Thread(target=_watch, daemon=True).start()
    environment = {**os.environ, _LEASH: str(os.getpid())}
    return subprocess.call(sys.argv[1:], stdin=subprocess.DEVNULL, env=environment)


def end_with_leash() -> None:
    """Ends this process soon after the leash that it was started under; without one it does nothing."""
    if _LEASH in os.environ:
        threading.Thread(target=_watch_leash, args=(int(os.environ[_LEASH]),), daemon=True).start()


def _watch_leash(leash: int) -> None:
    # Its own parent is no sign: that may have been killed while this process was still importing.
    try:
        while True:
            os.kill(leash, 0)
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGKILL)


def _watch() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
