"""Describes the machine and the versions of a benchmark, and measures a process's memory. Imports no jax, no torch."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "trl", "numpy")
# What a GPU adds. Of some there is one for CUDA 12 and one for CUDA 13.
_GPU_PACKAGES = (
    *("jax-cuda12-plugin", "jax-cuda13-plugin", "triton", "flash-attn", "flash-attn-4"),
    *("nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "nvidia-cuda-nvcc-cu12", "nvidia-cuda-nvcc"),
)
# CUTLASS comes with FlashAttention 4, and is in nothing else that is measured.
_COMPUTING = re.compile(r"jax|jaxlib|jax-cuda.*|torch|triton|nvidia-(?!cutlass).*")


def machine_facts(device: str) -> dict[str, str]:
    """Returns machine, versions, date and commit, as every result states them.

    Args:
        device: the computing device, as its framework names it.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "device": device,
        "machine": f"{_processor()}, {cores()} cores, {memory:.0f} GiB",
        "python": platform.python_version(),
        "versions": ", ".join(installed_versions((*_PACKAGES, *_GPU_PACKAGES))),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
    }


def cores() -> int:
    """Returns the number of cores this process may use."""
    return len(os.sched_getaffinity(0))


def commit() -> str:
    """Returns the checkout's commit, with a mark if files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty= with changes", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown (no git checkout)"


def main_module() -> str:
    """Returns the name of the script that Python was started with."""
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec is not None else Path(sys.argv[0]).stem


@cache
def accelerator() -> str:
    """Returns the names of the GPUs that a process may use, or of the processor where there is none."""
    return ", ".join(_of_gpus("name")) or _processor()


@cache
def has_gpu() -> bool:
    """Returns True if a process may use a GPU."""
    return bool(_of_gpus("name"))


@cache
def driver() -> str:
    """Returns the version of the GPUs' driver, or nothing where there is none."""
    return ", ".join(dict.fromkeys(_of_gpus("driver_version")))


def _of_gpus(field: str) -> list[str]:
    """Returns what `nvidia-smi` says of each GPU that a process may use, by `CUDA_VISIBLE_DEVICES` too."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if os.environ.get("JAX_PLATFORMS") == "cpu" or visible == "":
        return []
    command = ["nvidia-smi", f"--query-gpu=index,uuid,{field}", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    gpus = [[part.strip() for part in line.split(",", 2)] for line in listed.strip().splitlines()]
    if visible is None:
        return [value for _, _, value in gpus]
    found = [v for name in visible.split(",") for index, uuid, v in gpus if name == index or uuid.startswith(name)]
    # A slice of a GPU has a name of its own, which this list does not have: then the name says where it was measured.
    return found or [f"{value} ({visible})" for value in dict.fromkeys(value for _, _, value in gpus)]


@cache
def computing_versions() -> tuple[str, ...]:
    """Returns name and version of the installed packages that compute: jax with its plugins, torch, CUDA.

    Packages that only add a contender are not among them: the others' measurements stay good when one is installed.
    """
    names = {name.lower().replace("_", "-") for each in metadata.distributions() if (name := each.metadata["Name"])}
    return tuple(installed_versions(sorted(name for name in names if _COMPUTING.fullmatch(name))))


def _processor() -> str:
    try:
        model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        model = None
    return model[1] if model else platform.machine()


def installed_versions(names: Iterable[str]) -> list[str]:
    """Returns name and version of those packages that are installed."""
    installed = []
    for name in names:
        try:
            installed.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return installed


def installed(module: str) -> bool:
    """Returns True if a module is there, which may lie in a package that is not."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def peak_resident_bytes() -> int:
    """Returns the most memory this process has held at once since it began, or since `forget_peak`; Linux only.

    `ru_maxrss` would not do, because a process inherits it from its parent.
    """
    return _status_bytes("VmHWM")


def resident_bytes() -> int:
    """Returns the memory this process holds, mapped pages of files included; Linux only."""
    return _status_bytes("VmRSS")


def _status_bytes(name: str) -> int:
    kib = re.search(rf"^{name}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert kib is not None
    return int(kib[1]) * 1024


def forget_peak() -> None:
    """Resets the peak, so that `peak_resident_bytes` counts from this call on."""
    Path("/proc/self/clear_refs").write_text("5")
