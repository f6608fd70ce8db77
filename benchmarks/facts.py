"""Where and with what a benchmark ran, and how much memory a process took. Imports neither jax nor torch."""

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
    """Machine, versions, date and commit, as every result states them.

    Args:
        device: what computed, as the framework names it.
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
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def commit() -> str:
    """The checkout's commit, marked where files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty= with changes", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown (no git checkout)"


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.machine()


def _versions() -> list[str]:
    found = []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return found


def peak_resident_bytes() -> int:
    """Most memory this process has held at once since it began, or since `forget_peak`; Linux only.

    Not `ru_maxrss`: that is handed down by whoever started the process.
    """
    return _status_bytes("VmHWM")


def resident_bytes() -> int:
    """Memory this process holds now, mapped pages of files included; Linux only."""
    return _status_bytes("VmRSS")


def _status_bytes(name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def forget_peak() -> None:
    """Lets `peak_resident_bytes` count from now on."""
    Path("/proc/self/clear_refs").write_text("5")
