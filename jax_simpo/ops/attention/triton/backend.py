"""The backend `triton`: what its kernels can do, and the way to them. It needs no GPU library before `attend` runs."""

from __future__ import annotations

from jaxtyping import Array, Float

from jax_simpo.ops.attention.backends import Backend, Place, ScoreRule
from jax_simpo.ops.attention.head_sizes import check_kernel, missing_kernel
from jax_simpo.ops.attention.mask import Mask
from jax_simpo.ops.attention.triton.bounds import BlockBounds, find_block_bounds
from jax_simpo.ops.attention.triton.sizes import HEAD_SIZES


def prepare(mask: Mask, window: int | None) -> BlockBounds:
    """Lists the live blocks of the batch; see `Backend.prepare`."""
    return find_block_bounds(mask.key_end, mask.positions, window)


def attend(
    q: Float[Array, "B L H Dh"],
    k: Float[Array, "B L K Dh"],
    v: Float[Array, "B L K Dh"],
    mask: Mask,
    rule: ScoreRule,
) -> Float[Array, "B L H Dh"]:
    """Computes attention by the kernels; see `Backend.attend`. With `mask.interpret` they run on the CPU, for tests.

    Raises:
        ConfigError: there is no kernel for the head size or the dtype.
    """
    check_kernel("triton", HEAD_SIZES, q, interpret=mask.interpret)
    from jax_simpo.ops.attention.triton import kernel

    bounds = mask.table(rule.window)
    return kernel.attention(q, k, v, mask.key_end, mask.positions, bounds, rule, interpret=mask.interpret)


def obstacle(place: Place) -> str | None:
    """Says why the kernels cannot run there; see `Backend.obstacle`.

    AMD's GPUs, which report no compute capability, are among those refused: Pallas lowers the kernels for them, but
    they have not even been compiled there.
    """
    if place.platform != "gpu":
        return f"needs an NVIDIA GPU, and this is a {place.kind}"
    if place.capability < (8, 0):
        return "needs an NVIDIA GPU of compute capability 8.0 (A100) or later, and this is another"
    return missing_kernel(HEAD_SIZES, place.dtype, place.head_dim)


BACKEND = Backend(prepare, attend, obstacle)
