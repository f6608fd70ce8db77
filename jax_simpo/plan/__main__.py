"""Compiles in a process of its own, which `jax_simpo.plan.make_hardware_plan` starts with a task as JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

from jax_simpo.config import load_config
from jax_simpo.errors import UserError
from jax_simpo.plan.topology import Topology
from jax_simpo.terminal import open_console


def main(task: dict[str, Any]) -> None:
    """Makes the hardware plan of a task; writes the plan, or the user's mistake, to the file that the task names."""
    stream = _only_python_writes_to_stderr(task["log"])
    from jax_simpo.plan.program import TopologySetup, measure_step  # imports jax, after the redirection

    console = open_console(file=stream)

    def write(result: dict[str, Any]) -> None:
        Path(task["result"]).write_text(json.dumps(result), encoding="utf-8")

    try:
        config = load_config(task["config"], list(task["overrides"]))
        setup = TopologySetup(config, topology=Topology.parse(task["topology"]))
        measure_step(setup, console, search=bool(task["search"]), save=lambda plan: write(plan.to_json()))
    except UserError as error:
        write({"error": type(error).__name__, "message": str(error)})


def _only_python_writes_to_stderr(log: str) -> TextIO:
    """Sends the output of the compilers' own code to a file; it is mostly warnings about missing hardware.

    Returns:
        The stderr that Python goes on writing to.
    """
    stream = os.fdopen(os.dup(2), "w", encoding="utf-8", buffering=1)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 2)
    os.close(file)
    sys.stderr = stream
    return stream


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
