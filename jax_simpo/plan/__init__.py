"""Makes hardware plans (`jax-simpo plan`): compiles the training step for hardware that need not be here.

`topology` describes the hardware, `program` compiles the step and measures it, `report` holds and shows the result. A
process of its own (`python -m jax_simpo.plan`) compiles, because jax fixes its platform when it is loaded, and once a
process has loaded a TPU's compiler, jax looks for TPUs in it.
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
from jax_simpo.plan.report import HardwarePlan
from jax_simpo.plan.topology import Topology


def make_hardware_plan(
    config: str | Path, overrides: list[str], topology: Topology, *, search: bool = True
) -> HardwarePlan:
    """Compiles the training step of a config for a topology, and returns its memory, collectives and operations.

    Args:
        config: the config file, or `builtin:NAME`.
        overrides: `--key=value` of the command line.
        topology: the hardware to compile for.
        search: look for the largest micro-batch that fits, which takes up to four more compilations.

    Raises:
        UserError: the config cannot be used.
        PlanError: the compiler is missing or breaks off.
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
            if status > 0:  # a defect of this program or of jax; Python has printed its traceback
                raise PlanError(f"--topology {topology}: compiling failed with the error above")
            last_output = log.read_text(errors="replace")[-2000:].strip() if log.exists() else ""
            killed = " (killed: this machine's memory may be too small for it)" if status == -9 else ""
            raise PlanError(
                f"--topology {topology}: the compiler broke off, status {status}{killed}. Its last output:\n"
                f"{last_output}"
            )
        content = json.loads(result.read_text())
    if "error" in content:
        raise getattr(errors, content["error"])(content["message"])
    return HardwarePlan.from_json(content)
