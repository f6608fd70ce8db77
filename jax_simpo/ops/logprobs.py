"""Computes log-probabilities of the targets from their hidden states, one tile of logits at a time.

Only the hidden states that predict a target reach the head, and each of them once: where responses share a prefix, one
state predicts a token of every response, and where they share that token too, all of them are one target. A tile of
logits is some states by a block of the vocabulary, as in attention a tile of scores is some queries by some keys. The
forward pass keeps the running maximum and sum of each state (online softmax) and at the end one float, its log-sum-exp;
the backward pass recomputes each tile. The outer loop is over the vocabulary and the inner one over the states. So a
block of the head is read once, its gradient is added up in fast memory and written once, and on a CPU a tile never
leaves the cache. The inner loop ends with the last state: padding is never computed.

With memory to spare (`keep_bytes`) the forward pass keeps its logits and the backward pass does not recompute them,
which saves one matrix product of four.

Under a mesh the head is assembled from its parts on `fsdp` once before the loops, and its gradient is reduced and
scattered once after them. The loops run inside `shard_map`, where no partitioner can add a collective of the head's
size to them. Each device on `tensor` has its own part of the vocabulary, and only the finished maxima and sums are
exchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Shaped

from jax_simpo.ops.bits import on_cpu, slice_in_loop
from jax_simpo.ops.numerics import LOWEST, matmul_precision
from jax_simpo.sharding import RULES, all_gather, psum, psum_scatter, spec

# States and bytes of a tile. On a CPU it should stay in the cache; elsewhere it should be large, because each tile is a
# kernel call.
_CPU_TILE = (512, 11 << 20)
_TILE = (2048, 256 << 20)
_LANES, _CPU_LANES = 128, 16  # a block of the vocabulary is a multiple, unless that exceeds the size asked for
_SHARED = 2  # different targets of one listed state: where two responses part, the state before predicts two tokens
_PARTS = 4  # a tile is cut into so many parts for the last states, which fill no whole tile


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
    """
    if counts is None:
        counts = jnp.full(len(target_index), target_index.shape[1], jnp.int32)
    states, size = _CPU_TILE if on_cpu() else _TILE
    chunk = chunk or min(states, _round_up(target_index.size // _data_parallel()))
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
    listing = _StateList(static.chunk, hidden.shape[1], index, token, counts)
    states = listing.take(hidden)
    blocks = _Blocks(static.block, len(head))
    keeps = listing.keeps_logits(static, blocks)

    def one_block(carry: tuple[Array, ...], block: _Block) -> tuple[tuple[Array, ...], None]:
        weights = blocks.slice(head, block)

        def one_tile(tile: _Tile, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            top, total, kept = carry
            logits = _logits(tile.read(states), weights, static.softcap)
            if keeps:
                kept = jax.lax.dynamic_update_slice(kept, logits[None], (block.number, tile.start, 0))
            counted = blocks.counted(block)
            old_top = tile.read(top)
            new_top = jnp.maximum(old_top, jnp.where(counted, logits, LOWEST).max(-1))
            sums = jnp.where(counted, jnp.exp(logits - new_top[:, None]), 0.0).sum(-1)
            new_total = tile.read(total) * jnp.exp(old_top - new_top) + sums
            return tile.write(top, new_top), tile.write(total, new_total), kept

        return listing.over_tiles(one_tile, carry), None

    zeros = jnp.zeros(listing.size)
    kept = jax.lax.empty((blocks.count, listing.size, blocks.size) if keeps else (1, 1, 1), jnp.float32)
    start: tuple[Array, ...] = (zeros + LOWEST, zeros, kept)
    (top, total, kept), _ = jax.lax.scan(one_block, start, blocks.all())
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
    listing = _StateList(static.chunk, hidden.shape[1], index, token, counts)
    states, tokens = listing.take(hidden), listing.per_state(_local_token(token, len(head), meshed), -1)
    state_dlogps = listing.added_per_state(jnp.where(listing.real, dlogps, 0.0))
    # All targets of a state have its log-sum-exp. Padding's is infinite, so that its exponentials are 0: if they were
    # infinite, their product with its gradient of 0 would be NaN.
    state_lses = listing.per_state(jnp.where(listing.real, lse, jnp.inf), jnp.inf)[:, 0]
    blocks = _Blocks(static.block, len(head))
    keeps = listing.keeps_logits(static, blocks)
    dot = partial(jnp.einsum, precision=matmul_precision(hidden.dtype), preferred_element_type=jnp.float32)

    # The gradient of a frozen head is None throughout.
    def one_block(carry: tuple[Array | None, Array], block: _Block) -> tuple[tuple[Array | None, Array], None]:
        dhead, dstates = carry
        weights = blocks.slice(head, block)

        def one_tile(tile: _Tile, carry: tuple[Array | None, Array]) -> tuple[Array | None, Array]:
            dweights, dstates = carry
            h, token, dlogp = (tile.read(x) for x in (states, tokens, state_dlogps))
            logits = tile.read(kept[block.number]) if keeps else _logits(h, weights, static.softcap)
            at_targets = sum(
                jnp.where(blocks.is_target(block, token[:, n]), dlogp[:, n, None], 0.0) for n in range(_SHARED)
            )
            dlogits = at_targets - dlogp.sum(-1)[:, None] * jnp.exp(logits - tile.read(state_lses)[:, None])
            if static.softcap is not None:
                dlogits *= 1.0 - (logits / static.softcap) ** 2
            dlogits = jnp.where(blocks.counted(block), dlogits, 0.0).astype(hidden.dtype)
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


class _Tile(NamedTuple):
    """The listed states of a tile: `size` of them from `start` on."""

    start: Int[Array, ""]
    size: int

    def read(self, x: Shaped[Array, "N *S"]) -> Shaped[Array, "C *S"]:
        """Returns the entries of the tile's states."""
        return jax.lax.dynamic_slice_in_dim(x, self.start, self.size)

    def write(self, x: Shaped[Array, "N *S"], new: Shaped[Array, "C *S"]) -> Shaped[Array, "N *S"]:
        """Copies `x` and replaces the entries of the tile's states."""
        return jax.lax.dynamic_update_slice_in_dim(x, new, self.start, 0)


class _StateList:
    """Lists the hidden states that predict the targets of all rows, each of them once, and leads back to the targets.

    Targets of one state and one token are the same. A state that predicts more than `_SHARED` different tokens is
    listed several times. The list has room for one state per target; unused entries and the states of padding are at
    its end.

    Attributes:
        size: length of the list.
        live: number of listed states that predict a real target, int32.
        real: True for targets that are not padding, [B, T].
    """

    def __init__(
        self, chunk: int, length: int, index: Int[Array, "B T"], token: Int[Array, "B T"], counts: Int[Array, " B"]
    ) -> None:
        rows, targets = index.shape
        self._part = max(1, chunk // _PARTS)  # states of a part of a tile
        self._parts = chunk // self._part  # parts of a tile
        self.size = _round_up(rows * targets, self._part)
        self.real = jnp.arange(targets) < counts[:, None]
        nowhere = rows * length
        source = jnp.where(self.real, jnp.arange(rows)[:, None] * length + index, nowhere).reshape(-1)
        # Targets of one state next to each other, those of one token within it too, padding last.
        source, token, order = jax.lax.sort((source, token.reshape(-1), jnp.arange(source.size)), num_keys=2)

        def starts(x: Int[Array, " N"]) -> Bool[Array, " N"]:
            return jnp.concatenate([jnp.ones(1, bool), x[1:] != x[:-1]])

        is_first = starts(source)
        is_new = is_first | starts(token)
        distinct = jnp.cumsum(is_new) - 1
        nth = (distinct - jax.lax.cummax(jnp.where(is_first, distinct, 0))) % _SHARED
        listed = is_new & (nth == 0)
        number = jnp.cumsum(listed, dtype=jnp.int32) - 1
        self.live = (listed & (source < nowhere)).sum(dtype=jnp.int32)
        # For each target, the number of its state in the list and its own among the tokens of that state.
        self._entry = jnp.zeros((2, rows * targets), jnp.int32).at[:, order].set(jnp.stack([number, nth]))
        # For each listed state, its index among the hidden states of all rows.
        self._source = jnp.zeros(self.size, jnp.int32).at[number].set(jnp.where(source < nowhere, source, 0))

    def take(self, hidden: Float[Array, "B L D"]) -> Float[Array, "N D"]:
        """Returns the listed states."""
        return hidden.reshape(-1, hidden.shape[-1])[self._source]

    def add_back(self, dstates: Float[Array, "N D"], like: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """Adds the gradients of listed states to those of the hidden states, which are shaped as `like`."""
        flat = jnp.zeros((math.prod(like.shape[:-1]), like.shape[-1]))
        return flat.at[self._source].add(dstates).reshape(like.shape).astype(like.dtype)

    def per_state(self, x: Shaped[Array, "B T"], empty: int | float) -> Shaped[Array, "N K"]:
        """Arranges entries of targets by state, K = `_SHARED` each; `empty` where a state has fewer targets."""
        return jnp.full((self.size, _SHARED), empty, x.dtype).at[*self._entry].set(x.reshape(-1))

    def added_per_state(self, x: Float[Array, "B T"]) -> Float[Array, "N K"]:
        """Arranges entries of targets as `per_state` does, and adds up those of the same state and token."""
        return jnp.zeros((self.size, _SHARED), x.dtype).at[*self._entry].add(x.reshape(-1))

    def to_targets(self, x: Float[Array, "N *S"]) -> Float[Array, "B T *S"]:
        """Returns for each target the entry of its state."""
        return x[self._entry[0]].reshape(*self.real.shape, *x.shape[1:])

    def keeps_logits(self, static: _Static, blocks: _Blocks) -> bool:
        """Returns True if the logits of all tiles are kept for the backward pass."""
        return 4 * self.size * blocks.count * blocks.size <= static.keep_bytes

    def over_tiles(self, one_tile: Callable[[_Tile, Any], Any], carry: Any) -> Any:
        """Runs `carry = one_tile(tile, carry)` over whole tiles of live states, and over parts of one for the rest."""
        live_parts = (self.live + self._part - 1) // self._part
        tiles = live_parts // self._parts
        large, small = self._part * self._parts, self._part
        if large <= self.size:
            carry = jax.lax.fori_loop(0, tiles, lambda i, x: one_tile(_Tile(i * large, large), x), carry)
        first = tiles * self._parts
        return jax.lax.fori_loop(first, live_parts, lambda i, x: one_tile(_Tile(i * small, small), x), carry)


class _Block(NamedTuple):
    """A block of this device's part of the vocabulary: it begins at `start`, and its own entries begin at `first`."""

    number: Int[Array, ""]
    start: Int[Array, ""]
    first: Int[Array, ""]


class _Blocks:
    """The vocabulary in blocks of one size, few and even.

    If the size does not divide the vocabulary, the last block also holds entries of the one before, which are not
    counted. The last block comes first in the loop, so that its neighbour's gradient overwrites the zeros that it
    leaves there.
    """

    def __init__(self, block: int, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        lanes = _CPU_LANES if on_cpu() else _LANES
        fewest = -(-vocabulary // block)
        even = (n for n in range(fewest, fewest * 3 // 2 + 1) if vocabulary % (n * lanes) == 0)
        self.count = next(even, fewest)
        self.size = min(_round_up(-(-vocabulary // self.count), lanes), block, vocabulary)

    def all(self) -> _Block:
        """Returns all blocks, stacked, in the order of the loop."""
        number = jnp.roll(jnp.arange(self.count), 1)
        return _Block(number, jnp.minimum(number * self.size, self.vocabulary - self.size), number * self.size)

    def slice(self, head: Float[Array, "V D"], block: _Block) -> Float[Array, "S D"]:
        """Returns the block's part of the head."""
        return slice_in_loop(head, block.start, self.size)

    def counted(self, block: _Block) -> Bool[Array, "1 S"] | bool:
        """Returns True for the block's own entries."""
        if self.vocabulary % self.size == 0:
            return True
        return (block.start + jnp.arange(self.size) >= block.first)[None, :]

    def is_target(self, block: _Block, token: Int[Array, " C"]) -> Bool[Array, "C S"]:
        """Returns True where an entry of the block is the target token."""
        return (token - block.start)[:, None] == jnp.arange(self.size)[None, :]


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


def _logits(h: Float[Array, "C D"], weights: Float[Array, "S D"], softcap: float | None) -> Float[Array, "C S"]:
    precision = matmul_precision(h.dtype)
    logits = jnp.einsum("nd,vd->nv", h, weights, precision=precision, preferred_element_type=jnp.float32)
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _weight_gradient(dlogits: Float[Array, "C S"], h: Float[Array, "C D"]) -> Float[Array, "S D"]:
    if h.dtype == jnp.float32 or not on_cpu():
        precision = matmul_precision(h.dtype)
        return jnp.einsum("nv,nd->vd", dlogits, h, precision=precision, preferred_element_type=jnp.float32)
    # XLA uses a CPU's matrix units for 16-bit numbers in this form only. The barrier keeps the transposition out of it:
    # XLA cannot run the two as one.
    product = jnp.einsum("xnd,xnv->dv", h[None], dlogits[None], preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(product).T


def _round_up(n: int, multiple: int = _LANES) -> int:
    return -(-n // multiple) * multiple


def _data_parallel() -> int:
    """Returns the number of devices that the rows are split over."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in RULES["batch"] or ())
