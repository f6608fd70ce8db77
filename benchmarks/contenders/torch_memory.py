"""Measures the memory of a contender that runs on PyTorch: of its process on a CPU, of its tensors on a GPU."""

from __future__ import annotations

import gc

import torch

from benchmarks import facts


def peak_bytes(device: str) -> int:
    """Returns the most bytes held at once since the process began, or since `forget_peak`; `device` is cpu or gpu."""
    return torch.cuda.max_memory_allocated() if device == "gpu" else facts.peak_resident_bytes()


def forget_peak(device: str) -> None:
    """Frees what nothing refers to any more and counts the peak from here on."""
    gc.collect()
    if device == "gpu":
        torch.cuda.reset_peak_memory_stats()
    else:
        facts.forget_peak()
