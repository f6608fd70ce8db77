"""The building blocks of the kernels: products on the tensor cores, rings of shared memory, walks over live blocks.

A kernel runs on `workers` warpgroups that compute and one more that only fetches (by Hopper's TMA). The fetching one
walks the list of live blocks ahead of the others and fills rings of shared memory, `stages` steps deep.

Mosaic GPU's interpreter runs copies, barriers, threads and loops, but (jax 0.10 to 0.12) no tensor core product with
an operand in registers and no accumulator that starts from a value. For these two there is plain code here, which runs
when `interpret` is set; the rest of a kernel is the same code on a GPU and in the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_simpo.ops.attention.backends import ScoreRule
from jax_simpo.ops.attention.mask import visible_at

SHARED_MEMORY = 223 * 1024  # bytes a block of threads may have on Hopper (227 KiB), less a reserve for the barriers
THREAD = "warpgroup"

Ref = Any  # a reference to memory inside a kernel; jax has no public type for it
Index = Any  # a traced int32 inside a kernel


class Tiles(NamedTuple):
    """The sizes of the pieces that a kernel works on, static."""

    block: int  # queries and keys in a block of the lists, and rows of a tile: `workers * rows`
    workers: int  # warpgroups that compute
    rows: int  # rows of one warpgroup; on a GPU always 64, the rows of one tensor core instruction
    step: int  # rows of the other side (keys, for a tile of queries) in a stage of a ring; divides `block`
    stages: int  # of a ring


class Ring(NamedTuple):
    """Shared memory through which the blocks of one matrix pass, with vectors along its rows."""

    matrix: tuple[Ref, ...]  # its parts, each [stages, step, Dh]
    vectors: tuple[Ref, ...]  # each [stages, step]
    ready: Ref  # a barrier a stage: the stage is filled
    free: Ref  # a barrier a stage: all workers have read it

    def parts(self, slot: Index) -> list[Ref]:
        """Returns the memory of the matrix in a stage."""
        return [part.at[slot] for part in self.matrix]

    def targets(self, slot: Index) -> list[Ref]:
        """Returns all memory of a stage, in the order in which it is filled."""
        return [*self.parts(slot), *(vector.at[slot] for vector in self.vectors)]

    def release(self, slot: Index, interpret: bool) -> None:
        """Tells the fetching warpgroup that this worker has read a stage."""
        if interpret:
            # On a GPU the tensor cores read the stage. In the interpreter lanes do, and its search for races requires
            # that they commit before the copy engine writes.
            plgpu.commit_smem()
        plgpu.barrier_arrive(self.free.at[slot])


def ring_scratch(tiles: Tiles, parts: int, width: int, vectors: Sequence[Any] = ()) -> Ring:
    """Returns the scratch memory of a ring whose vectors have these dtypes."""
    stages = tiles.stages
    return Ring(
        (plgpu.SMEM((stages, tiles.step, width), jnp.bfloat16),) * parts,
        tuple(plgpu.SMEM((stages, tiles.step), dtype) for dtype in vectors),
        plgpu.Barrier(num_barriers=stages, num_arrivals=parts + len(vectors)),
        plgpu.Barrier(num_barriers=stages, num_arrivals=tiles.workers),
    )


class Resident(NamedTuple):
    """Shared memory for matrices that a worker keeps throughout, and vectors along their rows."""

    matrices: tuple[tuple[Ref, ...], ...]  # the parts of each matrix, [workers, rows, Dh]
    vectors: tuple[Ref, ...]  # each [workers, rows]
    arrived: Ref  # a barrier a worker

    def receive(self, worker: Index, sources: Sequence[Ref]) -> tuple[list[list[Ref]], list[jax.Array]]:
        """Copies the sources, in the order of the fields, and returns the matrices by their parts, and the vectors."""
        matrices = [[part.at[worker] for part in matrix] for matrix in self.matrices]
        targets = [*(part for matrix in matrices for part in matrix), *(vector.at[worker] for vector in self.vectors)]
        for source, target in zip(sources, targets, strict=True):
            plgpu.copy_gmem_to_smem(source, target, self.arrived.at[worker])
        plgpu.barrier_wait(self.arrived.at[worker])
        return matrices, [vector[worker] for vector in self.vectors]

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


def resident_scratch(tiles: Tiles, parts: int, width: int, matrices: int, vectors: Sequence[Any] = ()) -> Resident:
    """Returns the scratch memory of `matrices` matrices, and of vectors with these dtypes."""
    matrix = (plgpu.SMEM((tiles.workers, tiles.rows, width), jnp.bfloat16),) * parts
    return Resident(
        (matrix,) * matrices,
        tuple(plgpu.SMEM((tiles.workers, tiles.rows), dtype) for dtype in vectors),
        plgpu.Barrier(num_barriers=tiles.workers, num_arrivals=matrices * parts + len(vectors)),
    )


class Walk(NamedTuple):
    """The steps of one tile over its live blocks.

    With `heads` > 1 every step is repeated for each query head of the group.
    """

    blocks: Ref  # lists of live blocks, [B, Q, Q]
    row: Index
    own_block: Index  # the block of the tile itself
    full: Index  # steps over full blocks, which come first and need no mask
    live: Index  # all steps
    heads: int
    tiles: Tiles

    @classmethod
    def of(cls, blocks: Ref, counts: Ref, row: Index, own_block: Index, tiles: Tiles, heads: int = 1) -> Walk:
        """Reads the numbers of steps from the counts of full and of live blocks, [B, Q, 2]."""
        per_block = heads * (tiles.block // tiles.step)
        full, live = (counts[row, own_block, n] * per_block for n in range(2))
        return cls(blocks, row, own_block, full, live, heads, tiles)

    def place(self, t: Index) -> tuple[Index, Index]:
        """Returns the index in the row at which step `t` starts, and the head of the group that it is for."""
        block, step = self.tiles.block, self.tiles.step
        t, head = _divide(t, self.heads)
        index, part = _divide(t, block // step)
        return self.blocks[self.row, self.own_block, index] * block + part * step, head

    def fetch(self, rings: Sequence[Ring], sources: Callable[[Index, Index], Sequence[Sequence[Ref]]]) -> None:
        """Fills the rings step by step; `sources(start, head)` returns the memory to copy to each ring's targets."""

        @pl.loop(0, self.live)
        def _(t: Index) -> None:
            start, head = self.place(t)
            slot = self.slot(t)
            for ring, pieces in zip(rings, sources(start, head), strict=True):
                pl.when(t >= self.tiles.stages)(partial(plgpu.barrier_wait, ring.free.at[slot]))
                for piece, target in zip(pieces, ring.targets(slot), strict=True):
                    plgpu.copy_gmem_to_smem(piece, target, ring.ready.at[slot])

        # The warpgroup may not end before the last stages are read: their barriers would vanish under the readers.
        @pl.loop(jnp.maximum(self.live - self.tiles.stages, 0), self.live)
        def _(t: Index) -> None:
            for ring in rings:
                plgpu.barrier_wait(ring.free.at[self.slot(t)])

    def each(self, body: Callable[..., Any], state: Any) -> Any:
        """Runs `state = body(t, slot, state, mixed)` over all steps; `mixed` is static, False for full blocks."""

        def steps(first: Index, last: Index, state: Any, mixed: bool) -> Any:
            return lax.fori_loop(first, last, lambda t, s: body(t, self.slot(t), s, mixed), state)

        return steps(self.full, self.live, steps(jnp.int32(0), self.full, state, False), True)

    def slot(self, t: Index) -> Index:
        """Returns the stage of the rings that step `t` uses."""
        if self.tiles.stages == 1:
            # Always 0. If the compiler could tell, it would compute all addresses before the loop and keep them in
            # registers, of which a kernel with one stage has none to spare (it spilled 1 KB a lane).
            return t & (self.full > self.live).astype(jnp.int32)
        return lax.rem(t, jnp.int32(self.tiles.stages))


def _divide(t: Index, by: int) -> tuple[Index, Index]:
    return (t, 0) if by == 1 else (lax.div(t, jnp.int32(by)), lax.rem(t, jnp.int32(by)))


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


def products(pairs: Sequence[tuple[Sequence[Ref], Sequence[Ref]]], interpret: bool) -> list[jax.Array]:
    """Returns `a @ b.T` in float32 for each pair of matrices in shared memory, given by their parts."""
    if interpret:
        return [_dot(_terms(a, [y[...].T for y in b])) for a, b in pairs]

    def body(*totals: Ref) -> list[jax.Array]:
        for total, (a, b) in zip(totals, pairs, strict=True):
            for x, y in _terms(a, b):
                plgpu.wgmma(total, x, y.transpose((1, 0)))
        return [total[...] for total in totals]

    shapes = [(a[0].shape[0], b[0].shape[0]) for a, b in pairs]
    return pl.run_scoped(body, *[plgpu.WGMMAAccumulatorRef(shape, jnp.float32) for shape in shapes])


def accumulate(
    totals: Sequence[jax.Array], pairs: Sequence[tuple[jax.Array, Sequence[Ref]]], interpret: bool
) -> list[jax.Array]:
    """Returns `total + a @ b` for each pair of a float32 matrix in registers and one in shared memory, by its parts."""
    operands = [(split(a, len(b)), b) for a, b in pairs]
    if interpret:
        return [total + _dot(_terms(a, b)) for total, (a, b) in zip(totals, operands, strict=True)]

    def body(accumulators: Sequence[Ref]) -> None:
        for accumulator, (a, b) in zip(accumulators, operands, strict=True):
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


class Side(NamedTuple):
    """The queries or the keys of a step: index of the first, axis of the scores they lie on, and their vectors."""

    start: Index
    axis: int
    positions: Sequence[jax.Array]  # one vector, or none where there is no window
    key_end: jax.Array | None = None  # keys only


def masked(scores: jax.Array, queries: Side, keys: Side, rule: ScoreRule) -> jax.Array:
    """Sets scores to -inf where the query does not see the key."""
    shape = scores.shape
    query = queries.start + lax.broadcasted_iota(jnp.int32, shape, queries.axis)
    key = keys.start + lax.broadcasted_iota(jnp.int32, shape, keys.axis)
    assert keys.key_end is not None
    key_end = along(keys.key_end, shape, keys.axis)
    if rule.window is None:
        visible = visible_at(query, key, key_end)
    else:
        query_position, key_position = (along(side.positions[0], shape, side.axis) for side in (queries, keys))
        visible = visible_at(query, key, key_end, query_position, key_position, rule.window)
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
    grid: dict[str, int],
    scratch: Sequence[Any],
    tiles: Tiles,
    interpret: bool,
) -> Callable[..., Any]:
    """Makes a kernel whose workers run `compute(worker, *refs)` while one more warpgroup runs `fetch(*refs)`."""

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
