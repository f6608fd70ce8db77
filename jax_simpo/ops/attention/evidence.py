"""Tries a backend on the device at hand: are its numbers right, and how fast is it?

A kernel can be wrong on one chip only: by a compiler that nobody has tried it with, or by a race that no other chip
shows. So its results and gradients on small rows, one of which ends within a kernel's block as the run's rows do, are
compared with float64 (`oracle.py`), and then it is timed on rows as long as the run's. What comes out is a verdict;
nothing here decides anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jax_simpo.ops.attention.backends import ScoreRule
from jax_simpo.ops.attention.dispatch import attention, prepare_mask
from jax_simpo.ops.attention.mask import Mask, Room
from jax_simpo.ops.attention.oracle import Results, RowMask, exact_attention, full_row, packed_pairs, small_rows
from jax_simpo.ops.clock import seconds_per_call
from jax_simpo.sharding import make_mesh

LARGEST_BLOCK = 512  # tokens of the largest block that a kernel works in (`splash`, in rows of 4,096 and more)
_LONG = 4096  # tokens of a row in which kernels take their largest blocks
_LONGEST_REASON = 300  # characters of a compiler's message


class Distance(NamedTuple):
    """Measures how far an array is from the exact one, in units of the root mean square of the exact tokens' norms.

    Attributes:
        mean: root mean square over tokens and heads.
        worst: the largest over tokens and heads; where an exact token is longer than the unit, over its own norm.
    """

    mean: float
    worst: float


# The largest distances of right results. In bfloat16 `dense` has means of 2.2e-3 to 2.4e-3 and worst tokens up to
# 1.3e-2, most of it from rounding the results. One key too many for one of 640 queries, which sees 150, gives a worst
# token of 9e-2. In float32 the least precise backend, `pallas`, is 1e-5 off.
LIMITS = {"bfloat16": Distance(4e-3, 4e-2), "float32": Distance(1e-4, 1e-3)}

_IN_WORDS = {
    "out": "its result",
    "dq": "its gradient for the queries",
    "dk": "its gradient for the keys",
    "dv": "its gradient for the values",
}


@dataclass(frozen=True)
class Shape:
    """Holds what of a run decides which of a backend's kernels run, and how long they take; all of it is static.

    Attributes:
        dtype: the compute dtype.
        heads: query heads of one device.
        kv_heads: key/value heads of one device.
        head_dim: features of a head.
        windows: the distinct sliding windows of the layers.
        scale: factor on the scores.
        softcap: cap on the scores, `None` for none.
        rows: rows that a device computes at a time.
        row_length: tokens of a row.
        remainder: tokens by which the run's rows are longer than a multiple of `LARGEST_BLOCK`, or than `row_length`
            where that is less; 0 if they are not.
        room: bounds of what a row of the run may hold; `None` takes those of the rows that are timed.
    """

    dtype: str
    heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    scale: float
    softcap: float | None
    rows: int
    row_length: int
    remainder: int = 0
    room: Room | None = None


@dataclass(frozen=True)
class Speed:
    """Says what a layer's attention takes on rows of packed pairs, the mask being made before.

    Attributes:
        forward_seconds: seconds of the forward pass.
        seconds: seconds of the forward and the backward pass, added up over the shape's distinct windows.
        tflops: 1e12 operations a second of forward and backward, counting visible pairs of a query and a key only.
        temporary_bytes: memory of a device beside arguments and results, as the compiler reports it.
    """

    forward_seconds: float
    seconds: float
    tflops: float
    temporary_bytes: int

    def plus(self, other: Speed) -> Speed:
        """Returns the speed of both one after the other."""
        seconds = self.seconds + other.seconds
        operations = self.tflops * self.seconds + other.tflops * other.seconds
        memory = max(self.temporary_bytes, other.temporary_bytes)
        return Speed(self.forward_seconds + other.forward_seconds, seconds, operations / seconds, memory)


@dataclass(frozen=True)
class Verdict:
    """Says what trying a backend showed.

    Attributes:
        backend: its name.
        problem: why it must not be used, a phrase that goes on after the name; `None` where its numbers are right.
        distances: by name of the array (out, dq, dk, dv), the largest that were seen; empty if there were none.
        speed: of the run's rows; `None` where the numbers are wrong, or no time was asked for.
        raised: the problem is an error that it raised, for which the backend need not be to blame.
    """

    backend: str
    problem: str | None
    distances: dict[str, Distance]
    speed: Speed | None = None
    raised: bool = False


def examine(backend: str, shape: Shape, device: jax.Device, *, timed: bool = True) -> Verdict:
    """Tries a backend on a device. Whatever it raises becomes a verdict.

    It is tried as a run calls it, under a mesh, though of one device. Where the run's rows end within a block, so does
    one of the rows that its numbers are compared on. With `timed` they are also compared on rows as long as the run's,
    because a kernel may take other blocks there.

    Args:
        backend: one of `backends.BACKENDS`.
        shape: of the run.
        device: of this process.
        timed: also time it, if its numbers are right.
    """
    seen: dict[str, Distance] = {}
    try:
        with jax.set_mesh(make_mesh(data=1, fsdp=1, tensor=1, devices=[device])):
            for window in shape.windows:
                # A shorter window, or none would reach into the small rows; with 300 some blocks are still full.
                window = None if window is None else min(window, 300)
                if problem := _complaint(_small_distances(backend, shape, window), seen, shape.dtype):
                    return Verdict(backend, problem, seen)
                if not shape.remainder:
                    continue
                length = min(shape.row_length, _LONG) + shape.remainder
                if problem := _complaint(_last_distances(backend, shape, window, length), seen, shape.dtype):
                    return Verdict(backend, f"{problem}, in a row of {length}, which ends within a block", seen)
            if not timed:
                return Verdict(backend, None, seen)
            speed = Speed(0.0, 0.0, 0.0, 0)
            for window in shape.windows:
                distances, of_window = _at_length(backend, shape, window)
                if problem := _complaint(distances, seen, shape.dtype):
                    return Verdict(backend, f"{problem}, in rows of {shape.row_length}", seen)
                speed = speed.plus(of_window)
            return Verdict(backend, None, seen, speed)
    except Exception as error:  # of whatever kind: a compiler's, a driver's, or the backend's own
        return Verdict(backend, told(error), seen, raised=True)


def _small_distances(backend: str, shape: Shape, window: int | None) -> dict[str, Distance]:
    inputs, exact = _small_case(replace(shape, rows=2, row_length=640, room=None), window)
    rule = ScoreRule(shape.scale, window, shape.softcap)
    found = _Attend(backend, small_rows(), rule).compiled(_with_gradients, _on_device(inputs, shape.dtype))()
    return _distances(map(_on_host, found), exact)


@lru_cache(maxsize=4)
def _small_case(shape: Shape, window: int | None) -> tuple[Inputs, Results]:
    """Returns inputs for the small rows, and the exact results; every backend is compared with the same."""
    rows = small_rows()
    inputs = _random_inputs(shape)
    return inputs, exact_attention(*inputs, rows, ScoreRule(shape.scale, window, shape.softcap))


def _last_distances(backend: str, shape: Shape, window: int | None, length: int) -> dict[str, Distance]:
    """Compares the last pair of a row that it fills to the end."""
    rows, rule = full_row(length), ScoreRule(shape.scale, window, shape.softcap)
    on_host = _random_inputs(replace(shape, rows=1, row_length=length))
    found = _Attend(backend, rows, rule).compiled(_with_gradients, _on_device(on_host, shape.dtype))()
    return _distances_of_last_group([_on_host(x) for x in found], on_host, rows, rule)


def _at_length(backend: str, shape: Shape, window: int | None) -> tuple[dict[str, Distance], Speed]:
    """Times a backend on rows of packed pairs, filled as a run's are, and compares the last pair of each row.

    Raises:
        Exception: whatever the backend raises.
    """
    rows = packed_pairs(shape.rows, shape.row_length, shape.room)
    rule = ScoreRule(shape.scale, window, shape.softcap)
    on_host = _random_inputs(shape)
    inputs = _on_device(on_host, shape.dtype)
    attend = _Attend(backend, rows, rule, shape.room)
    forward_seconds = seconds_per_call(attend.compiled(_forward, inputs))
    both = attend.compiled(_with_gradients, inputs)
    seconds = seconds_per_call(both)
    distances = _distances_of_last_group([_on_host(x) for x in both()], on_host, rows, rule)
    # Two products in the forward pass, five in the backward pass (FlashAttention-2, section 4.1).
    operations = 7 * 2 * rows.live_area(window) * shape.heads * shape.head_dim
    return distances, Speed(forward_seconds, seconds, operations / seconds / 1e12, both.temporary_bytes)


def _distances_of_last_group(
    found: list[np.ndarray], on_host: Inputs, rows: RowMask, rule: ScoreRule
) -> dict[str, Distance]:
    """Compares the last group of every row; the others have to be finite."""
    last = rows.last_group()
    q, k, v, dout = (x[:, last] for x in on_host)
    exact = exact_attention(q, k, v, dout, rows.part(last), rule)
    distances = _distances([x[:, last] for x in found], exact)
    for name, array in zip(Results._fields, found, strict=True):
        if not np.isfinite(array).all():
            distances[name] = Distance(float("inf"), float("inf"))
    return distances


def _distances(found: Iterable[np.ndarray], exact: Results) -> dict[str, Distance]:
    return {name: distance(a, b) for name, a, b in zip(Results._fields, found, exact, strict=True)}


def distance(found: np.ndarray, exact: np.ndarray) -> Distance:
    """Returns how far an array is from the exact one; infinite if not all of it is finite. A token is its last axis."""
    if not np.isfinite(found).all():
        return Distance(float("inf"), float("inf"))
    error, norm = (np.linalg.norm(x, axis=-1) for x in (found - exact, exact))
    unit = np.sqrt(np.mean(norm**2))
    return Distance(float(np.sqrt(np.mean(error**2)) / unit), float((error / np.maximum(norm, unit)).max()))


def _complaint(distances: dict[str, Distance], seen: dict[str, Distance], dtype: str) -> str | None:
    """Says which array is wrong, if one is. `seen` takes up the distances."""
    for name, (mean, worst) in distances.items():
        former = seen.get(name, Distance(0.0, 0.0))
        seen[name] = Distance(max(mean, former.mean), max(worst, former.worst))
    limits = LIMITS[dtype]
    for name, (mean, worst) in distances.items():
        array = _IN_WORDS[name]
        if mean == float("inf"):
            return f"gives NaN or infinity: {array}"
        if mean > limits.mean:
            return f"is wrong: {array} is off by {mean:.1e} of its size (right is up to {limits.mean:.0e})"
        if worst > limits.worst:
            return f"is wrong: {array} is off by {worst:.1e} at one token (right is up to {limits.worst:.0e})"
    return None


Inputs = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # q, k, v, and the gradient of the result, float32
_AttendFn = Callable[[Array, Array, Array], Array]  # of q, k and v
_Pass = Callable[[_AttendFn, Array, Array, Array, Array], Any]  # of those and the gradient of the result


def _forward(attend: _AttendFn, q: Array, k: Array, v: Array, dout: Array) -> Array:
    return attend(q, k, v)


def _with_gradients(attend: _AttendFn, q: Array, k: Array, v: Array, dout: Array) -> Results:
    out, pull = jax.vjp(attend, q, k, v)
    return Results(out, *pull(dout))


@dataclass(frozen=True)
class _Compiled:
    """A compiled program with its arguments."""

    program: jax.stages.Compiled
    arguments: tuple[Array, ...]

    def __call__(self) -> Any:
        return self.program(*self.arguments)

    @property
    def temporary_bytes(self) -> int:
        """Memory beside arguments and results; 0 where the compiler does not say."""
        analysis = self.program.memory_analysis()
        return 0 if analysis is None else analysis.temp_size_in_bytes


class _Attend:
    """Attention with a backend on given rows, with the mask made once, as a model does it."""

    def __init__(self, backend: str, rows: RowMask, rule: ScoreRule, room: Room | None = None) -> None:
        self._rule = rule
        room = room or rows.room

        def prepare(key_end: Array, positions: Array) -> Mask:
            return prepare_mask(key_end, positions, (rule.window,), backend, room=room)

        mask = jax.block_until_ready(jax.jit(prepare)(rows.key_end, rows.positions))
        self._arrays, self._mask_of = jax.tree.flatten(mask)

    def compiled(self, run: _Pass, inputs: tuple[Array, Array, Array, Array]) -> _Compiled:
        scale, window, softcap = self._rule

        def whole(q: Array, k: Array, v: Array, dout: Array, *arrays: Array) -> Any:
            mask: Mask = jax.tree.unflatten(self._mask_of, arrays)

            def attend(q: Array, k: Array, v: Array) -> Array:
                return attention(q, k, v, mask, scale=scale, window=window, softcap=softcap)

            return run(attend, q, k, v, dout)

        arguments = (*inputs, *self._arrays)
        return _Compiled(jax.jit(whole).lower(*arguments).compile(), arguments)


def _random_inputs(shape: Shape) -> Inputs:
    """Returns q, k, v and the gradient of the result, normally distributed, as numbers of the dtype."""
    chance = np.random.default_rng(0)

    def array(heads: int) -> np.ndarray:
        size = (shape.rows, shape.row_length, heads, shape.head_dim)
        return np.asarray(chance.standard_normal(size, np.float32).astype(shape.dtype), np.float32)

    return array(shape.heads), array(shape.kv_heads), array(shape.kv_heads), array(shape.heads)


def _on_device(inputs: Inputs, dtype: str) -> tuple[Array, Array, Array, Array]:
    q, k, v, dout = (jnp.asarray(x, dtype) for x in inputs)
    return q, k, v, dout


def _on_host(x: Array) -> np.ndarray:
    return np.asarray(x, np.float64)


def told(error: Exception) -> str:
    """Returns an error as a phrase that goes on after the name of what raised it."""
    text = " ".join(str(error).split())
    if len(text) > _LONGEST_REASON:
        text = text[:_LONGEST_REASON] + " ..."
    return f"fails: {type(error).__name__}: {text}"
