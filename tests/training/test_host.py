"""Memory and cores of the host are those that its container or job leaves to the process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jax_simpo.training.host import host_cores, host_memory

NO_LIMIT = "9223372036854771712"  # what the older kind of groups says where there is none


def write(root: Path, files: dict[str, str]) -> tuple[Path, Path]:
    """Writes files below a folder for groups; returns that folder, and the file of the process's own groups."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root / "groups", root / "own"


@pytest.mark.parametrize(
    ("files", "gigabytes", "cores"),
    [
        # Docker, and Kubernetes: a container sees its own group as the root.
        ({"own": "0::/", "groups/memory.max": "2000000000", "groups/cpu.max": "150000 100000"}, 2, 2),
        # SLURM: the limit is of a group above that of the process.
        (
            {
                "own": "0::/system/job_7/step_0/task_1",
                "groups/system/job_7/memory.max": "3000000000",
                "groups/system/job_7/step_0/memory.max": "max",
                "groups/system/job_7/step_0/cpu.max": "max 100000",
                "groups/system/job_7/cpu.max": "100000 100000",
            },
            3,
            1,
        ),
        # The older kind of groups, with a tree for each controller, in a container that does not see its own path.
        (
            {
                "own": "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n0::/",
                "groups/memory/memory.limit_in_bytes": "1000000000",
                "groups/cpu/cpu.cfs_quota_us": "50000",
                "groups/cpu/cpu.cfs_period_us": "100000",
            },
            1,
            1,
        ),
    ],
    ids=["container", "job", "older groups"],
)
def test_limits_of_groups_count(files: dict[str, str], gigabytes: int, cores: int, tmp_path: Path) -> None:
    places = write(tmp_path, files)
    assert host_memory(*places) == gigabytes * 10**9
    assert host_cores(*places) == min(cores, host_cores(Path("nowhere"), Path("nowhere")))


def test_without_limits_it_is_all_of_the_host(tmp_path: Path) -> None:
    files = {
        "own": "5:memory:/a\n4:cpu:/a",
        "groups/memory/a/memory.limit_in_bytes": NO_LIMIT,
        "groups/cpu/a/cpu.cfs_quota_us": "-1",
        "groups/cpu/a/cpu.cfs_period_us": "100000",
    }
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for places in (write(tmp_path, files), (tmp_path / "no groups", tmp_path / "no file")):
        assert host_memory(*places) == physical
        assert 1 <= host_cores(*places) <= (os.cpu_count() or 1)
