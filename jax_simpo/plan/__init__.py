"""`jax-simpo plan`: the real training step compiled for hardware that need not be here, and what it takes there.

`topology` knows the hardware, `program` compiles the step and measures it, `report` tells what was found. The compiling
is done in a process of its own (`python -m jax_simpo.plan`): what is compiled for is settled when jax is loaded, and a
TPU's compiler in a process makes every later look for devices look for TPUs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from jax_simpo import errors
from jax_simpo.errors import PlanError
from jax_simpo.plan.report import Plan
from jax_simpo.plan.topology import Topology


def make_plan(config: str | Path, overrides: list[str], topology: Topology, *, search: bool = True) -> Plan:
    """Compiles the step of a config for a topology and returns what it takes.

    Args:
        config: the config file, or `builtin:NAME`.
        overrides: `--key=value` of the command line.
        topology: what to compile for.
        search: look for the largest micro-batch that fits, which takes up to four more compilations.

    Raises:
        UserError: whatever the user can mend; `PlanError` where the compiler is missing or breaks off.
    """
    topology.check_installed()
    with tempfile.TemporaryDirectory() as folder:
        log, result = Path(folder, "compiler.log"), Path(folder, "plan.json")
        task = {
            "config": str(config),
            "overrides": overrides,
            "topology": str(topology),
            "search": search,
            "log": str(log),
            "result": str(result),
        }
        command = [sys.executable, "-m", "jax_simpo.plan", json.dumps(task)]
        status = subprocess.run(command, env={**os.environ, **topology.environment()}).returncode
        if not result.exists():
            if status > 0:  # a defect of ours or of jax; Python has told it
                raise PlanError(f"--topology {topology}: compiling failed with the error above")
            said = log.read_text(errors="replace")[-2000:].strip() if log.exists() else ""
            killed = " (killed: this machine's memory may be too small for it)" if status == -9 else ""
            raise PlanError(
                f"--topology {topology}: the compiler broke off, status {status}{killed}. Its last words:\n{said}"
            )
        found = json.loads(result.read_text())
    if "error" in found:
        raise getattr(errors, found["error"])(found["message"])
    return Plan.from_json(found)
