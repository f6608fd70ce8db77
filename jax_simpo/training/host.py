"""Says what of its host a process may use: memory and CPU cores, within the limits of its container or job.

Docker, Kubernetes and SLURM limit a process by control groups. The kernel shows the groups of a process in
`/proc/self/cgroup`, and each group's limits in files below `/sys/fs/cgroup`; a group is within its parents' limits too.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def host_memory(groups: Path = _GROUPS, own: Path = _OWN) -> int:
    """Returns the bytes of the host's memory that this process may use.

    Args:
        groups: where the kernel shows control groups; another place in tests.
        own: the file that names those of this process.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for folder in _folders("memory", groups, own):
        limits += [limit for name in ("memory.max", "memory.limit_in_bytes") if (limit := _number(folder / name))]
    return min(limits)


def host_cores(groups: Path = _GROUPS, own: Path = _OWN) -> int:
    """Returns the CPU cores that this process may use; a part of one counts as one. Arguments: `host_memory`'s."""
    limits = [float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)]
    for folder in _folders("cpu", groups, own):
        quota, _, period = _text(folder / "cpu.max").partition(" ")  # "max 100000" where there is no limit
        if quota.isdecimal() and period.isdecimal():
            limits.append(int(quota) / int(period))
        old_quota, old_period = (_number(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if old_quota and old_period:
            limits.append(old_quota / old_period)
    return max(1, math.ceil(min(limits)))


def _folders(controller: str, groups: Path, own: Path) -> Iterator[Path]:
    """Yields the folders of this process's groups that hold a controller's limits, and of the groups above them."""
    for line in _text(own).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = groups / controller if controllers else groups  # the newer kind of groups has one tree for all
        group = root / path.lstrip("/")
        yield from (group, *(folder for folder in group.parents if folder.is_relative_to(root)))


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:  # another system than Linux, or a group that a container does not see
        return ""


def _number(file: Path) -> int | None:
    """Returns the number in a file; None where there is none, as "max" and -1 are."""
    text = _text(file)
    return int(text) if text.isdecimal() else None
