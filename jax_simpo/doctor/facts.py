"""Gathers what is installed, connected and set on this machine. It judges nothing."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import jax

from jax_simpo.ops.attention import place_of
from jax_simpo.ops.attention.evidence import told
from jax_simpo.processes.launch import named_hosts
from jax_simpo.training.host import host_cores, host_memory
from jax_simpo.training.installed import COMPILERS, versions_of
from jax_simpo.training.xla_options import SWITCH, Options, choose_options

_PACKAGES = ("jax-simpo", "flax", "optax", "orbax-checkpoint", "transformers", "torch", "numpy")
_VARIABLES = (
    *("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES"),
    *("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE", "JAX_COMPILATION_CACHE_DIR"),
    *(SWITCH, "SLURM_JOB_NUM_NODES", "SLURM_NNODES", "TPU_WORKER_HOSTNAMES", "MEGASCALE_NUM_SLICES"),
)


@dataclass(frozen=True)
class Facts:
    """A machine as this process sees it.

    Attributes:
        system: the operating system, such as Linux.
        python: the version of Python.
        versions: of the installed packages that matter here, by name.
        platform: what JAX computes on: cpu, gpu or tpu; none where it cannot use its devices.
        device_kind: the first device, as JAX names it; where it cannot use its devices, what it says about that.
        devices: devices of this process.
        device_memory: bytes of the first device that JAX may use; None where it does not say.
        capability: CUDA compute capability of the first device; None elsewhere.
        nvidia_gpus: names of the NVIDIA GPUs that the driver lists, whether or not JAX uses them.
        nvidia_driver: the driver's version; None without one.
        tpu_chips: TPU chips that the system lists, whether or not JAX uses them.
        hosts: hosts that the environment names, as SLURM and GKE do; 1 where it names none.
        cores: CPU cores that this process may use, within the limits of its container or job.
        host_memory: bytes of the host's memory that this process may use, within those limits.
        environment: the variables that steer JAX and are set.
        compilation_cache: the folder that keeps compiled programs; None where they are not kept.
        xla_options: options that a step on several such devices is compiled with, with their values.
        xla_options_left_out: by name of each other option that the program knows for them, why it is left out.
    """

    system: str
    python: str
    versions: dict[str, str]
    platform: str
    device_kind: str
    devices: int
    device_memory: int | None
    capability: tuple[int, int] | None
    nvidia_gpus: list[str]
    nvidia_driver: str | None
    tpu_chips: int
    hosts: int
    cores: int
    host_memory: int
    environment: dict[str, str]
    compilation_cache: str | None
    xla_options: dict[str, str | bool]
    xla_options_left_out: dict[str, str]

    def version(self, package: str) -> tuple[int, ...]:
        """Returns the numbers of a package's version, such as (0, 10, 2); () where it is not installed."""
        return tuple(int(number) for number in re.findall(r"\d+", self.versions.get(package, "")))


def gather_facts() -> Facts:
    """Looks at the machine. JAX takes hold of its devices in this call, or says why it cannot."""
    try:
        devices, words = jax.local_devices(), ""
    except Exception as error:  # the driver's, a busy TPU's, or an assertion of jax's own
        devices, words = [], " ".join(str(error).split()) or f"{type(error).__name__} in jax"
    device = devices[0] if devices else None
    place = None if device is None else place_of(device)
    gpus, driver = _nvidia()
    options = Options({}, {}) if place is None or device is None else _options(place.platform, device)
    return Facts(
        system=platform.system(),
        python=platform.python_version(),
        versions=versions_of((*_PACKAGES, *COMPILERS)),
        platform="none" if place is None else place.platform,
        device_kind=words if device is None else device.device_kind,
        devices=len(devices),
        device_memory=None if device is None else (device.memory_stats() or {}).get("bytes_limit"),
        capability=None if place is None or place.capability == (0, 0) else place.capability,
        nvidia_gpus=gpus,
        nvidia_driver=driver,
        tpu_chips=_tpu_chips(),
        hosts=named_hosts(os.environ),
        cores=host_cores(),
        host_memory=host_memory(),
        environment={name: os.environ[name] for name in _VARIABLES if os.environ.get(name)},
        compilation_cache=jax.config.jax_compilation_cache_dir,  # type: ignore[attr-defined]
        xla_options=options.taken,
        xla_options_left_out=options.left_out,
    )


def _options(platform: str, device: jax.Device) -> Options:
    """Returns XLA's options for the step; where the compiler fails when it is asked for them, that is their reason."""
    try:
        return choose_options(platform, device)
    except jax.errors.JaxRuntimeError as error:
        return Options({}, {"any of its XLA options": f"the compiler {told(error)}"})


def _nvidia() -> tuple[list[str], str | None]:
    """Asks NVIDIA's driver for the names of its GPUs and for its version."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return [], None
    lines = (
        [line.rsplit(", ", 1) for line in answer.stdout.splitlines() if ", " in line] if not answer.returncode else []
    )
    return [name for name, _ in lines], lines[0][1] if lines else None


def _tpu_chips() -> int:
    """Counts the chips that a Cloud TPU VM shows as devices: `/dev/accel0` or, since v5e, Google's PCI devices."""
    accelerators = list(Path("/dev").glob("accel[0-9]*"))
    if accelerators:
        return len(accelerators)
    google = 0
    for device in Path("/sys/bus/pci/devices").glob("*"):
        try:
            vendor, kind = (device / "vendor").read_text().strip(), (device / "class").read_text().strip()
        except OSError:
            continue
        google += vendor == "0x1ae0" and kind.startswith("0x12")  # a processing accelerator, not Google's network card
    return google
