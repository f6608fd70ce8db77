"""Chooses the backend of a run: what `auto` prefers on each kind of device, and whether a named backend can run."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp

from jax_simpo.errors import ConfigError
from jax_simpo.ops.attention.backends import BACKENDS, Place, load_backend

# By kind of device, the backends that `auto` tries in turn, and the reason for each preference. The last runs anywhere.
PREFERENCES: dict[str, tuple[tuple[str, str], ...]] = {
    "CPU": (("blockwise", "fastest measured there, docs/decisions/004-attention-choice.md"),),
    "TPU": (
        ("splash", "not measured yet: by design, the TPU's own kernel that skips dead blocks"),
        ("blockwise", "the only other one whose memory is linear in the row length"),
    ),
    "Hopper GPU": (
        ("pallas", "not measured yet: by design, docs/decisions/003-attention-on-gpu.md"),
        ("triton", "not measured yet: has no kernels for Hopper alone, docs/decisions/007-attention-on-other-gpus.md"),
        ("cudnn", "not measured yet: the vendor's kernels, on rows that are taken apart"),
        ("banded", "not measured yet: runs anywhere, without making the host wait"),
        ("blockwise", "not measured yet: runs anywhere, computes less than banded"),
    ),
    # The kernels of `pallas` use instructions that Hopper alone has; Blackwell is one of the others.
    "GPU": (
        ("triton", "not measured yet: by design, docs/decisions/007-attention-on-other-gpus.md"),
        ("cudnn", "not measured yet: the vendor's kernels, on rows that are taken apart"),
        ("banded", "not measured yet: runs anywhere, without making the host wait"),
        ("blockwise", "not measured yet: runs anywhere, computes less than banded"),
    ),
}


def resolve_backend(
    name: str,
    device: jax.Device | None = None,
    *,
    dtype: Any = "bfloat16",
    head_dim: int = 128,
    softcap: float | None = None,
) -> tuple[str, str]:
    """Returns the name of the backend that a config's `attention` stands for, and the reason.

    Args:
        name: of the config, `auto` or one of `backends.BACKENDS`.
        device: the device that computes; the first of this process when not given.
        dtype: the compute dtype.
        head_dim: features of a head.
        softcap: the model's cap on attention scores, `None` for none.

    Raises:
        ConfigError: the backend cannot run there.
    """
    device = jax.devices()[0] if device is None else device
    platform = "gpu" if device.platform in ("gpu", "cuda") else device.platform
    capability = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    major, minor = map(int, capability.groups()) if capability else (0, 0)  # AMD's have names instead
    return choose(name, Place(platform, (major, minor), jnp.dtype(dtype).name, head_dim, softcap is not None))


def choose(name: str, place: Place) -> tuple[str, str]:
    """Does the work of `resolve_backend`, for a place that need not be this machine."""
    if name != "auto":
        if obstacle := load_backend(name).obstacle(place):
            possible = ", ".join(other for other in BACKENDS if load_backend(other).obstacle(place) is None)
            raise ConfigError(
                f"`attention: {name}` {obstacle}; choose auto or one of those that can run here: {possible}"
            )
        return name, "as configured"
    passed_over: list[str] = []
    for preferred, reason in PREFERENCES[place.kind]:
        obstacle = load_backend(preferred).obstacle(place)
        if obstacle is None:
            return preferred, "; ".join([f"auto on a {place.kind}: {reason}", *passed_over])
        passed_over.append(f"{preferred} {obstacle}")
    raise AssertionError(f"no preferred backend runs on a {place.kind}")
