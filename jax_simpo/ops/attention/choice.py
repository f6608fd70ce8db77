"""Says which backends can run in a place, and which of them `auto` prefers there before any was tried.

On an accelerator `training.attention` tries the candidates and decides by what it sees (`evidence.py`).
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_simpo.errors import ConfigError
from jax_simpo.ops.attention.backends import BACKENDS, Place, load_backend
from jax_simpo.sharding import platform_of

# By kind of device, the backends that `auto` tries in turn, and the reason for each preference. The last runs anywhere.
# docs/decisions/ has what was measured (004) and what was designed (003 and 007).
PREFERENCES: dict[str, tuple[tuple[str, str], ...]] = {
    "CPU": (("blockwise", "fastest measured there"),),
    "TPU": (
        ("splash", "not measured yet: by design, the TPU's own kernel that skips dead blocks"),
        ("blockwise", "the only other one whose memory is linear in the row length"),
    ),
    "Hopper GPU": (
        ("pallas", "not measured yet: by design, kernels made for Hopper"),
        ("triton", "not measured yet: has no kernels for Hopper alone"),
        ("cudnn", "not measured yet: the vendor's kernels, on rows that are taken apart"),
        ("banded", "not measured yet: runs anywhere, without making the host wait"),
        ("blockwise", "not measured yet: runs anywhere, computes less than banded"),
    ),
    # The kernels of `pallas` use instructions that Hopper alone has; Blackwell is one of the others.
    "GPU": (
        ("triton", "not measured yet: by design, kernels for NVIDIA GPUs from Ampere on"),
        ("cudnn", "not measured yet: the vendor's kernels, on rows that are taken apart"),
        ("banded", "not measured yet: runs anywhere, without making the host wait"),
        ("blockwise", "not measured yet: runs anywhere, computes less than banded"),
    ),
}


def place_of(
    device: jax.Device | None = None,
    *,
    dtype: Any = "bfloat16",
    head_dim: int = 128,
    softcap: float | None = None,
) -> Place:
    """Describes a device and a model to the backends.

    Args:
        device: the device that computes; the first of this process when not given.
        dtype: the compute dtype.
        head_dim: features of a head.
        softcap: the model's cap on attention scores, `None` for none.
    """
    device = jax.devices()[0] if device is None else device
    capability = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    major, minor = map(int, capability.groups()) if capability else (0, 0)  # AMD's have names instead, such as gfx942
    return Place(platform_of(device), (major, minor), jnp.dtype(dtype).name, head_dim, softcap is not None)


class Candidates(NamedTuple):
    """Lists what `auto` chooses among in a place.

    Attributes:
        reasons: by name of a backend that can run there, in the order of preference, why it is preferred.
        obstacles: of each other backend that is preferred there, why it cannot run: "pallas has kernels for ...".
    """

    reasons: dict[str, str]
    obstacles: list[str]


def candidates(place: Place) -> Candidates:
    """Returns the backends that `auto` chooses among in a place; at least one."""
    found = Candidates({}, [])
    for name, reason in PREFERENCES[place.kind]:
        if obstacle := load_backend(name).obstacle(place):
            found.obstacles.append(f"{name} {obstacle}")
        else:
            found.reasons[name] = reason
    assert found.reasons, f"no preferred backend runs on a {place.kind}"
    return found


def choose(name: str, place: Place) -> tuple[str, str]:
    """Returns the backend that a config's `attention` stands for, from what is known without trying any; and why.

    Args:
        name: of the config, `auto` or one of `backends.BACKENDS`.
        place: where it is to run.

    Raises:
        ConfigError: the backend cannot run there.
    """
    if name != "auto":
        if obstacle := load_backend(name).obstacle(place):
            possible = ", ".join(other for other in BACKENDS if load_backend(other).obstacle(place) is None)
            raise ConfigError(
                f"`attention: {name}` {obstacle}; choose auto or one of those that can run here: {possible}"
            )
        return name, "as configured"
    reasons, obstacles = candidates(place)
    preferred, reason = next(iter(reasons.items()))
    return preferred, "; ".join([f"auto on a {place.kind}: {reason}", *obstacles])
