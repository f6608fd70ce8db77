"""Tries a backend of the loss head on the device at hand: are its numbers right, and how fast is it?

Log-probs and gradients on a small vocabulary are compared with float64 on the host, all of them. Then the backend is
timed on sizes of the run's, and a sample of what it computes there is compared too, because a kernel works on other
pieces there. What comes out is a verdict, as for attention (`ops.attention.evidence`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jax_simpo.ops.attention.evidence import Distance, Speed, Verdict, distance, told
from jax_simpo.ops.clock import seconds_per_call
from jax_simpo.ops.logprobs import target_logps
from jax_simpo.sharding import make_mesh

# Rows, targets of a row, real ones among them, row length, width and vocabulary of the small case: more states than a
# piece or a part of a tile has, a vocabulary that no piece divides, states with two targets, and padding.
_TARGETS, _COUNTS, _LENGTH, _WIDTH, _VOCABULARY = 650, (650, 411), 600, 256, 3001
_SAMPLE = 8  # states and entries of the vocabulary that are compared at the run's sizes
_ROUNDS = 4096  # entries of the vocabulary that the host holds in float64 at a time

# The largest distances of right results; `worst` is that of one target, state or entry of the vocabulary. In bfloat16
# `xla` has up to 2.8e-3 on a CPU, from rounding the gradients of logits and of states, and 3.9e-3 at the worst place.
LIMITS = {"bfloat16": Distance(5e-3, 2e-2), "float32": Distance(1e-5, 1e-4)}

_NAMES = ("its log-probs", "its gradient for the hidden states", "its gradient for the head")


@dataclass(frozen=True)
class HeadShape:
    """Holds what of a run decides how long its loss head takes; all of it is static.

    Attributes:
        dtype: the compute dtype.
        states: hidden states that predict targets, of one device and micro-batch.
        width: features of a state.
        vocabulary: entries of one device's part of the vocabulary.
        softcap: cap on the logits, None for none.
        frozen: the head is not trained.
    """

    dtype: str
    states: int
    width: int
    vocabulary: int
    softcap: float | None
    frozen: bool = False


@dataclass(frozen=True)
class _Case:
    """The inputs of a loss head; hidden states and head hold numbers of the compute dtype."""

    hidden: Array | np.ndarray  # [B, L, D]
    head: Array | np.ndarray  # [V, D]
    index: Int[np.ndarray, "B T"]
    token: Int[np.ndarray, "B T"]
    counts: Int[np.ndarray, " B"]

    @property
    def arrays(self) -> tuple[Any, Any]:
        """Returns the arguments of the program."""
        return self.hidden, self.head

    @property
    def targets(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the arrays that are constants of the program."""
        return self.index, self.token, self.counts

    @property
    def weights(self) -> Float[np.ndarray, "B T"]:
        """The gradients of the log-probs: of both signs and many sizes, 0 for padding."""
        real = np.arange(self.token.shape[1]) < self.counts[:, None]
        return np.where(real, np.cos(np.arange(self.token.size).reshape(self.token.shape)), 0.0).astype(np.float32)


class _Exact(NamedTuple):
    logps: np.ndarray
    dhidden: np.ndarray
    dhead: np.ndarray


def examine_head(backend: str, shape: HeadShape, device: jax.Device, *, timed: bool = True) -> Verdict:
    """Tries a backend on a device. Whatever it raises becomes a verdict.

    Args:
        backend: one of `loss_head.backends.BACKENDS`.
        shape: of the run.
        device: of this process.
        timed: also time it, if its numbers are right, and compare some at the run's sizes.
    """
    seen: dict[str, Distance] = {}
    try:
        with jax.set_mesh(make_mesh(data=1, fsdp=1, tensor=1, devices=[device])):
            if problem := _complaint(_small_distances(backend, shape), seen, shape.dtype):
                return Verdict(backend, problem, seen)
            if not timed:
                return Verdict(backend, None, seen)
            distances, speed = _at_size(backend, shape)
            if problem := _complaint(distances, seen, shape.dtype):
                return Verdict(backend, f"{problem}, with {shape.states} states", seen)
            return Verdict(backend, None, seen, speed)
    except Exception as error:  # of whatever kind: a compiler's, a driver's, or the backend's own
        return Verdict(backend, told(error), seen, raised=True)


def _small_distances(backend: str, shape: HeadShape) -> dict[str, Distance]:
    case, exact = _small_case(shape.dtype, shape.softcap)
    run = partial(_with_gradients, backend, shape.softcap, False, *case.targets, case.weights)
    logps, dhidden, dhead = (np.asarray(x, np.float64) for x in jax.jit(run)(*case.arrays))
    return _distances(logps[case.weights != 0][:, None], dhidden, dhead, exact)


@lru_cache(maxsize=2)
def _small_case(dtype: str, softcap: float | None) -> tuple[_Case, _Exact]:
    """Returns the small case, and the exact results; every backend is compared with the same."""
    chance = np.random.default_rng(0)
    rows = len(_COUNTS)
    hidden = chance.standard_normal((rows, _LENGTH, _WIDTH), np.float32).astype(dtype)
    head = (chance.standard_normal((_VOCABULARY, _WIDTH), np.float32) / _WIDTH**0.5).astype(dtype).astype(np.float32)
    index = np.sort(chance.integers(0, _LENGTH, (rows, _TARGETS)), axis=1).astype(np.int32)
    token = chance.integers(0, _VOCABULARY, (rows, _TARGETS)).astype(np.int32)
    token[:, ::7] = index[:, ::7]  # responses that share a state and its target
    case = _Case(hidden, head, index, token, np.asarray(_COUNTS, np.int32))
    weights = case.weights
    row, target = np.nonzero(weights)
    states = np.asarray(hidden, np.float64)[row, index[row, target]]
    logits, slope = _capped(states @ head.astype(np.float64).T, softcap)
    logps = logits - _log_sum_exp(logits)[:, None]
    own = np.arange(len(states)), token[row, target]
    weight = weights[row, target].astype(np.float64)[:, None]
    dlogits = -np.exp(logps) * weight
    dlogits[own] += weight[:, 0]
    dlogits *= slope
    dhidden = np.zeros(hidden.shape)
    np.add.at(dhidden, (row, index[row, target]), dlogits @ head)
    return case, _Exact(logps[own][:, None], dhidden, dlogits.T @ states)


def _at_size(backend: str, shape: HeadShape) -> tuple[dict[str, Distance], Speed]:
    """Times a backend on the run's sizes, and compares a sample of states and of entries of the vocabulary.

    Raises:
        Exception: whatever the backend raises.
    """
    case = _large_case(shape)
    arguments = case.arrays
    static = (backend, shape.softcap, shape.frozen, *case.targets)
    forward = jax.jit(partial(_log_probs, *static)).lower(*arguments).compile()
    both = jax.jit(partial(_with_gradients, *static, case.weights)).lower(*arguments).compile()
    forward_seconds = seconds_per_call(lambda: forward(*arguments))
    seconds = seconds_per_call(lambda: both(*arguments))
    found = both(*arguments)
    finite = all(bool(jnp.isfinite(x).all()) for x in found if x is not None)
    logps = np.asarray(found[0][0], np.float64)
    memory = both.memory_analysis()
    products = 2 if shape.frozen else 3
    operations = products * 2 * shape.states * shape.width * shape.vocabulary
    speed = Speed(
        forward_seconds, seconds, operations / seconds / 1e12, 0 if memory is None else memory.temp_size_in_bytes
    )
    if not finite:
        return {_NAMES[0]: Distance(float("inf"), float("inf"))}, speed
    states = np.unique(np.linspace(0, shape.states - 1, _SAMPLE).astype(int))
    entries = np.unique([0, shape.vocabulary // 2, shape.vocabulary - 1, *case.token[0, states]])
    exact = _exact_sample(case, shape.softcap, states, entries, logps)
    dhead = None if shape.frozen else np.asarray(found[2][entries], np.float64)
    dhidden = np.asarray(found[1][0, states], np.float64)
    return _distances(logps[states][:, None], dhidden, dhead, exact), speed


def _large_case(shape: HeadShape) -> _Case:
    """Returns a case of the run's sizes, each state with one target; the device makes it, since the head is large."""

    @jax.jit
    def make() -> tuple[Array, Array]:
        keys = jax.random.split(jax.random.key(0))
        hidden = jax.random.normal(keys[0], (1, shape.states, shape.width), shape.dtype)
        head = jax.random.normal(keys[1], (shape.vocabulary, shape.width), shape.dtype) / shape.width**0.5
        return hidden, head.astype(jnp.float32)

    token = np.random.default_rng(0).integers(0, shape.vocabulary, (1, shape.states)).astype(np.int32)
    hidden, head = make()
    return _Case(
        hidden, head, np.arange(shape.states, dtype=np.int32)[None], token, np.asarray([shape.states], np.int32)
    )


def _exact_sample(
    case: _Case, softcap: float | None, states: np.ndarray, entries: np.ndarray, logps: np.ndarray
) -> _Exact:
    """Computes in float64 the log-probs and gradients of some states, and the gradients of some entries of the head.

    The gradient of an entry needs the log-sum-exps of all states. They are taken from the log-probs that were found.
    """
    hidden, head = np.asarray(case.hidden[0]).astype(np.float64), np.asarray(case.head)
    token, weights = case.token[0], case.weights[0].astype(np.float64)
    rounds = [slice(start, start + _ROUNDS) for start in range(0, len(head), _ROUNDS)]
    products = [hidden[states] @ head[entries_of].astype(np.float64).T for entries_of in rounds]
    logits, slope = _capped(np.concatenate(products, axis=1), softcap)
    sampled = logits - _log_sum_exp(logits)[:, None]
    own = np.arange(len(states)), token[states]
    dlogits = -np.exp(sampled) * weights[states, None]
    dlogits[own] += weights[states]
    dlogits *= slope
    dhidden = sum(dlogits[:, entries_of] @ head[entries_of].astype(np.float64) for entries_of in rounds)
    targets, _ = _capped((hidden * head[token]).sum(-1, keepdims=True), softcap)
    logits, slope = _capped(hidden @ head[entries].astype(np.float64).T, softcap)
    dlogits = weights[:, None] * ((token[:, None] == entries) - np.exp(logits - targets + logps[:, None])) * slope
    return _Exact(sampled[own][:, None], np.asarray(dhidden), dlogits.T @ hidden)


def _capped(products: np.ndarray, softcap: float | None) -> tuple[np.ndarray, np.ndarray | float]:
    """Returns logits, and the derivative of the cap."""
    if softcap is None:
        return products, 1.0
    tanh = np.tanh(products / softcap)
    return softcap * tanh, 1.0 - tanh**2


def _log_sum_exp(logits: np.ndarray) -> np.ndarray:
    top = logits.max(-1)
    return np.asarray(top + np.log(np.exp(logits - top[:, None]).sum(-1)))


def _log_probs(
    backend: str,
    softcap: float | None,
    frozen: bool,
    index: np.ndarray,
    token: np.ndarray,
    counts: np.ndarray,
    hidden: Array,
    head: Array,
) -> Array:
    return target_logps(
        hidden,
        head,
        jnp.asarray(index),
        jnp.asarray(token),
        counts=jnp.asarray(counts),
        softcap=softcap,
        frozen=frozen,
        backend=backend,
    )


def _with_gradients(
    backend: str,
    softcap: float | None,
    frozen: bool,
    index: np.ndarray,
    token: np.ndarray,
    counts: np.ndarray,
    weights: np.ndarray,
    hidden: Array,
    head: Array,
) -> tuple[Array, Array, Array | None]:
    """Returns log-probs, and the gradients of their weighted sum; None for a frozen head."""
    logps_of: Callable[..., Array] = partial(_log_probs, backend, softcap, frozen, index, token, counts)
    if frozen:
        logps, pull = jax.vjp(lambda hidden: logps_of(hidden, head), hidden)
        return logps, *pull(jnp.asarray(weights)), None
    logps, pull = jax.vjp(logps_of, hidden, head)
    dhidden, dhead = pull(jnp.asarray(weights))
    return logps, dhidden, dhead


def _distances(logps: np.ndarray, dhidden: np.ndarray, dhead: np.ndarray | None, exact: _Exact) -> dict[str, Distance]:
    found = (logps, dhidden, dhead)
    return {name: distance(a, b) for name, a, b in zip(_NAMES, found, exact, strict=True) if a is not None}


def _complaint(distances: dict[str, Distance], seen: dict[str, Distance], dtype: str) -> str | None:
    """Says which array is wrong, if one is. `seen` takes up the distances."""
    for name, (mean, worst) in distances.items():
        former = seen.get(name, Distance(0.0, 0.0))
        seen[name] = Distance(max(mean, former.mean), max(worst, former.worst))
    limits = LIMITS[dtype]
    for name, (mean, worst) in distances.items():
        if mean == float("inf"):
            return f"gives NaN or infinity: {name}"
        if mean > limits.mean:
            return f"is wrong: {name} is off by {mean:.1e} of its size (right is up to {limits.mean:.0e})"
        if worst > limits.worst:
            return f"is wrong: {name} is off by {worst:.1e} at one place (right is up to {limits.worst:.0e})"
    return None
