"""The process that compiles, started by `jax_simpo.plan.make_plan` with a task as JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from jax_simpo.config import load_config
from jax_simpo.errors import UserError
from jax_simpo.plan.topology import Topology


def main(task: dict[str, Any]) -> None:
    """Does the task and leaves the plan, or what the user must mend, in the file it names."""
    stream = _only_python_writes_to_stderr(task["log"])
    from jax_simpo.plan.program import PlannedSetup, plan_step  # jax must be imported after the redirection

    console = Console(file=stream, markup=False, highlight=False, soft_wrap=True)

    def keep(result: dict[str, Any]) -> None:
        Path(task["result"]).write_text(json.dumps(result), encoding="utf-8")

    try:
        config = load_config(task["config"], list(task["overrides"]))
        setup = PlannedSetup(config, topology=Topology.parse(task["topology"]))
        plan_step(setup, console, search=bool(task["search"]), keep=lambda plan: keep(plan.to_json()))
    except UserError as error:
        keep({"error": type(error).__name__, "message": str(error)})


def _only_python_writes_to_stderr(log: str) -> TextIO:
    """What the compilers' own code prints, warnings about hardware that is not here above all, goes to a file."""
    stream = os.fdopen(os.dup(2), "w", encoding="utf-8", buffering=1)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 2)
    os.close(file)
    sys.stderr = stream
    return stream


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
