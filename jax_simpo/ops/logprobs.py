"""Log-probabilities of the targets from their hidden states, one tile of logits at a time.

Only the hidden states that predict a target reach the head. The logits are made in tiles of some targets by a block of
the vocabulary, as attention makes its scores: the forward keeps the running maximum and sum of each target (online
softmax) and in the end one float, its log-sum-exp; the backward makes each tile again. The vocabulary is the outer loop
and the targets the inner one, so a block of the head is read once, its gradient is added up while it is in fast memory
and written once, and a tile on a CPU never leaves the cache. Targets that are padding are brought to the end and the
inner loop stops before them.

With memory to spare (`keep_bytes`) the forward keeps its logits and the backward does not make them again: one matrix
product of four less.

Under a mesh the head is gathered over `fsdp` once before the loops and its gradient is reduced and scattered once after
them: the loops run inside `shard_map`, where no partitioner can put a collective of the head's size into them. Over
`tensor`, where each device has its own part of the vocabulary, only the finished maxima and sums are exchanged.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jax_simpo.ops.bits import on_cpu, slice_in_loop
from jax_simpo.ops.blockwise import matmul_precision
from jax_simpo.sharding import RULES, all_gather, psum, psum_scatter, spec

# Targets and bytes of a tile: it should stay in a CPU's cache; elsewhere it should be large, for each is a kernel call.
_CPU_TILE = (512, 8 << 20)
_TILE = (2048, 256 << 20)
_LANES, _CPU_LANES = 128, 16  # a block of the vocabulary is a multiple of it, if that is no more than was asked for
_MASKED = -1e30  # finite: no NaN where nothing has been counted yet


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
) -> Float[Array, "B T"]:
    """Log-probability of each target token, float32; padding targets get 0.

    Args:
        hidden: hidden states after the final norm, in the compute dtype.
        head: the LM head (the embedding of a tied model), float32 master weights, `[vocabulary, width]`; a frozen one
            in any dtype.
        target_index: int32, index in the row of the hidden state that predicts the target.
        target_token: int32, the token predicted.
        counts: int32, how many targets of each row are real; they come first. None: all.
        softcap: caps the logits, `softcap * tanh(logits / softcap)` (Gemma 2).
        chunk: most targets of a tile; None takes what is fastest on the device.
        block: most vocabulary entries of a tile; None takes as many as make a tile of the device's favourite size.
        keep_bytes: memory a device may spend on keeping all logits for the backward pass. They are kept if they fit.
        frozen: the head has no gradient, and none is computed: one matrix product of four less, and no memory for it.
    """
    if counts is None:
        counts = jnp.full(len(target_index), target_index.shape[1], jnp.int32)
    targets, size = _CPU_TILE if on_cpu() else _TILE
    # Chunks are the grain in which padding is skipped: small ones where there are few targets.
    chunk = chunk or max(256, min(targets, _round_up(target_index.size // _data_parallel() // 8)))
    block = block or max(_LANES, size // (4 * chunk) // _LANES * _LANES)
    static = _Static(softcap, chunk, block, keep_bytes, frozen)
    return _target_logps(static, hidden, head, target_index, target_token, counts)


class _Static(NamedTuple):
    softcap: float | None
    chunk: int
    block: int
    keep_bytes: int
    frozen: bool


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
    """Runs `f` on every device's own rows and its own part of the head, if there is a mesh."""
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
    static: _Static, hidden: Array, head: Array, index: Array, token: Array, counts: Array, *, meshed: bool
) -> tuple[Array, Array, Array]:
    whole_head = _gather_head(head, hidden.dtype, meshed)
    order = _Order(static.chunk, index, counts)
    states, tokens = order.states(hidden), order.chunks(_local_token(token, len(whole_head), meshed))
    blocks = _Blocks(static.block, len(whole_head))
    keeps = order.keeps(static, blocks)

    def one_block(so_far: tuple[Array, ...], at: _Block) -> tuple[tuple[Array, ...], None]:
        weights = blocks.slice(whole_head, at)

        def one_tile(i: Array, so_far: tuple[Array, ...]) -> tuple[Array, ...]:
            top, total, chosen, kept = so_far
            logits = _logits(states[i], weights, static.softcap)
            if keeps:
                kept = kept.at[at.number, i].set(logits)
            counted = blocks.counted(at)
            new_top = jnp.maximum(top[i], jnp.where(counted, logits, _MASKED).max(-1))
            sums = jnp.where(counted, jnp.exp(logits - new_top[:, None]), 0.0).sum(-1)
            found = jnp.where(blocks.is_target(at, tokens[i]) & counted, logits, 0.0).sum(-1)
            return (
                top.at[i].set(new_top),
                total.at[i].set(total[i] * jnp.exp(top[i] - new_top) + sums),
                chosen.at[i].add(found),
                kept,
            )

        return jax.lax.fori_loop(0, order.live, one_tile, so_far), None

    zeros = jnp.zeros(tokens.shape)
    kept = jax.lax.empty((blocks.count, *tokens.shape, blocks.size) if keeps else (1, 1, 1, 1), jnp.float32)
    begin: tuple[Array, ...] = (zeros + _MASKED, zeros, zeros, kept)
    (top, total, chosen, kept), _ = jax.lax.scan(one_block, begin, blocks.all())
    if meshed and jax.lax.axis_size(RULES["vocab"]) > 1:  # a reduction over one device is not free on every backend
        own, top = top, jax.lax.pmax(top, RULES["vocab"])
        total, chosen = jax.lax.psum((total * jnp.exp(own - top), chosen), RULES["vocab"])
    lse = top + jnp.log(jnp.where(total > 0, total, 1.0))
    return order.back(chosen - lse), order.back(lse), kept


def _local_backward(
    static: _Static,
    hidden: Array,
    head: Array,
    index: Array,
    token: Array,
    counts: Array,
    lse: Array,
    kept: Array,
    dlogps: Array,
    *,
    meshed: bool,
) -> tuple[Array, ...]:
    whole_head = _gather_head(head, hidden.dtype, meshed)
    order = _Order(static.chunk, index, counts)
    tokens, dlogps = _local_token(token, len(whole_head), meshed), jnp.where(order.real, dlogps, 0.0)
    lse = jnp.where(order.real, lse, jnp.inf)  # the exponentials of padding are 0: infinite ones times 0 would be NaN
    states, tokens, lses, gs = order.states(hidden), *map(order.chunks, (tokens, lse, dlogps))
    blocks = _Blocks(static.block, len(whole_head))
    keeps = order.keeps(static, blocks)
    dot = partial(jnp.einsum, precision=matmul_precision(hidden.dtype), preferred_element_type=jnp.float32)

    # (The gradient of a frozen head is None throughout.)
    def one_block(so_far: tuple[Array | None, Array], at: _Block) -> tuple[tuple[Array | None, Array], None]:
        dhead, dstates = so_far
        weights = blocks.slice(whole_head, at)

        def one_tile(i: Array, so_far: tuple[Array | None, Array]) -> tuple[Array | None, Array]:
            dweights, dstates = so_far
            logits = kept[at.number, i] if keeps else _logits(states[i], weights, static.softcap)
            dlogits = blocks.is_target(at, tokens[i]) - jnp.exp(logits - lses[i][:, None])
            if static.softcap is not None:
                dlogits *= 1.0 - (logits / static.softcap) ** 2
            dlogits = jnp.where(blocks.counted(at), gs[i][:, None] * dlogits, 0.0).astype(hidden.dtype)
            if dweights is not None:
                dweights += _weight_gradient(dlogits, states[i])
            return dweights, dstates.at[i].add(dot("nv,vd->nd", dlogits, weights))

        dweights = None if dhead is None else jnp.zeros(weights.shape)
        dweights, dstates = jax.lax.fori_loop(0, order.live, one_tile, (dweights, dstates))
        if dhead is not None:
            dhead = jax.lax.dynamic_update_slice_in_dim(dhead, dweights, at.start, 0)
        return (dhead, dstates), None

    # Every block of the head's gradient is written.
    dhead = None if static.frozen else jax.lax.empty(whole_head.shape, jnp.float32)
    (dhead, dstates), _ = jax.lax.scan(one_block, (dhead, jnp.zeros(states.shape)), blocks.all())
    if meshed:
        dstates = psum(dstates, str(RULES["vocab"]))
    dhidden = order.add_states(dstates, hidden)
    if dhead is None:
        return (dhidden,)
    if meshed:
        dhead = psum(psum_scatter(dhead, str(RULES["embed"]), 1), "data")
    return dhidden, dhead.astype(head.dtype)


class _Order:
    """The targets of all rows in chunks, the real ones first, and the way back."""

    def __init__(self, chunk: int, index: Int[Array, "B T"], counts: Int[Array, " B"]) -> None:
        rows, targets = self.shape = index.shape
        self.size = max(1, min(chunk, rows * targets))  # of a chunk
        self.live = (counts.sum() + self.size - 1) // self.size  # chunks that hold a real target
        self.real = jnp.arange(targets) < counts[:, None]
        self.order = jnp.argsort(~self.real.reshape(-1), stable=True)
        self.row, self.index = self.order // targets, index.reshape(-1)[self.order]

    def chunks(self, x: Array) -> Array:
        """[B, T] -> [I, C], padded with zeros."""
        return self._cut(x.reshape(-1)[self.order])

    def back(self, x: Array) -> Array:
        """[I, C] -> [B, T], with zeros for padding."""
        flat = x.reshape(-1)[: len(self.order)]
        return jnp.where(self.real, jnp.zeros_like(flat).at[self.order].set(flat).reshape(self.shape), 0.0)

    def states(self, hidden: Float[Array, "B L D"]) -> Float[Array, "I C D"]:
        """The hidden states that predict the targets."""
        return self._cut(hidden[self.row, self.index])

    def add_states(self, dstates: Float[Array, "I C D"], like: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """The gradients of `states` added up where they came from."""
        flat = dstates.reshape(-1, dstates.shape[-1])[: len(self.order)]
        return jnp.zeros(like.shape).at[self.row, self.index].add(flat).astype(like.dtype)

    def keeps(self, static: _Static, blocks: _Blocks) -> bool:
        """Whether the logits of all tiles are kept for the backward pass."""
        padded = -(-len(self.order) // self.size) * self.size
        return 4 * padded * blocks.count * blocks.size <= static.keep_bytes

    def _cut(self, x: Array) -> Array:
        padding = -len(x) % self.size
        return jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, self.size, *x.shape[1:])


class _Block(NamedTuple):
    """A block of this device's part of the vocabulary: `size` entries from `start`, counted from `first` on."""

    number: Int[Array, ""]
    start: Int[Array, ""]
    first: Int[Array, ""]


class _Blocks:
    """The vocabulary in blocks of one size, few and even; if it does not divide, the last reaches into its neighbour.

    What it holds of its neighbour is not counted. It comes first, so that the neighbour's own gradient overwrites the
    zeros it leaves there.
    """

    def __init__(self, block: int, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.count = -(-vocabulary // block)
        self.size = min(_round_up(-(-vocabulary // self.count), _CPU_LANES if on_cpu() else _LANES), block, vocabulary)

    def all(self) -> _Block:
        """All blocks, stacked, in the order of the loop."""
        number = jnp.roll(jnp.arange(self.count), 1)
        return _Block(number, jnp.minimum(number * self.size, self.vocabulary - self.size), number * self.size)

    def slice(self, head: Float[Array, "V D"], at: _Block) -> Float[Array, "S D"]:
        """The block's part of the head."""
        return slice_in_loop(head, at.start, self.size)

    def counted(self, at: _Block) -> Bool[Array, "1 S"] | bool:
        """Which entries are the block's own."""
        return True if self.vocabulary % self.size == 0 else (at.start + jnp.arange(self.size) >= at.first)[None, :]

    def is_target(self, at: _Block, token: Int[Array, " C"]) -> Bool[Array, "C S"]:
        """One-hot of the targets in the block."""
        return (token - at.start)[:, None] == jnp.arange(self.size)[None, :]


def _gather_head(head: Array, dtype: jnp.dtype, meshed: bool) -> Array:
    head = head.astype(dtype)
    return all_gather(head, str(RULES["embed"]), 1) if meshed else head


def _local_token(token: Int[Array, "B T"], vocabulary: int, meshed: bool) -> Int[Array, "B T"]:
    """The tokens counted from the start of this device's part of the vocabulary."""
    return token - jax.lax.axis_index(RULES["vocab"]) * vocabulary if meshed else token


def _logits(h: Float[Array, "C D"], weights: Float[Array, "S D"], softcap: float | None) -> Float[Array, "C S"]:
    precision = matmul_precision(h.dtype)
    logits = jnp.einsum("nd,vd->nv", h, weights, precision=precision, preferred_element_type=jnp.float32)
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _weight_gradient(dlogits: Float[Array, "C S"], h: Float[Array, "C D"]) -> Float[Array, "S D"]:
    if h.dtype == jnp.float32 or not on_cpu():
        precision = matmul_precision(h.dtype)
        return jnp.einsum("nv,nd->vd", dlogits, h, precision=precision, preferred_element_type=jnp.float32)
    # XLA finds a CPU's matrix units for 16-bit numbers in this form alone, and cannot run it with the transposition
    # folded into it.
    product = jnp.einsum("xnd,xnv->dv", h[None], dlogits[None], preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(product).T


def _round_up(n: int, multiple: int = _LANES) -> int:
    return -(-n // multiple) * multiple


def _data_parallel() -> int:
    """Devices that the rows are split over."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in RULES["batch"] or ())
