"""Kills a run again and again: `python -m tests.training.kills_child FOLDER KILLS SEED`, which holds a `config.yaml`.

Each life of a run is a fork of this process, which has imported everything already. Most lives end right before one of
the file operations that Python makes (an audit hook counts them), the others at a moment of time, which falls into the
writing of arrays too. Writes `lives.json`: for each run the exit status of each life, and its file operations.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax_simpo.training.trainer
from jax_simpo import cli

_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink", "shutil.rmtree"}


def is_change(event: str, args: tuple[Any, ...], folder: str) -> bool:
    """Returns True for an operation that changes a file in the folder."""
    if event == "open":
        path, mode, flags = args
        writes = any(letter in mode for letter in "wax+") if mode else flags & (os.O_WRONLY | os.O_RDWR)
        return bool(writes) and str(path).startswith(folder)
    return event in _CHANGES and any(isinstance(arg, str) and arg.startswith(folder) for arg in args)


def hook(folder: str, at: int | None, report: Callable[[int], None]) -> None:
    """Counts the changes of files in the folder, and kills this process before one of them."""
    count = 0

    def audit(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if (event == "open" or event in _CHANGES) and is_change(event, args, folder):
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            report(count)

    sys.addaudithook(audit)


def live(folder: Path, *, at: int | None = None, seconds: float | None = None) -> tuple[int, int]:
    """Runs the command once, to its end or until it is killed; returns its status and the number of changes so far."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        status = 1
        try:
            with (folder / "log.txt").open("a") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            if seconds is not None:
                timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
                timer.daemon = True
                timer.start()
            hook(f"{folder}/", at, lambda count: os.write(writing, b"."))
            os.chdir(folder)
            sys.argv = ["jax-simpo", "train", "config.yaml"]
            cli.main()
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            os._exit(status)
    os.close(writing)
    changes = 0
    while data := os.read(reading, 4096):
        changes += len(data)
    os.close(reading)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), changes


def new_run(folder: Path, number: int) -> Path:
    """Makes the folder of a run, with its config."""
    own = folder / str(number)
    own.mkdir()
    (own / "config.yaml").write_text((folder / "config.yaml").read_text())
    return own


def main() -> None:
    folder, kills, draw = Path(sys.argv[1]).resolve(), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    whole = new_run(folder, 0)
    status, changes = live(whole)
    runs: list[list[tuple[int, int]]] = [[(status, changes)]]
    while sum(len(lives) - 1 for lives in runs[1:]) < kills:
        own, lives = new_run(folder, len(runs)), list[tuple[int, int]]()
        runs.append(lives)
        while not lives or lives[-1][0] == -signal.SIGKILL:
            left = kills - sum(len(others) - 1 for others in runs[1:-1]) - len(lives)
            if left <= 0:
                lives.append(live(own))
            elif draw.random() < 0.25:
                lives.append(live(own, seconds=draw.uniform(0.5, 6.0)))
            else:
                lives.append(live(own, at=draw.randint(1, changes // 2)))  # a later life begins further on
    (folder / "lives.json").write_text(json.dumps(runs))


if __name__ == "__main__":
    assert jax_simpo.training.trainer
    main()
