"""Says which packages and which driver compile and run programs on this machine."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

# A change to one of these can change what a kernel computes.
COMPILERS = (
    *("jax", "jaxlib", "tokamax", "libtpu", "absl-py"),
    *("jax-cuda12-plugin", "jax-cuda13-plugin", "jax-cuda12-pjrt", "jax-cuda13-pjrt", "jax-rocm7-plugin"),
    *("nvidia-cuda-nvcc-cu12", "nvidia-cuda-nvcc", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13"),
)
_DRIVER = Path("/proc/driver/nvidia/version")


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Returns the versions of those packages that are installed."""
    installed = {}
    for name in packages:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


def nvidia_driver() -> str:
    """Returns what NVIDIA's kernel module says of its version; empty without one."""
    try:
        return _DRIVER.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
