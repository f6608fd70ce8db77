"""Describes the machine and the versions of a benchmark, and measures a process's memory. Imports no jax, no torch."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "trl", "numpy")


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
        "versions": ", ".join(_versions()),
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


def _processor() -> str:
    try:
        model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        model = None
    return model[1] if model else platform.machine()


def _versions() -> list[str]:
    installed = []
    for name in _PACKAGES:
        try:
            installed.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return installed


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
