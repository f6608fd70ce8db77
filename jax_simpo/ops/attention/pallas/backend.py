"""The backend `pallas`: what its kernels can do, and the way to them. It needs no GPU library before `attend` runs."""

from __future__ import annotations

from jaxtyping import Array, Float

from jax_simpo.ops.attention.backends import Backend, Place, ScoreRule
from jax_simpo.ops.attention.head_sizes import check_kernel, missing_kernel
from jax_simpo.ops.attention.mask import Mask
from jax_simpo.ops.attention.pallas.bounds import BlockBounds, find_block_bounds
from jax_simpo.ops.attention.pallas.switches import DEFAULTS, Switches

# Features of a head that there are kernels for, by compute dtype. float32 takes twice the shared memory: with heads of
# 256 not a single stage of a ring would fit.
HEAD_SIZES = {"bfloat16": (64, 128, 256), "float32": (64, 128)}


def obstacle(place: Place) -> str | None:
    """Says why the kernels cannot run there; see `Backend.obstacle`."""
    if place.kind != "Hopper GPU":
        return f"needs a Hopper GPU (H100, H200), and this is a {place.kind}"
    return missing_kernel(HEAD_SIZES, place.dtype, place.head_dim)


def make_backend(switches: Switches) -> Backend:
    """Returns the backend with these variants of the kernels, to compare it with `BACKEND`."""

    def prepare(mask: Mask, window: int | None) -> BlockBounds:
        """Lists the live blocks of the batch; see `Backend.prepare`."""
        return find_block_bounds(mask.key_end, mask.positions, window, **switches.of_lists)

    def attend(
        q: Float[Array, "B L H Dh"],
        k: Float[Array, "B L K Dh"],
        v: Float[Array, "B L K Dh"],
        mask: Mask,
        rule: ScoreRule,
    ) -> Float[Array, "B L H Dh"]:
        """Computes attention by the kernels; see `Backend.attend`. With `mask.interpret` they run on a CPU, for tests.

        Raises:
            ConfigError: there is no kernel for the head size or the dtype.
        """
        check_kernel("pallas", HEAD_SIZES, q, interpret=mask.interpret)
        from jax_simpo.ops.attention.pallas import kernel

        bounds = mask.table(rule.window)
        return kernel.attention(
            q, k, v, mask.key_end, mask.positions, bounds, rule, switches=switches, interpret=mask.interpret
        )

    return Backend(prepare, attend, obstacle)


BACKEND = make_backend(DEFAULTS)
VARIANTS = {
    "ping_pong": make_backend(DEFAULTS._replace(ping_pong=True)),
    "overlap": make_backend(DEFAULTS._replace(overlap=True)),
    "ping_pong+overlap": make_backend(DEFAULTS._replace(ping_pong=True, overlap=True)),
    "row_order": make_backend(DEFAULTS._replace(heavy_first=False)),
    "whole_lists": make_backend(DEFAULTS._replace(half_lists=False)),
}
