"""The backend `xla`: tiles in plain XLA, which runs anywhere.

A tile of float32 logits is an array. On a CPU it stays in the cache; an accelerator writes it to its memory and reads
it again (docs/decisions/009-loss-head-kernels.md).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_simpo.ops.attention.backends import Place
from jax_simpo.ops.bits import on_cpu
from jax_simpo.ops.loss_head.backends import Backend, Rule, Sums, Wanted, nothing_kept
from jax_simpo.ops.loss_head.blocks import Block, Blocks
from jax_simpo.ops.loss_head.states import SHARED, StateList, Tile
from jax_simpo.ops.numerics import LOWEST, matmul_precision

# States and logits of a tile. On a CPU it should stay in the cache; elsewhere it should be large, because each tile is
# a kernel call.
_CPU_TILE = (512, (11 << 20) // 4)
_TILE = (2048, (256 << 20) // 4)


def tile() -> tuple[int, int]:
    """Returns the size of a tile; see `Backend.tile`."""
    return _CPU_TILE if on_cpu() else _TILE


def sums(
    states: Float[Array, "N D"], head: Float[Array, "V D"], listing: StateList, blocks: Blocks, rule: Rule
) -> Sums:
    """Goes through all tiles with an online softmax; see `Backend.sums`."""

    def one_block(carry: tuple[Array, ...], block: Block) -> tuple[tuple[Array, ...], None]:
        weights = blocks.slice(head, block)

        def one_tile(tile: Tile, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            top, total, kept = carry
            logits = _logits(tile.read(states), weights, rule.softcap)
            if rule.keeps:
                kept = jax.lax.dynamic_update_slice(kept, logits[None], (block.number, tile.start, 0))
            counted = blocks.counted(block)
            old_top = tile.read(top)
            new_top = jnp.maximum(old_top, jnp.where(counted, logits, LOWEST).max(-1))
            sums = jnp.where(counted, jnp.exp(logits - new_top[:, None]), 0.0).sum(-1)
            new_total = tile.read(total) * jnp.exp(old_top - new_top) + sums
            return tile.write(top, new_top), tile.write(total, new_total), kept

        return listing.over_tiles(one_tile, carry), None

    zeros = jnp.zeros(listing.size)
    kept = nothing_kept()
    if rule.keeps:
        kept = jax.lax.empty((blocks.count, listing.size, blocks.size), jnp.float32)
    start: tuple[Array, ...] = (zeros + LOWEST, zeros, kept)
    (top, total, kept), _ = jax.lax.scan(one_block, start, blocks.all())
    return Sums(top, total, kept)


def dlogits(
    states: Float[Array, "C D"],
    weights: Float[Array, "S D"],
    wanted: Wanted,
    block: Block,
    blocks: Blocks,
    rule: Rule,
    kept: Float[Array, "C S"] | None,
) -> Float[Array, "C S"]:
    """Returns the gradient of a tile's products; see `Backend.dlogits`."""
    token, dlogp, lse = wanted
    logits = _logits(states, weights, rule.softcap) if kept is None else kept
    at_targets = sum(jnp.where(blocks.is_target(block, token[:, n]), dlogp[:, n, None], 0.0) for n in range(SHARED))
    gradient = at_targets - dlogp.sum(-1)[:, None] * jnp.exp(logits - lse[:, None])
    if rule.softcap is not None:
        gradient *= 1.0 - (logits / rule.softcap) ** 2
    return jnp.where(blocks.counted(block), gradient, 0.0).astype(states.dtype)


def _logits(h: Float[Array, "C D"], weights: Float[Array, "S D"], softcap: float | None) -> Float[Array, "C S"]:
    precision = matmul_precision(h.dtype)
    logits = jnp.einsum("nd,vd->nv", h, weights, precision=precision, preferred_element_type=jnp.float32)
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def obstacle(place: Place, width: int) -> None:
    """Needs nothing but XLA; see `Backend.obstacle`."""


BACKEND = Backend(tile, sums, dlogits, obstacle)
