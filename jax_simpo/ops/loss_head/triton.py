"""The backend `triton`: tiles of logits in kernels for NVIDIA GPUs, by Pallas' Triton lowering.

What it can do stands here, and needs no GPU library; the kernels are in `triton_kernels.py`.
"""

from __future__ import annotations

from jaxtyping import Array, Float

from jax_simpo.ops.attention.backends import Place
from jax_simpo.ops.loss_head.backends import Backend, Rule, Sums, Wanted, nothing_kept
from jax_simpo.ops.loss_head.blocks import Block, Blocks
from jax_simpo.ops.loss_head.states import StateList

_STEP = 32  # features of a state in a pass of the kernels' loop, as in `triton_kernels`, which is not imported here


def tile() -> tuple[int, int]:
    """Returns the size of a tile; see `Backend.tile`.

    Only gradients in 16 bits are in memory, so the tile is larger than that of `xla`. More states in it mean that the
    sum of the head's gradient is read and written less often; docs/decisions/009-loss-head-kernels.md.
    """
    return 4096, (256 << 20) // 2


def sums(
    states: Float[Array, "N D"], head: Float[Array, "V D"], listing: StateList, blocks: Blocks, rule: Rule
) -> Sums:
    """Goes through the vocabulary in one kernel; see `Backend.sums`."""
    from jax_simpo.ops.loss_head import triton_kernels

    top, total = triton_kernels.sums(states, head, listing.live, rule.softcap, interpret=rule.interpret)
    return Sums(top, total, nothing_kept())


def dlogits(
    states: Float[Array, "C D"],
    weights: Float[Array, "S D"],
    wanted: Wanted,
    block: Block,
    blocks: Blocks,
    rule: Rule,
    kept: Float[Array, "C S"] | None,
) -> Float[Array, "C S"]:
    """Makes the gradient of a tile's products in one kernel; see `Backend.dlogits`."""
    from jax_simpo.ops.loss_head import triton_kernels

    assert kept is None, "logits that are kept are those of `xla`"
    wanted = wanted._replace(token=wanted.token - block.start)
    return triton_kernels.dlogits(
        states, weights, wanted, blocks.uncounted(block), rule.softcap, interpret=rule.interpret
    )


def obstacle(place: Place, width: int) -> str | None:
    """Says why the kernels cannot run there; see `Backend.obstacle`."""
    if place.platform != "gpu":
        return f"needs an NVIDIA GPU, and this is a {place.kind}"
    if place.capability < (8, 0):
        return "needs an NVIDIA GPU of compute capability 8.0 (A100) or later, and this is another"
    if place.dtype != "bfloat16":
        return f"computes in bfloat16, and `dtype` is {place.dtype}"
    if width % _STEP:
        return f"needs hidden states whose width is a multiple of {_STEP}, and this model's have {width}"
    return None


BACKEND = Backend(tile, sums, dlogits, obstacle)
