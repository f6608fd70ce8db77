"""One process of a run of several: `python -m tests.training.hosts_child JOB.json`, its place among them in variables.

The file holds the commands to run one after the other, as a list of argument lists, and perhaps a step at which
process 1 fails. They run in one process because JAX joins others once: starting and compiling is most of the time.
"""

from __future__ import annotations

import json
import os
import sys
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


def _fail_at(step: int) -> None:
    """Lets this process fail as it builds the rows of a step, while the others wait for it in a collective."""
    from jax_simpo.data import loader

    build = loader.build_step

    def broken(plan: Any, source: Any, k: int, *more: Any) -> Any:
        if k == step:
            raise OSError("the disk is gone")
        return build(plan, source, k, *more)

    loader.build_step = broken


if __name__ == "__main__":
    main()
