"""Joins the ranks of a run, and exchanges the few values between them that DeepSpeed does not exchange."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from jax_simpo.errors import ConfigError, UserError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """The place of this process among the ranks of the run.

    Attributes:
        rank: this process's number, from 0.
        world: number of ranks.
        device: the device that this process computes on.
        launched: True if torchrun or deepspeed started the process. Such a run uses DeepSpeed, even with one rank.
    """

    rank: int
    world: int
    device: torch.device
    launched: bool

    @property
    def is_first(self) -> bool:
        """True for the rank that prints, and that writes the files of which there is one per run."""
        return self.rank == 0

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Returns the sum of the ranks' arrays, in float64."""
        if self.world == 1:
            return np.asarray(values, np.float64)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.cpu().numpy()

    def first(self, work: Callable[[], Result]) -> Result:
        """Calls `work` on the first rank; returns its result, or raises its `UserError`, on all ranks."""
        if self.world == 1:
            return work()
        outcome: list[Result | UserError | None] = [None]
        if self.is_first:
            try:
                outcome = [work()]
            except UserError as error:
                outcome = [error]
        dist.broadcast_object_list(outcome, src=0, device=self.device)
        if isinstance(outcome[0], UserError):
            raise outcome[0]
        return outcome[0]  # type: ignore[return-value]

    def collect(self, value: Result) -> list[Result]:
        """Returns the values of all ranks, ordered by rank."""
        if self.world == 1:
            return [value]
        values: list[Result | None] = [None] * self.world
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def wait(self) -> None:
        """Returns when every rank has called this."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def open_ranks(timeout_minutes: int = 30) -> Iterator[Ranks]:
    """Joins the process group that torchrun or deepspeed prepared, and leaves it at the end, also after an error.

    It must leave: PyTorch aborts a process that ends inside a group. Without a launcher there is one process, no group.

    Raises:
        ConfigError: there are more processes than GPUs.
    """
    rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is None or world is None:
        yield Ranks(0, 1, _device(0), launched=False)
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = _device(local)
    backend = "nccl" if device.type == "cuda" else "gloo"
    _prepare_deepspeed(device)
    dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
    try:
        yield Ranks(int(rank), int(world), device, launched=True)
    finally:
        dist.destroy_process_group()


def _device(local_rank: int) -> torch.device:
    """Returns the GPU of this rank, or the CPU if the machine has no GPU."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would detect it, but with a warning
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(
            f"rank {local_rank} of this machine has no GPU: there are {count}. Start at most {count} processes "
            f"(`--nproc_per_node {count}`)"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _prepare_deepspeed(device: torch.device) -> None:
    """Silences DeepSpeed, and keeps it from compiling a C++ operator for collectives on CPUs: gloo does these too."""
    # DeepSpeed 0.19 uses names of collectives that newer PyTorch warns about at every call.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if device.type == "cpu":
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
