"""The backends of attention: what one consists of, and the registry of those there are.

To add a backend, write a file that ends with `BACKEND = Backend(prepare, attend, obstacle)` and add its line to
`BACKENDS`. All backends compute the same numbers under the same mask; `dense` is the one the tests compare with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

from jaxtyping import Array

from jax_simpo.ops.attention.mask import Mask

# A backend's name in a config, and its module. The module is imported when the backend is first asked for, and must
# import without the libraries that only its kernels need: `obstacle` has to answer where these are missing.
BACKENDS = {
    "dense": "jax_simpo.ops.attention.dense",
    "blockwise": "jax_simpo.ops.attention.blockwise",
    "banded": "jax_simpo.ops.attention.banded",
    "splash": "jax_simpo.ops.attention.splash",
    "pallas": "jax_simpo.ops.attention.pallas.backend",
    "triton": "jax_simpo.ops.attention.triton.backend",
    "cudnn": "jax_simpo.ops.attention.cudnn",
}


class ScoreRule(NamedTuple):
    """The static settings by which products of queries and keys become scores.

    A score is `scale * (q . k)`, then capped, `softcap * tanh(score / softcap)`, then masked.

    Attributes:
        scale: factor on the products.
        window: sliding window of the layer in positions, `None` for none.
        softcap: the cap on scores, `None` for none.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class Place:
    """Describes where attention is to run, and for which model: the choice of a backend depends on nothing else.

    Attributes:
        platform: as jax names it: cpu, tpu, gpu.
        capability: CUDA compute capability, `(0, 0)` elsewhere.
        dtype: the compute dtype.
        head_dim: features of a head.
        softcap: True if the model caps its attention scores.
    """

    platform: str
    capability: tuple[int, int]
    dtype: str
    head_dim: int
    softcap: bool

    @property
    def kind(self) -> str:
        """The kind of device: a key of `choice.PREFERENCES`."""
        if self.platform == "gpu":
            return "Hopper GPU" if self.capability[0] == 9 else "GPU"
        return "TPU" if self.platform == "tpu" else "CPU"


@dataclass(frozen=True)
class Backend:
    """One implementation of attention, as three functions.

    Under a mesh, `prepare` and `attend` run inside `shard_map`, on the rows and heads of one device.

    Attributes:
        prepare: `prepare(mask, window)` returns the table that `attend` reads in layers with this window: any tree of
            arrays with the rows first. It runs once per batch, outside the loop over layers; `mask.tables` is empty.
        attend: `attend(q, k, v, mask, rule)` returns the result, `[B, L, H, Dh]` in q's dtype, with gradients for q, k
            and v. q is `[B, L, H, Dh]`, k and v are `[B, L, K, Dh]`; query head `h` reads key/value head
            `h // (H / K)`. Its table is `mask.table(rule.window)`. Queries that see no key give zeros.
        obstacle: `obstacle(place)` says why the backend cannot run there, and returns `None` where it can. The text
            goes on after the backend's name: "needs a TPU, and this is a CPU".
    """

    prepare: Callable[[Mask, int | None], Any]
    attend: Callable[[Array, Array, Array, Mask, ScoreRule], Array]
    obstacle: Callable[[Place], str | None]


def load_backend(name: str) -> Backend:
    """Imports a backend.

    Args:
        name: one of `BACKENDS`, or of a variant, such as `pallas+overlap`.

    Raises:
        ValueError: no backend has that name.
    """
    base, _, variant = name.partition("+")
    if base not in BACKENDS or (variant and variant not in variants_of(base)):
        raise ValueError(f"attention backend {name!r} is not one of {', '.join(BACKENDS)}")
    backend: Backend = variants_of(base)[variant] if variant else import_module(BACKENDS[base]).BACKEND
    return backend


def variants_of(name: str) -> dict[str, Backend]:
    """Returns variants of a backend, by what differs: they compute the same, and no config can name them.

    `jax-simpo doctor` compares them with the backend, as `NAME+VARIANT`. They are its module's `VARIANTS`, if any.
    """
    variants: dict[str, Backend] = getattr(import_module(BACKENDS[name]), "VARIANTS", {})
    return variants


def runs_anywhere(place: Place) -> None:
    """Is the `obstacle` of backends that need nothing but XLA."""
