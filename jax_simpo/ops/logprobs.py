"""Log-probabilities of the targets from their hidden states, one tile of logits at a time.

Only the hidden states that predict a target reach the head, and each of them once: where responses share a prefix, one
state predicts a token of every response. The logits are made in tiles of some states by a block of the vocabulary, as
attention makes its scores: the forward keeps the running maximum and sum of each state (online softmax) and in the end
one float, its log-sum-exp; the backward makes each tile again. The vocabulary is the outer loop and the states the
inner one, so a block of the head is read once, its gradient is added up while it is in fast memory and written once,
and a tile on a CPU never leaves the cache. The inner loop stops where the states do: what is padding is never reached.

With memory to spare (`keep_bytes`) the forward keeps its logits and the backward does not make them again: one matrix
product of four less.

Under a mesh the head is gathered over `fsdp` once before the loops and its gradient is reduced and scattered once after
them: the loops run inside `shard_map`, where no partitioner can put a collective of the head's size into them. Over
`tensor`, where each device has its own part of the vocabulary, only the finished maxima and sums are exchanged.
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
from jax_simpo.ops.numerics import matmul_precision
from jax_simpo.sharding import RULES, all_gather, psum, psum_scatter, spec

# States and bytes of a tile: it should stay in a CPU's cache; elsewhere it should be large, for each is a kernel call.
_CPU_TILE = (512, 11 << 20)
_TILE = (2048, 256 << 20)
_LANES, _CPU_LANES = 128, 16  # a block of the vocabulary is a multiple of it, if that is no more than was asked for
_SHARED = 2  # targets of one listed state: a pair's chosen and rejected response
_PARTS = 4  # of a tile's states, the unit in which the last ones are counted
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
        chunk: most states of a tile; None takes what is fastest on the device.
        block: most vocabulary entries of a tile; None takes as many as make a tile of the device's favourite size.
        keep_bytes: memory a device may spend on keeping all logits for the backward pass. They are kept if they fit.
        frozen: the head has no gradient, and none is computed: one matrix product of four less, and no memory for it.
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
    listed = _States(static.chunk, hidden.shape[1], index, counts)
    states = listed.of(hidden)
    blocks = _Blocks(static.block, len(whole_head))
    keeps = listed.keeps(static, blocks)

    def one_block(so_far: tuple[Array, ...], at: _Block) -> tuple[tuple[Array, ...], None]:
        weights = blocks.slice(whole_head, at)

        def one_tile(some: _Some, so_far: tuple[Array, ...]) -> tuple[Array, ...]:
            top, total, kept = so_far
            logits = _logits(some.of(states), weights, static.softcap)
            if keeps:
                kept = jax.lax.dynamic_update_slice(kept, logits[None], (at.number, some.start, 0))
            counted = blocks.counted(at)
            old_top = some.of(top)
            new_top = jnp.maximum(old_top, jnp.where(counted, logits, _MASKED).max(-1))
            sums = jnp.where(counted, jnp.exp(logits - new_top[:, None]), 0.0).sum(-1)
            return some.put(top, new_top), some.put(total, some.of(total) * jnp.exp(old_top - new_top) + sums), kept

        return listed.over_tiles(one_tile, so_far), None

    zeros = jnp.zeros(listed.size)
    kept = jax.lax.empty((blocks.count, listed.size, blocks.size) if keeps else (1, 1, 1), jnp.float32)
    begin: tuple[Array, ...] = (zeros + _MASKED, zeros, kept)
    (top, total, kept), _ = jax.lax.scan(one_block, begin, blocks.all())
    target = _target_logits(listed.back(states), whole_head, _local_token(token, len(whole_head), meshed), static)
    if meshed and jax.lax.axis_size(RULES["vocab"]) > 1:  # a reduction over one device is not free on every backend
        own, top = top, jax.lax.pmax(top, RULES["vocab"])
        total, target = jax.lax.psum((total * jnp.exp(own - top), target), RULES["vocab"])
    lse = listed.back(top + jnp.log(jnp.where(total > 0, total, 1.0)))
    # Summed in another order than the logits of the log-sum-exp, a target's may be larger than that by a rounding.
    return jnp.where(listed.real, jnp.minimum(target - lse, 0.0), 0.0), lse, kept


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
    listed = _States(static.chunk, hidden.shape[1], index, counts)
    states, tokens = listed.of(hidden), listed.per_state(_local_token(token, len(whole_head), meshed), -1)
    gs = listed.per_state(jnp.where(listed.real, dlogps, 0.0), 0.0)
    # All targets of a state have its log-sum-exp. Padding's exponentials are 0: infinite ones times 0 would be NaN.
    lses = listed.per_state(jnp.where(listed.real, lse, jnp.inf), jnp.inf)[:, 0]
    blocks = _Blocks(static.block, len(whole_head))
    keeps = listed.keeps(static, blocks)
    dot = partial(jnp.einsum, precision=matmul_precision(hidden.dtype), preferred_element_type=jnp.float32)

    # (The gradient of a frozen head is None throughout.)
    def one_block(so_far: tuple[Array | None, Array], at: _Block) -> tuple[tuple[Array | None, Array], None]:
        dhead, dstates = so_far
        weights = blocks.slice(whole_head, at)

        def one_tile(some: _Some, so_far: tuple[Array | None, Array]) -> tuple[Array | None, Array]:
            dweights, dstates = so_far
            h, token, g = (some.of(x) for x in (states, tokens, gs))
            logits = some.of(kept[at.number]) if keeps else _logits(h, weights, static.softcap)
            chosen = sum(jnp.where(blocks.is_target(at, token[:, n]), g[:, n, None], 0.0) for n in range(_SHARED))
            dlogits = chosen - g.sum(-1)[:, None] * jnp.exp(logits - some.of(lses)[:, None])
            if static.softcap is not None:
                dlogits *= 1.0 - (logits / static.softcap) ** 2
            dlogits = jnp.where(blocks.counted(at), dlogits, 0.0).astype(hidden.dtype)
            if dweights is not None:
                dweights += _weight_gradient(dlogits, h)
            return dweights, some.put(dstates, some.of(dstates) + dot("nv,vd->nd", dlogits, weights))

        dweights = None if dhead is None else jnp.zeros(weights.shape)
        dweights, dstates = listed.over_tiles(one_tile, (dweights, dstates))
        if dhead is not None:
            dhead = jax.lax.dynamic_update_slice_in_dim(dhead, dweights, at.start, 0)
        return (dhead, dstates), None

    # Every block of the head's gradient is written.
    dhead = None if static.frozen else jax.lax.empty(whole_head.shape, jnp.float32)
    (dhead, dstates), _ = jax.lax.scan(one_block, (dhead, jnp.zeros(states.shape)), blocks.all())
    if meshed:
        dstates = psum(dstates, str(RULES["vocab"]))
    dhidden = listed.add(dstates, hidden)
    if dhead is None:
        return (dhidden,)
    if meshed:
        dhead = psum(psum_scatter(dhead, str(RULES["embed"]), 1), "data")
    return dhidden, dhead.astype(head.dtype)


class _Some(NamedTuple):
    """The states of a tile: `size` of them from `start` on."""

    start: Int[Array, ""]
    size: int

    def of(self, x: Shaped[Array, "N *S"]) -> Shaped[Array, "C *S"]:
        """Theirs."""
        return jax.lax.dynamic_slice_in_dim(x, self.start, self.size)

    def put(self, x: Shaped[Array, "N *S"], new: Shaped[Array, "C *S"]) -> Shaped[Array, "N *S"]:
        """`x` with theirs replaced."""
        return jax.lax.dynamic_update_slice_in_dim(x, new, self.start, 0)


class _States:
    """The hidden states that predict the targets of all rows: a list with each of them once, and the way back.

    A state that predicts more than `_SHARED` targets is listed as often as it takes. The list has room for a state per
    target; what stays empty is at its end, as are the states of padding.

    Attributes:
        size: of the list.
        real: which targets are not padding, bool [B, T].
    """

    def __init__(self, chunk: int, length: int, index: Int[Array, "B T"], counts: Int[Array, " B"]) -> None:
        rows, targets = index.shape
        self.part = max(1, chunk // _PARTS)
        self.parts = chunk // self.part  # of a whole tile
        self.size = _round_up(rows * targets, self.part)
        self.real = jnp.arange(targets) < counts[:, None]
        nowhere = rows * length
        place = jnp.where(self.real, jnp.arange(rows)[:, None] * length + index, nowhere).reshape(-1)
        order = jnp.argsort(place, stable=True)  # targets of one state next to each other, padding last
        place = place[order]
        at = jnp.arange(len(place))
        first = jnp.concatenate([jnp.ones(1, bool), place[1:] != place[:-1]])
        nth = (at - jax.lax.cummax(jnp.where(first, at, 0))) % _SHARED
        number = jnp.cumsum(nth == 0, dtype=jnp.int32) - 1
        self.live = ((nth == 0) & (place < nowhere)).sum(dtype=jnp.int32)
        self.where = jnp.zeros((2, rows * targets), jnp.int32).at[:, order].set(jnp.stack([number, nth]))
        self.place = jnp.zeros(self.size, jnp.int32).at[number].set(jnp.where(place < nowhere, place, 0))

    def of(self, hidden: Float[Array, "B L D"]) -> Float[Array, "N D"]:
        """The states themselves."""
        return hidden.reshape(-1, hidden.shape[-1])[self.place]

    def add(self, dstates: Float[Array, "N D"], like: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """The gradients of `of` added up where they came from."""
        flat = jnp.zeros((math.prod(like.shape[:-1]), like.shape[-1]))
        return flat.at[self.place].add(dstates).reshape(like.shape).astype(like.dtype)

    def per_state(self, x: Shaped[Array, "B T"], empty: int | float) -> Shaped[Array, "N K"]:
        """What belongs to each state's targets; `empty` where it has fewer than K."""
        return jnp.full((self.size, _SHARED), empty, x.dtype).at[*self.where].set(x.reshape(-1))

    def back(self, x: Float[Array, "N *S"]) -> Float[Array, "B T *S"]:
        """What belongs to each target's state."""
        return x[self.where[0]].reshape(*self.real.shape, *x.shape[1:])

    def keeps(self, static: _Static, blocks: _Blocks) -> bool:
        """Whether the logits of all tiles are kept for the backward pass."""
        return 4 * self.size * blocks.count * blocks.size <= static.keep_bytes

    def over_tiles(self, one_tile: Callable[[_Some, Any], Any], so_far: Any) -> Any:
        """Runs whole tiles as long as there are states, and for the last ones parts of a tile."""
        parts = (self.live + self.part - 1) // self.part
        whole = parts // self.parts
        big, small = self.part * self.parts, self.part
        if big <= self.size:
            so_far = jax.lax.fori_loop(0, whole, lambda i, x: one_tile(_Some(i * big, big), x), so_far)
        begin = whole * self.parts
        return jax.lax.fori_loop(begin, parts, lambda i, x: one_tile(_Some(i * small, small), x), so_far)


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
        lanes = _CPU_LANES if on_cpu() else _LANES
        fewest = -(-vocabulary // block)
        even = (n for n in range(fewest, fewest * 3 // 2 + 1) if vocabulary % (n * lanes) == 0)
        self.count = next(even, fewest)
        self.size = min(_round_up(-(-vocabulary // self.count), lanes), block, vocabulary)

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


def _target_logits(
    states: Float[Array, "B T D"], head: Float[Array, "V D"], token: Int[Array, "B T"], static: _Static
) -> Float[Array, "B T"]:
    """The logit of each target, 0 where it is another device's."""
    mine = (token >= 0) & (token < len(head))
    weights = head[jnp.where(mine, token, 0)]
    logits = (states.astype(jnp.float32) * weights.astype(jnp.float32)).sum(-1)
    logits = logits if static.softcap is None else static.softcap * jnp.tanh(logits / static.softcap)
    return jnp.where(mine, logits, 0.0)


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
