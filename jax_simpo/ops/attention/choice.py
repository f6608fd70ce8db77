"""Which attention implementation a run takes, and why: what each one needs, and what `auto` prefers on each device."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp

from jax_simpo.errors import ConfigError

IMPLEMENTATIONS = ("dense", "blockwise", "splash", "pallas", "cudnn")

# float32 takes twice the shared memory: heads of 256 would leave none for a single stage of the ring.
PALLAS_HEADS = {"bfloat16": (64, 128, 256), "float32": (64, 128)}

# What `auto` takes, by kind of device: the first that can run there, and where the preference comes from.
PREFERENCES: dict[str, tuple[tuple[str, str], ...]] = {
    "CPU": (("blockwise", "fastest measured there, docs/decisions/004-attention-choice.md"),),
    "TPU": (
        ("splash", "not measured yet: by design, the TPU's own kernel that skips dead blocks"),
        ("blockwise", "the only other one whose memory is linear in the row length"),
    ),
    "Hopper GPU": (
        ("pallas", "not measured yet: by design, docs/decisions/003-attention-on-gpu.md"),
        ("blockwise", "not measured yet: runs anywhere, memory linear in the row length"),
    ),
    "GPU": (("blockwise", "not measured yet: runs anywhere, memory linear in the row length"),),
}


@dataclass(frozen=True)
class Place:
    """What the choice depends on.

    Attributes:
        platform: as jax names it: cpu, tpu, gpu.
        capability: CUDA compute capability, `(0, 0)` elsewhere.
        dtype: the compute dtype.
        head_dim: features of a head.
        softcap: whether the model caps its attention scores.
    """

    platform: str
    capability: tuple[int, int]
    dtype: str
    head_dim: int
    softcap: bool

    @property
    def kind(self) -> str:
        """A key of `PREFERENCES`."""
        if self.platform == "gpu":
            return "Hopper GPU" if self.capability[0] == 9 else "GPU"
        return "TPU" if self.platform == "tpu" else "CPU"


def resolve_implementation(
    name: str,
    device: jax.Device | None = None,
    *,
    dtype: Any = "bfloat16",
    head_dim: int = 128,
    softcap: float | None = None,
) -> tuple[str, str]:
    """The implementation that a config's `attention` stands for, and why.

    Args:
        name: of the config, `auto` or one of `IMPLEMENTATIONS`.
        device: what computes; the first of this process when not given.
        dtype: the compute dtype.
        head_dim: features of a head.
        softcap: the model's cap on attention scores, `None` for none.

    Raises:
        ConfigError: the implementation cannot run there.
    """
    device = jax.devices()[0] if device is None else device
    platform = "gpu" if device.platform in ("gpu", "cuda") else device.platform
    capability = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    major, minor = map(int, capability.groups()) if capability else (0, 0)  # AMD's have names
    return choose(name, Place(platform, (major, minor), jnp.dtype(dtype).name, head_dim, softcap is not None))


def choose(name: str, place: Place) -> tuple[str, str]:
    """`resolve_implementation` for a place that need not be at hand."""
    if name != "auto":
        if reason := obstacle(name, place):
            can = ", ".join(other for other in IMPLEMENTATIONS if obstacle(other, place) is None)
            raise ConfigError(f"`attention: {name}` {reason}; choose auto or one of those that can run here: {can}")
        return name, "as configured"
    passed_over: list[str] = []
    for choice, source in PREFERENCES[place.kind]:
        reason = obstacle(choice, place)
        if reason is None:
            return choice, "; ".join([f"auto on a {place.kind}: {source}", *passed_over])
        passed_over.append(f"{choice} {reason}")
    raise AssertionError(f"nothing runs on a {place.kind}")  # blockwise runs everywhere and ends every list


def obstacle(name: str, place: Place) -> str | None:
    """Why an implementation cannot run there, `None` where it can."""
    if name == "splash":
        if place.platform != "tpu":
            return f"needs a TPU, and this is a {place.kind}"
        if place.dtype != "bfloat16":
            return f"computes in bfloat16, and `dtype` is {place.dtype}"
        if find_spec("tokamax") is None:
            return "needs the package tokamax (`pip install 'jax-simpo[tpu]'`)"
    if name == "pallas":
        if place.kind != "Hopper GPU":
            return f"needs a Hopper GPU (H100, H200), and this is a {place.kind}"
        sizes = PALLAS_HEADS.get(place.dtype, ())
        if place.head_dim not in sizes:
            return (
                f"has kernels for heads of {', '.join(map(str, sizes))} in {place.dtype}, and this model's have "
                f"{place.head_dim}"
            )
    if name == "cudnn":
        largest = 256 if place.capability >= (9, 0) else 128
        if place.platform != "gpu":
            return f"needs an NVIDIA GPU, and this is a {place.kind}"
        if place.dtype != "bfloat16":
            return f"computes in bfloat16, and `dtype` is {place.dtype}"
        if place.softcap:
            return "cannot cap attention scores, as this model does"
        if place.head_dim > largest or place.head_dim % 8:
            return f"takes heads of up to {largest} features, a multiple of 8, and this model's have {place.head_dim}"
    return None
