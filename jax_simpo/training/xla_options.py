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
from typing import NamedTuple

import jax
from jax.sharding import Mesh, SingleDeviceSharding

from jax_simpo.sharding import platform_of

SWITCH = "JAX_SIMPO_XLA_FLAGS"  # `false` in the environment: set none of the options below

# By platform, options with their values. Of the names that an option has had the first that the compiler knows counts.
# What each does: docs/performance.md.
_OPTIONS: dict[str, tuple[dict[str, str | bool], ...]] = {
    "gpu": (
        {"xla_gpu_enable_latency_hiding_scheduler": True},
        {"xla_gpu_enable_while_loop_double_buffering": True},
        # The second is that of jax 0.10.
        {"xla_gpu_pipeline_all_gather": "COLLECTIVE_PIPELINING_MODE_ON", "xla_gpu_enable_pipelined_all_gather": True},
    ),
}


def step_options(mesh: Mesh, environment: Mapping[str, str] | None = None) -> dict[str, str | bool]:
    """Returns the options with which the program of a micro-batch is compiled; none where no parameter is gathered.

    Args:
        mesh: the mesh.
        environment: the environment variables, with the user's `XLA_FLAGS`; None takes those of this process.
    """
    if mesh.shape["fsdp"] == 1:
        return {}
    return choose_options(platform_of(mesh.devices.flat[0]), _own(mesh), environment).taken


class Options(NamedTuple):
    """Holds what was decided about the options of a platform.

    Attributes:
        taken: the options, with their values.
        left_out: by name of each other option, why it is not set.
    """

    taken: dict[str, str | bool]
    left_out: dict[str, str]


def choose_options(platform: str, device: jax.Device, environment: Mapping[str, str] | None = None) -> Options:
    """Decides which options the step takes on a platform, where it gathers parameters.

    Args:
        platform: of `sharding.platform_of`.
        device: that this process compiles for; its compiler is asked which options it knows.
        environment: as for `step_options`.
    """
    environment = os.environ if environment is None else environment
    switch = environment.get(SWITCH, "")
    given = _user_flags(environment.get("XLA_FLAGS", ""))
    options = Options({}, {})
    for names in _OPTIONS.get(platform, ()):
        newest = next(iter(names))
        if switch.lower() in ("false", "0", "off", "no"):
            options.left_out[newest] = f"{SWITCH} is {switch}"
        elif set_by_user := given & set(names):
            options.left_out[min(set_by_user)] = "XLA_FLAGS sets it"
        elif known := [name for name in names if is_known(name, names[name], device)]:
            options.taken[known[0]] = names[known[0]]
        else:
            options.left_out[newest] = "the installed XLA does not know it"
    return options


@cache
def is_known(name: str, value: str | bool, device: jax.Device) -> bool:
    """Returns True if the compiler of a device knows an option."""
    x = jax.ShapeDtypeStruct((), "float32", sharding=SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: x, compiler_options={name: value}).lower(x).compile()
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
    """Returns the names of the flags in `XLA_FLAGS`. As XLA reads it, a text without a leading dash names a file."""
    if text.strip() and not text.lstrip().startswith("-"):
        file = Path(text.strip())
        text = file.read_text(errors="replace") if file.is_file() else ""
    return set(re.findall(r"--(\w+)", text))
