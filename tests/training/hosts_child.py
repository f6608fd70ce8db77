"""One process of a run of several: `python -m tests.training.hosts_child JOB.json`, its place among them in variables.

The file holds the commands to run one after the other, as a list of argument lists. It may hold a step at which process
1 fails, and how many seconds every step, or every write to the disk of process 1, takes longer. The commands run in one
process because JAX joins others once: starting and compiling is most of the time.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax_simpo import cli
from jax_simpo.errors import StoppedError
from jax_simpo.processes import launch
from jax_simpo.run import signals
from tests.whole_runs import made_quick


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    try:
        if "fails_at" in job and os.environ["JAX_PROCESS_ID"] == "1":
            _fail_at(job["fails_at"])
        if "seconds_a_step" in job:
            _before_each_step(lambda step: time.sleep(job["seconds_a_step"]))
        if "seconds_a_write" in job and os.environ["JAX_PROCESS_ID"] == "1":
            _slow_disk(job["seconds_a_write"])
        with made_quick(), signals.handled(ends_process=True, before_end=launch.fail):
            for command in job["commands"]:
                cli.app(command, standalone_mode=False)
    except StoppedError as error:
        print(error, file=sys.stderr)
        launch.finish() if error.saved else launch.fail(error)
        sys.exit(error.status)
    except BaseException as error:
        launch.fail(error)
        raise
    launch.finish()


def _fail_at(at: int) -> None:
    """Lets this process fail as it builds the rows of a step, while the others wait for it in a collective."""

    def fail(step: int) -> None:
        if step == at:
            raise OSError("the disk is gone")

    _before_each_step(fail)


def _before_each_step(act: Callable[[int], None]) -> None:
    """Calls `act` with the number of a step before its rows are built."""
    from jax_simpo.data import loader

    build = loader.build_step

    def built(plan: Any, source: Any, step: int, *more: Any) -> Any:
        act(step)
        return build(plan, source, step, *more)

    loader.build_step = built


def _slow_disk(seconds: float) -> None:
    """Lets whatever this process brings to the disk take its time."""
    sync = os.fsync

    def slow(file: int) -> None:
        time.sleep(seconds)
        sync(file)

    os.fsync = slow


if __name__ == "__main__":
    main()
