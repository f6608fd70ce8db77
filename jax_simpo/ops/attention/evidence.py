"""Tries a backend on the device at hand: are its numbers right, and how fast is it?

A kernel can be wrong on one chip only: by a compiler that nobody has tried it with, or by a race that no other chip
shows. So its results and gradients on small rows are compared with float64 (`oracle.py`), and then it is timed on rows
as long as the run's. What comes out is a verdict; nothing here decides anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jax_simpo.ops.attention.backends import ScoreRule
from jax_simpo.ops.attention.dispatch import attention, prepare_mask
from jax_simpo.ops.attention.mask import Mask
from jax_simpo.ops.attention.oracle import Results, RowMask, exact_attention, packed_pairs, small_rows
from jax_simpo.ops.clock import seconds_per_call

_LONGEST_REASON = 300  # characters of a compiler's message


class Distance(NamedTuple):
    """How far an array is from the exact one, in units of the root mean square of the exact tokens' norms.

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
    """What of a run decides which of a backend's kernels run, and how long they take; all of it is static.

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


@dataclass(frozen=True)
class Speed:
    """What a layer's attention takes on rows of packed pairs, the mask being made before.

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


@dataclass(frozen=True)
class Verdict:
    """What trying a backend showed.

    Attributes:
        backend: its name.
        problem: why it must not be used, a phrase that goes on after the name; `None` where its numbers are right.
        distances: by name of the array (out, dq, dk, dv), the largest over the windows; empty if there were none.
        speed: of the run's rows; `None` where the numbers are wrong, or no time was asked for.
    """

    backend: str
    problem: str | None
    distances: dict[str, Distance]
    speed: Speed | None = None


def examine(backend: str, shape: Shape, *, timed: bool = True) -> Verdict:
    """Tries a backend on this process's first device. Whatever it raises becomes a verdict.

    Args:
        backend: one of `backends.BACKENDS`.
        shape: of the run.
        timed: also time it, if its numbers are right.
    """
    distances: dict[str, Distance] = {}
    try:
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):  # on one device, whatever the mesh
            for window in shape.windows:
                small = None if window is None else min(window, 100)  # else no window would reach into the small rows
                for name, distance in _distances(backend, shape, small).items():
                    distances[name] = max(distances.get(name, distance), distance)
            if problem := _complaint(distances, LIMITS[shape.dtype]):
                return Verdict(backend, problem, distances)
            return Verdict(backend, None, distances, measure_speed(backend, shape) if timed else None)
    except Exception as error:  # of whatever kind: a compiler's, a driver's, or the backend's own
        return Verdict(backend, _told(error), distances)


def _distances(backend: str, shape: Shape, window: int | None) -> dict[str, Distance]:
    rows = small_rows()
    rule = ScoreRule(shape.scale, window, shape.softcap)
    inputs = _random_inputs(shape, *rows.key_end.shape)
    run = _Attend(backend, rows, rule).compiled(_with_gradients, inputs)
    found = Results(*map(_on_host, run()))
    q, k, v, dout = map(_on_host, inputs)
    exact = exact_attention(q, k, v, dout, rows, rule)
    return {name: _distance(found, exact) for name, found, exact in zip(Results._fields, found, exact, strict=True)}


def _distance(found: np.ndarray, exact: np.ndarray) -> Distance:
    if not np.isfinite(found).all():
        return Distance(float("inf"), float("inf"))
    error, norm = (np.linalg.norm(x, axis=-1) for x in (found - exact, exact))
    unit = np.sqrt(np.mean(norm**2))
    return Distance(float(np.sqrt(np.mean(error**2)) / unit), float((error / np.maximum(norm, unit)).max()))


def _complaint(distances: dict[str, Distance], limits: Distance) -> str | None:
    """Says which array is wrong, if one is."""
    for name, distance in distances.items():
        array = _IN_WORDS[name]
        if distance.mean == float("inf"):
            return f"gives NaN or infinity: {array}"
        if distance.mean > limits.mean:
            return f"is wrong: {array} is off by {distance.mean:.1e} of its size (right is up to {limits.mean:.0e})"
        if distance.worst > limits.worst:
            return f"is wrong: {array} is off by {distance.worst:.1e} at one token (right is up to {limits.worst:.0e})"
    return None


def measure_speed(backend: str, shape: Shape) -> Speed:
    """Times a backend on rows of packed pairs, filled as a run's are. The mask is made before.

    Raises:
        Exception: whatever the backend raises.
    """
    rows = packed_pairs(shape.rows, shape.row_length)
    inputs = _random_inputs(shape, *rows.key_end.shape)
    forward = total = 0.0
    area = temporary = 0
    for window in shape.windows:
        attend = _Attend(backend, rows, ScoreRule(shape.scale, window, shape.softcap))
        forward += seconds_per_call(attend.compiled(_forward, inputs))
        both = attend.compiled(_with_gradients, inputs)
        total += seconds_per_call(both)
        area += rows.live_area(window)
        temporary = max(temporary, both.temporary_bytes)
    # Two products in the forward pass, five in the backward pass (FlashAttention-2, section 4.1).
    operations = 7 * 2 * area * shape.heads * shape.head_dim
    return Speed(forward, total, operations / total / 1e12, temporary)


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

    def __init__(self, backend: str, rows: RowMask, rule: ScoreRule) -> None:
        self._rule = rule

        def prepare(key_end: Array, positions: Array) -> Mask:
            return prepare_mask(key_end, positions, (rule.window,), backend, room=rows.room)

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


def _random_inputs(shape: Shape, rows: int, length: int) -> tuple[Array, Array, Array, Array]:
    """Returns q, k, v and the gradient of the result, normally distributed."""
    chance = np.random.default_rng(0)

    def array(heads: int) -> Array:
        numbers = chance.standard_normal((rows, length, heads, shape.head_dim), np.float32)
        return jnp.asarray(numbers, shape.dtype)

    return array(shape.heads), array(shape.kv_heads), array(shape.kv_heads), array(shape.heads)


def _on_host(x: Array) -> np.ndarray:
    return np.asarray(x, np.float64)


def _told(error: Exception) -> str:
    text = " ".join(str(error).split())
    if len(text) > _LONGEST_REASON:
        text = text[:_LONGEST_REASON] + " ..."
    return f"fails: {type(error).__name__}: {text}"
