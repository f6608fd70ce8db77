"""The building blocks of the kernels: products on the tensor cores, rings of shared memory, walks over live blocks.

A kernel runs on `workers` warpgroups that compute and one more that only fetches (by Hopper's TMA). The fetching one
walks the list of live blocks ahead of the others and fills rings of shared memory, `stages` steps deep.

Mosaic GPU's interpreter runs copies, barriers, threads and loops, but (jax 0.10 to 0.12) no tensor core product with
an operand in registers and no accumulator that starts from a value. For these two there is plain code here, which runs
when `interpret` is set; the rest of a kernel is the same code on a GPU and in the interpreter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from jax_simpo.ops.attention.backends import ScoreRule
from jax_simpo.ops.attention.pallas.switches import Switches

LOG2E = math.log2(math.e)
SHARED_MEMORY = 226 * 1024  # bytes a block of threads may have on Hopper (227 KiB), less a reserve for the barriers
THREAD = "warpgroup"

Ref = Any  # a reference to memory inside a kernel; jax has no public type for it
Index = Any  # a traced int32 inside a kernel


class Tiles(NamedTuple):
    """The sizes of the pieces that a kernel works on, static."""

    workers: int  # warpgroups that compute
    rows: int  # rows of one warpgroup; on a GPU always 64, the rows of one tensor core instruction
    step: int  # rows of the other side (keys, for a tile of queries) in a stage of a ring: a block of the lists
    stages: tuple[int, int]  # of the two rings

    @property
    def tile(self) -> int:
        """Rows of a tile."""
        return self.workers * self.rows


class Ring(NamedTuple):
    """Shared memory through which the blocks of one matrix pass, with vectors along its rows."""

    matrix: tuple[Ref, ...]  # its parts, each [stages, step, Dh]
    vectors: tuple[Ref, ...]  # each [stages, n, step]: n vectors of one dtype
    ready: Ref  # a barrier a stage: the stage is filled
    free: Ref  # a barrier a stage: all workers have read it

    @property
    def stages(self) -> int:
        return int(self.matrix[0].shape[0])

    def parts(self, slot: Index) -> list[Ref]:
        """Returns the memory of the matrix in a stage."""
        return [part.at[slot] for part in self.matrix]

    def read(self, slot: Index) -> list[jax.Array]:
        """Returns the vectors of a stage."""
        return [vectors[slot, n] for vectors in self.vectors for n in range(vectors.shape[1])]

    def targets(self, slot: Index) -> list[Ref]:
        """Returns all memory of a stage, in the order in which it is filled."""
        return [*self.parts(slot), *(vectors.at[slot] for vectors in self.vectors)]

    def release(self, slot: Index, interpret: bool) -> None:
        """Tells the fetching warpgroup that this worker has read a stage."""
        if interpret:
            # On a GPU the tensor cores read the stage. In the interpreter lanes do, and its search for races requires
            # that they commit before the copy engine writes.
            plgpu.commit_smem()
        plgpu.barrier_arrive(self.free.at[slot])


def ring_scratch(tiles: Tiles, ring: int, parts: int, width: int, vectors: Sequence[tuple[int, Any]] = ()) -> Ring:
    """Returns the scratch memory of the first ring (0) or the second (1).

    `vectors` gives a number of vectors and their dtype for each array that travels with the matrix.
    """
    stages = tiles.stages[ring]
    return Ring(
        (plgpu.SMEM((stages, tiles.step, width), jnp.bfloat16),) * parts,
        tuple(plgpu.SMEM((stages, count, tiles.step), dtype) for count, dtype in vectors),
        plgpu.Barrier(num_barriers=stages, num_arrivals=parts + len(vectors)),
        plgpu.Barrier(num_barriers=stages, num_arrivals=tiles.workers),
    )


class Resident(NamedTuple):
    """Shared memory for matrices that a worker keeps throughout."""

    matrices: tuple[tuple[Ref, ...], ...]  # the parts of each matrix, [workers, rows, Dh]
    arrived: Ref  # a barrier a worker

    def receive(self, worker: Index, sources: Sequence[Ref]) -> list[list[Ref]]:
        """Copies the sources, part by part, and returns the matrices by their parts."""
        matrices = [[part.at[worker] for part in matrix] for matrix in self.matrices]
        targets = [part for matrix in matrices for part in matrix]
        for source, target in zip(sources, targets, strict=True):
            plgpu.copy_gmem_to_smem(source, target, self.arrived.at[worker])
        plgpu.barrier_wait(self.arrived.at[worker])
        return matrices

    def send(self, worker: Index, results: Sequence[jax.Array], targets: Sequence[Sequence[Ref]]) -> None:
        """Copies results to the targets of their parts, by way of the matrices' memory, which is overwritten."""
        copies = []
        for matrix, result, part_targets in zip(self.matrices, results, targets, strict=False):
            for memory, part, target in zip(matrix, split(result, len(matrix)), part_targets, strict=True):
                memory[worker] = part
                copies.append((memory.at[worker], target))
        plgpu.commit_smem()
        for memory, target in copies:
            plgpu.copy_smem_to_gmem(memory, target)
        plgpu.wait_smem_to_gmem(0)


def resident_scratch(tiles: Tiles, parts: int, width: int, matrices: int) -> Resident:
    """Returns the scratch memory of `matrices` matrices."""
    matrix = (plgpu.SMEM((tiles.workers, tiles.rows, width), jnp.bfloat16),) * parts
    return Resident((matrix,) * matrices, plgpu.Barrier(num_barriers=tiles.workers, num_arrivals=matrices * parts))


class Walk(NamedTuple):
    """The steps of one tile over its live blocks.

    With `heads` > 1 every step is repeated for each query head of the group.
    """

    blocks: Ref  # lists of live blocks, [B, Q, N]
    row: Index
    turn: Index  # the tile's index in the lists
    place: Index  # the tile's place in its row
    full: Index  # steps over full blocks, which come first and need no mask
    live: Index  # all steps
    heads: int
    tiles: Tiles

    @classmethod
    def of(cls, lists: Sequence[Ref], row: Index, turn: Index, tiles: Tiles, heads: int = 1) -> Walk:
        """Reads a tile from the lists, the arrays of a `BlockLists`."""
        tile, blocks = lists
        place, full, live = (tile[row, turn, n] for n in range(3))
        return cls(blocks, row, turn, place, full * heads, live * heads, heads, tiles)

    def start(self, t: Index) -> tuple[Index, Index]:
        """Returns the index in the row at which step `t` starts, and the head of the group that it is for."""
        heads = jnp.int32(self.heads)
        index, head = (t, 0) if self.heads == 1 else (lax.div(t, heads), lax.rem(t, heads))
        return self.blocks[self.row, self.turn, index] * self.tiles.step, head

    def rows_of(self, worker: Index) -> Any:
        """Returns the slice of the row that a worker computes."""
        return pl.ds(self.place * self.tiles.tile + worker * self.tiles.rows, self.tiles.rows)

    def fetch(self, rings: Sequence[Ring], sources: Callable[[Index, Index], Sequence[Sequence[Ref]]]) -> None:
        """Fills the rings step by step; `sources(start, head)` returns the memory to copy to each ring's targets."""

        @pl.loop(0, self.live)
        def _(t: Index) -> None:
            start, head = self.start(t)
            for ring, pieces in zip(rings, sources(start, head), strict=True):
                slot = self.slot(t, ring)
                pl.when(t >= ring.stages)(partial(plgpu.barrier_wait, ring.free.at[slot]))
                for piece, target in zip(pieces, ring.targets(slot), strict=True):
                    plgpu.copy_gmem_to_smem(piece, target, ring.ready.at[slot])

        # The warpgroup may not end before the last stages are read: their barriers would vanish under the readers.
        for ring in rings:

            @pl.loop(jnp.maximum(self.live - ring.stages, 0), self.live)
            def _(t: Index, ring: Ring = ring) -> None:
                plgpu.barrier_wait(ring.free.at[self.slot(t, ring)])

    def each(self, body: Callable[..., Any], state: Any, begin: int = 0) -> Any:
        """Runs `state = body(t, state, mixed)` over the steps from `begin` on; `mixed` is static, False when full."""

        def steps(first: Index, last: Index, state: Any, mixed: bool) -> Any:
            return lax.fori_loop(first, last, lambda t, s: body(t, s, mixed), state)

        state = steps(jnp.int32(begin), self.full, state, False)
        return steps(jnp.maximum(self.full, begin), self.live, state, True)

    def if_any(self, body: Callable[[Any], Any], state: Any) -> Any:
        """Returns `body(state)` if there is any step, else `state`."""
        return lax.fori_loop(0, jnp.minimum(self.live, 1), lambda _, s: body(s), state)

    def slot(self, t: Index, ring: Ring) -> Index:
        """Returns the stage of the ring that step `t` uses."""
        if ring.stages == 1:
            # Always 0. If the compiler could tell, it would compute all addresses before the loop and keep them in
            # registers, of which a kernel with one stage has none to spare (it spilled 1 KB a lane).
            return t & (self.full > self.live).astype(jnp.int32)
        return lax.rem(t, jnp.int32(ring.stages))


class Turns(NamedTuple):
    """Lets two workers take turns at the tensor cores, worker 0 first; without barriers it does nothing."""

    barriers: Ref | None  # a barrier a worker: it is this worker's turn
    worker: Index

    def start(self) -> None:
        """Gives the first turn to worker 0; call it once before the first turn."""
        if self.barriers is not None:
            pl.when(self.worker == 1)(self.end)

    def finish(self) -> None:
        """Takes back the turn that nobody uses: a barrier may not be left with an arrival."""
        if self.barriers is not None:
            pl.when(self.worker == 0)(self.begin)

    def begin(self) -> None:
        """Waits for this worker's turn."""
        if self.barriers is not None:
            plgpu.barrier_wait(self.barriers.at[self.worker])

    def end(self) -> None:
        """Gives the turn to the other worker."""
        if self.barriers is not None:
            plgpu.barrier_arrive(self.barriers.at[1 - self.worker])


def split(x: jax.Array, parts: int) -> list[jax.Array]:
    """Takes a float32 array apart into bfloat16 ones that sum up to it, each with 8 bits of its mantissa."""
    pieces = [x.astype(jnp.bfloat16)]
    for _ in range(parts - 1):
        x = x - pieces[-1].astype(jnp.float32)
        pieces.append(x.astype(jnp.bfloat16))
    return pieces


def _terms(a: Sequence[Any], b: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Pairs the parts whose products matter; the other products are below the precision of the last part."""
    return [(a[i], b[j]) for i in range(len(a)) for j in range(len(b)) if i + j < len(b)]


def products(
    pairs: Sequence[tuple[Sequence[Ref], Sequence[Ref]]], interpret: bool, issued: Callable[[], None] = lambda: None
) -> list[jax.Array]:
    """Returns `a @ b.T` in float32 for each pair of matrices in shared memory, given by their parts.

    `issued` is called when the tensor cores have got all their work, before it is done.
    """
    if interpret:
        issued()
        return [_dot(_terms(a, [y[...].T for y in b])) for a, b in pairs]

    def body(*totals: Ref) -> list[jax.Array]:
        for total, (a, b) in zip(totals, pairs, strict=True):
            for x, y in _terms(a, b):
                plgpu.wgmma(total, x, y.transpose((1, 0)))
        issued()
        return [total[...] for total in totals]

    shapes = [(a[0].shape[0], b[0].shape[0]) for a, b in pairs]
    return pl.run_scoped(body, *[plgpu.WGMMAAccumulatorRef(shape, jnp.float32) for shape in shapes])


def product_beside(
    pair: tuple[Sequence[Ref], Sequence[Ref]],
    total: jax.Array,
    operands: tuple[Sequence[jax.Array], Sequence[Ref]],
    then: Callable[[jax.Array], Any],
    interpret: bool,
    issued: Callable[[], None],
) -> tuple[Any, jax.Array]:
    """Returns `then(a @ b.T)` of the pair, as `products` does, and `total + c @ d` of the operands, given by parts.

    `then` runs as soon as the first product is there, while the tensor cores work on the second. It should end with a
    branch: within one basic block the assembler moves the wait for the second product to the front.
    """
    a, b = pair
    terms = _terms(*operands)
    if interpret:
        issued()
        return then(_dot(_terms(a, [y[...].T for y in b]))), total + _dot(terms)

    def body(product: Ref, accumulator: Ref) -> tuple[Any, jax.Array]:
        accumulator[...] = total
        for x, y in _terms(a, b):
            plgpu.wgmma(product, x, y.transpose((1, 0)))
        for x, y in terms:
            plgpu.wgmma(accumulator, x, y)
        issued()
        result = then(plgpu.wgmma_accumulator_load(product, wait_n=len(terms)))
        return result, accumulator[...]

    shapes = (a[0].shape[0], b[0].shape[0]), (total.shape[0], total.shape[1])
    return pl.run_scoped(body, *[plgpu.WGMMAAccumulatorRef(shape, jnp.float32) for shape in shapes])


def accumulate(
    totals: Sequence[jax.Array], pairs: Sequence[tuple[Sequence[jax.Array], Sequence[Ref]]], interpret: bool
) -> list[jax.Array]:
    """Returns `total + a @ b` for each pair of a matrix in registers and one in shared memory, given by their parts."""
    if interpret:
        return [total + _dot(_terms(a, b)) for total, (a, b) in zip(totals, pairs, strict=True)]

    def body(accumulators: Sequence[Ref]) -> None:
        for accumulator, (a, b) in zip(accumulators, pairs, strict=True):
            for x, y in _terms(a, b):
                plgpu.wgmma(accumulator, x, y)

    return pl.run_state(body)([plgpu.WGMMAAccumulatorRef.init(total) for total in totals])


def _dot(terms: Sequence[tuple[Any, Any]]) -> jax.Array:
    """Sums the products in plain jax, for the interpreter."""
    dots = [jnp.dot(a[...], b[...], preferred_element_type=jnp.float32) for a, b in terms]
    return jnp.stack(dots).sum(axis=0)


def along(x: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """Repeats a vector that lies along `axis` over the other axis."""
    return lax.broadcast_in_dim(x, shape, [axis])


def load(vector: Ref, interpret: bool) -> jax.Array:
    """Loads a vector from global memory into registers."""
    if interpret:
        return vector[...]  # the interpreter knows no other load
    index = ((),) if jax.__version__.startswith("0.10.") else ()  # later releases take none
    # The loads that Mosaic GPU calls optimised, its default, are for shared memory only.
    return plgpu.load(vector, *index, optimized=False)


def indices(start: Index, count: int) -> jax.Array:
    """Returns the numbers from `start` on."""
    return start + lax.iota(jnp.int32, count)


def exponent_factor(rule: ScoreRule) -> float:
    """Returns the factor that turns the scores of `capped` into exponents of 2."""
    return LOG2E * (rule.scale if rule.softcap is None else rule.softcap)


def capped(products: jax.Array, rule: ScoreRule) -> tuple[jax.Array, jax.Array | None]:
    """Returns scores without their constant factor, and the derivative of the cap (None where there is no cap).

    The factor is left to the subtraction that follows: both together are one instruction.
    """
    if rule.softcap is None:
        return products, None
    # tanh by exp2: the GPU's own approximation is off by 5e-4, which a cap of 50 would turn into 0.02.
    tanh = 1.0 - 2.0 / (1.0 + jnp.exp2(products * (2.0 * LOG2E * rule.scale / rule.softcap)))
    return tanh, 1.0 - tanh * tanh


def mask_vectors(
    key_end: Int[Array, "B L"], positions: Int[Array, "B L"], window: int | None
) -> tuple[Int[Array, "B n L"], Int[Array, "B n L"]]:
    """Returns what `Hide` needs to know of the queries and of the keys, int32.

    Of a query: its index, and with a window its position. Of a key: the number of queries from its own on that see it,
    and with a window the first position that does not.
    """
    index = jnp.broadcast_to(jnp.arange(key_end.shape[1], dtype=jnp.int32), key_end.shape)
    queries, keys = [index], [jnp.maximum(key_end - index, 0)]
    if window is not None:
        queries.append(positions)
        keys.append(positions + window)
    return jnp.stack(queries, axis=1), jnp.stack(keys, axis=1)


class Hide(NamedTuple):
    """Sets entries of an array of scores to -inf where the query does not see the key.

    It is the rule of `mask.visible_at` with less arithmetic: `key <= query < key_end` is one comparison of unsigned
    numbers, `query - key < key_end - key`. Where the query comes first, the difference wraps around to a large number.
    """

    queries: Sequence[jax.Array]  # vectors of `mask_vectors`
    key: jax.Array  # indices of the keys
    keys: Sequence[jax.Array]  # vectors of `mask_vectors`
    query_axis: int  # the axis of the scores that the queries lie on

    def __call__(self, scores: jax.Array) -> jax.Array:
        def along_queries(x: jax.Array) -> jax.Array:
            return along(x, scores.shape, self.query_axis)

        def along_keys(x: jax.Array) -> jax.Array:
            return along(x, scores.shape, 1 - self.query_axis)

        distance = along_queries(self.queries[0]) - along_keys(self.key)
        visible = distance.astype(jnp.uint32) < along_keys(self.keys[0].astype(jnp.uint32))
        if len(self.keys) > 1:
            visible &= along_queries(self.queries[1]) < along_keys(self.keys[1])
        return jnp.where(visible, scores, -jnp.inf)


def interpreter() -> Any:
    """Returns the parameters that make Mosaic GPU interpret a kernel on the CPU."""
    if hasattr(plgpu, "InterpretGPUParams"):
        return plgpu.InterpretGPUParams()
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # jax 0.10 does not export it

    return InterpretGPUParams()


def launch(
    compute: Callable[..., None],
    fetch: Callable[..., None],
    *,
    name: str,
    outputs: Any,
    places: tuple[int, int, int],
    scratch: Sequence[Any],
    tiles: Tiles,
    switches: Switches,
    interpret: bool,
) -> Callable[..., Any]:
    """Makes a kernel whose workers run `compute(worker, *refs)` while one more warpgroup runs `fetch(*refs)`.

    It runs once for each row, head and tile; `places` are their numbers, and the names of the grid's axes are "row",
    "head" and "tile". Blocks of threads start in the order of the grid, its last axis first.
    """
    rows, heads, tile_count = places
    if switches.heavy_first:  # the heavy tiles of all heads, so that the light tiles of all heads come last
        grid = {"tile": tile_count, "row": rows, "head": heads}
    else:
        grid = {"head": heads, "tile": tile_count, "row": rows}

    def kernel(*refs: Ref) -> None:
        warpgroup = lax.axis_index(THREAD)

        # Three warpgroups share 512 registers a lane; the one that only fetches needs few and gives up the rest.
        @pl.when(warpgroup < tiles.workers)
        def _() -> None:
            plgpu.set_max_registers(240, action="increase")
            compute(warpgroup, *refs)

        @pl.when(warpgroup == tiles.workers)
        def _() -> None:
            plgpu.set_max_registers(24, action="decrease")
            fetch(*refs)

    return plgpu.kernel(
        kernel,
        out_type=outputs,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=tiles.workers + 1,
        thread_name=THREAD,
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpreter() if interpret else None,
    )
