"""Chooses XLA's options for the program of a micro-batch, by which collectives run beside products.

They are handed to the compiler with the program, not through `XLA_FLAGS`: they work for hardware that is not here
(`jax-simpo plan`), in a process that has loaded jax already, and an option that the installed XLA does not know is left
out, where an unknown flag would end the process. What you set in `XLA_FLAGS` stays as you set it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import jax
from jax.sharding import Mesh, SingleDeviceSharding

SWITCH = "JAX_SIMPO_XLA_FLAGS"  # `false` in the environment: set none of the options below

# By platform, as jax names it for devices that are here. What each does: docs/performance.md.
_OPTIONS: dict[str, tuple[str, ...]] = {
    "gpu": (
        "xla_gpu_enable_latency_hiding_scheduler",
        "xla_gpu_enable_while_loop_double_buffering",
        "xla_gpu_enable_pipelined_all_gather",
    ),
}


def step_options(mesh: Mesh, environment: Mapping[str, str] | None = None) -> dict[str, bool]:
    """Returns the options with which the program of a micro-batch is compiled; none where no parameter is gathered.

    Args:
        mesh: the mesh.
        environment: the environment variables, with the user's `XLA_FLAGS`; None takes those of this process.
    """
    environment = os.environ if environment is None else environment
    if mesh.shape["fsdp"] == 1 or environment.get(SWITCH, "").lower() in ("false", "0", "off", "no"):
        return {}
    device = mesh.devices.flat[0]
    platform = "gpu" if device.platform == "cuda" else device.platform  # jax names GPUs that are not here `cuda`
    given = _user_flags(environment.get("XLA_FLAGS", ""))
    return {name: True for name in _OPTIONS.get(platform, ()) if name not in given and is_known(name, _own(mesh))}


@cache
def is_known(name: str, device: jax.Device) -> bool:
    """Returns True if the compiler of a device knows an option that is true or false."""
    x = jax.ShapeDtypeStruct((), "float32", sharding=SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: x, compiler_options={name: True}).lower(x).compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return False
    return True


def _own(mesh: Mesh) -> jax.Device:
    """Returns a device that this process compiles for."""
    own = (device for device in mesh.devices.flat if device.process_index == jax.process_index())
    return next(own, mesh.devices.flat[0])


def _user_flags(text: str) -> set[str]:
    """Returns the names of the flags in `XLA_FLAGS`: its words or, as XLA reads it, those of a file that it names."""
    if text.strip() and not text.lstrip().startswith("-"):
        file = Path(text.strip())
        text = file.read_text(errors="replace") if file.is_file() else ""
    return set(re.findall(r"--(\w+)", text))
