"""The backend `mosaic`: the forward pass in one kernel for TPUs, by Pallas' Mosaic lowering.

The backward pass is that of `xla`, whose compiler makes a tile's product and its gradient in one piece on a TPU already
(docs/decisions/009-loss-head-kernels.md). What the backend can do stands here; the kernel is in `mosaic_kernels.py`.
"""

from __future__ import annotations

from jaxtyping import Array, Float

from jax_simpo.ops.attention.backends import Place
from jax_simpo.ops.loss_head import xla
from jax_simpo.ops.loss_head.backends import Backend, Rule, Sums, nothing_kept
from jax_simpo.ops.loss_head.blocks import LANES, Blocks
from jax_simpo.ops.loss_head.states import StateList


def sums(
    states: Float[Array, "N D"], head: Float[Array, "V D"], listing: StateList, blocks: Blocks, rule: Rule
) -> Sums:
    """Goes through the vocabulary in one kernel; see `Backend.sums`."""
    from jax_simpo.ops.loss_head import mosaic_kernels

    top, total = mosaic_kernels.sums(states, head, listing.live, rule.softcap, interpret=rule.interpret)
    return Sums(top, total, nothing_kept())


def obstacle(place: Place, width: int) -> str | None:
    """Says why the kernels cannot run there; see `Backend.obstacle`."""
    if place.platform != "tpu":
        return f"needs a TPU, and this is a {place.kind}"
    if place.dtype != "bfloat16":
        return f"computes in bfloat16, and `dtype` is {place.dtype}"
    if width % LANES:
        return f"needs hidden states whose width is a multiple of {LANES}, and this model's have {width}"
    return None


BACKEND = Backend(xla.tile, sums, xla.dlogits, obstacle)
