"""Computes log-probabilities of the targets from their hidden states, one tile of logits at a time.

Only the hidden states that predict a target reach the head, and each of them once: where responses share a prefix, one
state predicts a token of every response, and where they share that token too, all of them are one target. A tile of
logits is some states by a block of the vocabulary, as in attention a tile of scores is some queries by some keys. The
forward pass keeps the running maximum and sum of each state (online softmax) and at the end one float, its log-sum-exp;
the backward pass recomputes each tile. The outer loop is over the vocabulary and the inner one over the states. So a
block of the head is read once, its gradient is added up in fast memory and written once, and on a CPU a tile never
leaves the cache. The inner loop ends with the last state: padding is never computed.

The tiles themselves are made by a backend: `xla` anywhere, or a kernel that keeps them in a GPU's or TPU's fast memory
(ops/loss_head).

With memory to spare (`keep_bytes`) the forward pass keeps its logits and the backward pass does not recompute them,
which saves one matrix product of four.

Under a mesh the head is assembled from its parts on `fsdp` once before the loops, and its gradient is reduced and
scattered once after them. The loops run inside `shard_map`, where no partitioner can add a collective of the head's
size to them. Each device on `tensor` has its own part of the vocabulary, and only the finished maxima and sums are
exchanged.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jax_simpo.ops.bits import on_cpu
from jax_simpo.ops.loss_head.backends import Rule, Wanted, load_backend
from jax_simpo.ops.loss_head.blocks import LANES, Block, Blocks
from jax_simpo.ops.loss_head.states import StateList, Tile, round_up
from jax_simpo.ops.numerics import matmul_precision
from jax_simpo.sharding import RULES, all_gather, psum, psum_scatter, spec


def target_logps(
    hidden: Float[Array, "B L D"],
    head: Float[Array, "V D"],
    target_index: Int[Array, "B T"],
    target_token: Int[Array, "B T"],
    *,
    counts: Int[Array, " B"] | None = None,
    softcap: float | None = None,
    chunk: int | None = None,
    block: int | None = None,
    keep_bytes: int = 0,
    frozen: bool = False,
    backend: str = "xla",
    interpret: bool = False,
) -> Float[Array, "B T"]:
    """Returns the log-probability of each target token, float32; padding targets get 0.

    Args:
        hidden: hidden states after the final norm, in the compute dtype.
        head: the LM head (the embedding of a tied model), float32 master weights `[vocabulary, width]`, or of any dtype
            if frozen.
        target_index: int32, index in the row of the hidden state that predicts the target.
        target_token: int32, the token predicted.
        counts: int32, the number of real targets of each row, which come first; None if all are real.
        softcap: caps the logits, `softcap * tanh(logits / softcap)` (Gemma 2).
        chunk: most states of a tile; None takes the number that is fastest on the device.
        block: most vocabulary entries of a tile; None takes as many as give a tile of the size that is fastest.
        keep_bytes: memory that a device may spend on all logits, for the backward pass; they are kept if they fit.
        frozen: do not compute the head's gradient, which saves one matrix product of four and the gradient's memory.
        backend: one of `loss_head.backends.BACKENDS`. Logits that are kept are always those of `xla`.
        interpret: run a backend's kernels on the CPU, slowly, for tests.
    """
    if counts is None:
        counts = jnp.full(len(target_index), target_index.shape[1], jnp.int32)
    own_targets, own_vocabulary = target_index.size // _devices("batch"), len(head) // _devices("vocab")
    if 4 * own_targets * own_vocabulary <= keep_bytes:
        backend = "xla"
    states, logits = load_backend(backend).tile()
    chunk = chunk or min(states, round_up(own_targets, LANES))
    block = block or max(LANES, logits // chunk // LANES * LANES)
    static = _Static(softcap, chunk, block, keep_bytes, frozen, backend, interpret)
    return _target_logps(static, hidden, head, target_index, target_token, counts)


class _Static(NamedTuple):
    softcap: float | None
    chunk: int
    block: int
    keep_bytes: int
    frozen: bool
    backend: str
    interpret: bool

    def rule(self, listing: StateList, blocks: Blocks) -> Rule:
        """Returns the settings of the tiles; the logits of all of them are kept if they fit."""
        keeps = 4 * listing.size * blocks.count * blocks.size <= self.keep_bytes
        return Rule(self.softcap, keeps, self.interpret)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _target_logps(static: _Static, *arrays: Array) -> Array:
    return _forward(static._replace(keep_bytes=0), *arrays)[0]


def _forward(static: _Static, *arrays: Array) -> tuple[Array, tuple[Array, ...]]:
    run = _per_shard(_local_forward, static, "hidden head targets targets rows", "targets targets kept")
    logps, lse, kept = run(*arrays)
    return logps, (*arrays, lse, kept)


def _backward(static: _Static, saved: tuple[Array, ...], dlogps: Array) -> tuple[Array | None, ...]:
    gradients = "hidden" if static.frozen else "hidden head"
    run = _per_shard(_local_backward, static, "hidden head targets targets rows targets kept targets", gradients)
    dhidden, *dhead = run(*saved, dlogps)
    return dhidden, (None if static.frozen else dhead[0]), None, None, None


_target_logps.defvjp(_forward, _backward)


def _per_shard(f: Any, static: _Static, inputs: str, outputs: str) -> Any:
    """Makes `f` run on each device's own rows and part of the head, if there is a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return partial(f, static, meshed=False)
    specs = {
        "hidden": P(RULES["batch"], None, None),
        "targets": P(RULES["batch"], None),
        "rows": P(RULES["batch"]),
        "head": spec("vocab", "embed"),
        "kept": P(RULES["vocab"], RULES["batch"]),
    }
    in_specs, out_specs = (tuple(specs[name] for name in names.split()) for names in (inputs, outputs))
    return jax.shard_map(partial(f, static, meshed=True), in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _local_forward(
    static: _Static, hidden: Array, head_shard: Array, index: Array, token: Array, counts: Array, *, meshed: bool
) -> tuple[Array, Array, Array]:
    head = _assemble_head(head_shard, hidden.dtype, meshed)
    listing = StateList(static.chunk, hidden.shape[1], index, token, counts)
    states = listing.take(hidden)
    blocks = Blocks(static.block, len(head))
    rule = static.rule(listing, blocks)
    top, total, kept = load_backend(static.backend).sums(states, head, listing, blocks, rule)
    target = _target_logits(listing.to_targets(states), head, _local_token(token, len(head), meshed), static)
    if meshed and jax.lax.axis_size(RULES["vocab"]) > 1:  # a reduction over one device is not free on every backend
        local_top, top = top, jax.lax.pmax(top, RULES["vocab"])
        total, target = jax.lax.psum((total * jnp.exp(local_top - top), target), RULES["vocab"])
    lse = listing.to_targets(top + jnp.log(jnp.where(total > 0, total, 1.0)))
    # A target's logit is summed in another order than those in the log-sum-exp, so it may exceed that by a rounding.
    return jnp.where(listing.real, jnp.minimum(target - lse, 0.0), 0.0), lse, kept


def _local_backward(
    static: _Static,
    hidden: Array,
    head_shard: Array,
    index: Array,
    token: Array,
    counts: Array,
    lse: Array,
    kept: Array,
    dlogps: Array,
    *,
    meshed: bool,
) -> tuple[Array, ...]:
    head = _assemble_head(head_shard, hidden.dtype, meshed)
    listing = StateList(static.chunk, hidden.shape[1], index, token, counts)
    states = listing.take(hidden)
    of_states = Wanted(
        listing.per_state(_local_token(token, len(head), meshed), -1),
        listing.added_per_state(jnp.where(listing.real, dlogps, 0.0)),
        # All targets of a state have its log-sum-exp. Padding's is infinite, so that its exponentials are 0: if they
        # were infinite, their product with its gradient of 0 would be NaN.
        listing.per_state(jnp.where(listing.real, lse, jnp.inf), jnp.inf)[:, 0],
    )
    blocks = Blocks(static.block, len(head))
    backend, rule = load_backend(static.backend), static.rule(listing, blocks)
    dot = partial(jnp.einsum, precision=matmul_precision(hidden.dtype), preferred_element_type=jnp.float32)

    # The gradient of a frozen head is None throughout.
    def one_block(carry: tuple[Array | None, Array], block: Block) -> tuple[tuple[Array | None, Array], None]:
        dhead, dstates = carry
        weights = blocks.slice(head, block)

        def one_tile(tile: Tile, carry: tuple[Array | None, Array]) -> tuple[Array | None, Array]:
            dweights, dstates = carry
            h, wanted = tile.read(states), Wanted(*map(tile.read, of_states))
            logits = tile.read(kept[block.number]) if rule.keeps else None
            dlogits = backend.dlogits(h, weights, wanted, block, blocks, rule, logits)
            if dweights is not None:
                dweights += _weight_gradient(dlogits, h)
            return dweights, tile.write(dstates, tile.read(dstates) + dot("nv,vd->nd", dlogits, weights))

        dweights = None if dhead is None else jnp.zeros(weights.shape)
        dweights, dstates = listing.over_tiles(one_tile, (dweights, dstates))
        if dhead is not None:
            dhead = jax.lax.dynamic_update_slice_in_dim(dhead, dweights, block.start, 0)
        return (dhead, dstates), None

    # Memory for the head's gradient need not be zeros, because every block of it is written.
    dhead = None if static.frozen else jax.lax.empty(head.shape, jnp.float32)
    (dhead, dstates), _ = jax.lax.scan(one_block, (dhead, jnp.zeros(states.shape)), blocks.all())
    if meshed:
        dstates = psum(dstates, str(RULES["vocab"]))
    dhidden = listing.add_back(dstates, hidden)
    if dhead is None:
        return (dhidden,)
    if meshed:
        dhead = psum(psum_scatter(dhead, str(RULES["embed"]), 1), "data")
    return dhidden, dhead.astype(head_shard.dtype)


def _assemble_head(head_shard: Array, dtype: jnp.dtype, meshed: bool) -> Array:
    """Returns this device's part of the vocabulary at its full width, in the compute dtype."""
    head = head_shard.astype(dtype)
    return all_gather(head, str(RULES["embed"]), 1) if meshed else head


def _local_token(token: Int[Array, "B T"], vocabulary: int, meshed: bool) -> Int[Array, "B T"]:
    """Counts the tokens from the start of this device's part of the vocabulary."""
    return token - jax.lax.axis_index(RULES["vocab"]) * vocabulary if meshed else token


def _target_logits(
    states: Float[Array, "B T D"], head: Float[Array, "V D"], token: Int[Array, "B T"], static: _Static
) -> Float[Array, "B T"]:
    """Returns the logit of each target, 0 if the target is in another device's part of the vocabulary."""
    is_local = (token >= 0) & (token < len(head))
    weights = head[jnp.where(is_local, token, 0)]
    logits = (states.astype(jnp.float32) * weights.astype(jnp.float32)).sum(-1)
    logits = logits if static.softcap is None else static.softcap * jnp.tanh(logits / static.softcap)
    return jnp.where(is_local, logits, 0.0)


def _weight_gradient(dlogits: Float[Array, "C S"], h: Float[Array, "C D"]) -> Float[Array, "S D"]:
    if h.dtype == jnp.float32 or not on_cpu():
        precision = matmul_precision(h.dtype)
        return jnp.einsum("nv,nd->vd", dlogits, h, precision=precision, preferred_element_type=jnp.float32)
    # XLA uses a CPU's matrix units for 16-bit numbers in this form only. The barrier keeps the transposition out of it:
    # XLA cannot run the two as one.
    product = jnp.einsum("xnd,xnv->dv", h[None], dlogits[None], preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(product).T


def _devices(axis: str) -> int:
    """Returns the number of devices that a logical axis is split over."""
    mesh, axes = jax.sharding.get_abstract_mesh(), RULES[axis]
    if mesh.empty or axes is None:
        return 1
    return math.prod(mesh.shape[name] for name in ([axes] if isinstance(axes, str) else axes))
