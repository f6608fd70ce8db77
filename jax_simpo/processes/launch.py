"""Finds the other processes of a run: from options, from SLURM, from Kubernetes, or with JAX's own detection.

These settings belong to the launch and not to the run, so they are options and environment variables, never keys of the
config file. A run of one process needs none of them. jax is imported only when there are processes to join.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from jax_simpo.errors import LaunchError

# The variables of a SLURM job step that JAX reads. `sbatch` alone does not set the node list: a program that is started
# without `srun` is one process, whatever the number of tasks of the job.
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_SLURM_NODES = ("SLURM_STEP_NUM_NODES", "SLURM_JOB_NUM_NODES", "SLURM_NNODES")
_TPU_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")  # set by GKE
_PLACE_OPTIONS = "`--coordinator_address HOST:PORT --num_processes N --process_id I`"


@dataclass(frozen=True)
class Launch:
    """The launch options that the user gave; None where an option was left out.

    Attributes:
        coordinator_address: host and port of process 0, which the others connect to.
        num_processes: number of processes of the run.
        process_id: number of this process, from 0.
        distributed: True lets JAX find the processes in any way it knows (Cloud TPU VMs, Open MPI). False makes this
            a run of one process, whatever the environment says. None looks for SLURM, GKE and Kubernetes.
    """

    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    distributed: bool | None = None


@dataclass(frozen=True)
class Join:
    """Arguments of `jax.distributed.initialize`. JAX finds those that are None in the environment."""

    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: tuple[int, ...] | None = None


def find(launch: Launch, environment: Mapping[str, str]) -> Join | None:
    """Returns the arguments for joining the other processes; None for a run of one process.

    Raises:
        LaunchError: the options are incomplete or contradict each other, or this process is one of several pods that
            cannot find each other.
    """
    place = (launch.coordinator_address, launch.num_processes, launch.process_id)
    if launch.distributed is False:
        if any(value is not None for value in place):
            raise LaunchError("--no-distributed is one process, but its place among others is given; give only one")
        return None
    if any(value is not None for value in place):
        return _explicit(launch, environment)
    if launch.distributed:
        return Join()
    if _in_slurm(environment):
        return _slurm(environment)
    if _tpu_hosts(environment) > 1:
        return Join()
    return _kubernetes(environment)


def _explicit(launch: Launch, environment: Mapping[str, str]) -> Join | None:
    """Returns the arguments that the options give; JAX may find those that are missing."""
    address, count, number = launch.coordinator_address, launch.num_processes, launch.process_id
    if count == 1 and not number:
        return None
    jax_finds_rest = launch.distributed or _in_slurm(environment) or _tpu_hosts(environment) > 1
    if jax_finds_rest and None in (address, count, number):
        return Join(address, count, number)
    if address is None or count is None or number is None:
        raise LaunchError(
            f"the place of this process among others takes three options: {_PLACE_OPTIONS}; give all of them"
        )
    if count < 1 or not 0 <= number < count:
        raise LaunchError(f"--process_id {number} of --num_processes {count}: processes count from 0 to {count - 1}")
    if not re.fullmatch(r".+:\d+", address):
        raise LaunchError(f"--coordinator_address {address}: give HOST:PORT, such as {address.split(':')[0]}:8476")
    return Join(address, count, number)


def _in_slurm(environment: Mapping[str, str]) -> bool:
    return all(name in environment for name in _SLURM)


def _slurm(environment: Mapping[str, str]) -> Join | None:
    if int(environment["SLURM_NTASKS"]) == 1:
        return None
    # JAX gives each task one GPU, that of its local number. The only task of a node must take all GPUs of the node.
    per_node = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    gpus = environment.get("SLURM_GPUS_ON_NODE", "")
    one_task_per_node = re.fullmatch(r"1(\(x\d+\))?", per_node) is not None and gpus.isdecimal()
    return Join(local_device_ids=tuple(range(int(gpus))) if one_task_per_node else None)


def named_hosts(environment: Mapping[str, str]) -> int:
    """Returns the number of hosts that SLURM's variables, or a TPU's, name; 1 where they name none."""
    slurm = next((environment[name] for name in _SLURM_NODES if environment.get(name, "").isdecimal()), "1")
    return max(int(slurm), _tpu_hosts(environment))


def _tpu_hosts(environment: Mapping[str, str]) -> int:
    """Returns the number of TPU hosts, over all slices."""
    text = next((environment[name] for name in _TPU_HOSTS if name in environment), "")
    # Where libtpu finds no TPU, it leaves a sentence in the variable, with commas in it.
    hosts = [host for host in text.split(",") if " " not in host.strip()]
    return max(1, len(hosts)) * int(environment.get("MEGASCALE_NUM_SLICES") or 1)


def _kubernetes(environment: Mapping[str, str]) -> Join | None:
    index = environment.get("JOB_COMPLETION_INDEX")
    if "KUBERNETES_SERVICE_HOST" not in environment or index is None or any(name in environment for name in _TPU_HOSTS):
        return None
    if importlib.util.find_spec("kubernetes") is None:
        raise LaunchError(
            f"this is pod {index} of an indexed Kubernetes job, and the other pods cannot be found. Install the "
            f"`kubernetes` package (`pip install 'jax[k8s]'`) for JAX to ask the cluster, or give {_PLACE_OPTIONS}; "
            "for a job of one pod give `--no-distributed`"
        )
    return Join()


_joined = False


def join(launch: Launch) -> None:
    """Joins the other processes, if there are any. Call it before JAX is initialized.

    Raises:
        LaunchError: as `find` raises it, or the other processes do not answer.
    """
    global _joined
    if _joined:  # JAX joins only once; later commands of this process keep the same group
        return
    arguments = find(launch, os.environ)
    if arguments is None:
        return
    from jax_simpo.processes import distributed  # imports jax, which takes seconds

    distributed.join(
        arguments.coordinator_address, arguments.num_processes, arguments.process_id, arguments.local_device_ids
    )
    _joined = True


def is_first() -> bool:
    """Returns True if this process prints and writes: the first of several processes, or the only one."""
    if not _joined:
        return True
    from jax_simpo.processes import distributed

    return distributed.is_first()


def finish() -> None:
    """Waits for the other processes at the end of a command that succeeded."""
    if _joined:
        from jax_simpo.processes import distributed

        distributed.finish()


def fail(error: BaseException) -> None:
    """Ends all processes of the run because of `error`. In a run of one process it does nothing."""
    if _joined:
        from jax_simpo.processes import distributed

        distributed.fail(error)
