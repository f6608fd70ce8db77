"""Measures what a chip can do, and whether this program's loss head is right there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jax_simpo.ops.attention.evidence import told
from jax_simpo.ops.clock import seconds_per_call
from jax_simpo.ops.logprobs import target_logps
from jax_simpo.ops.numerics import matmul_precision

_SIZES = {"cpu": 2048, "gpu": 8192, "tpu": 8192}  # of the square matrices whose product is the peak
_COPY_BYTES = {"cpu": 1 << 28, "gpu": 1 << 31, "tpu": 1 << 31}
_CHECKED = (200, 160, 3001)  # targets, width and vocabulary on which the loss head's numbers are checked
# Root mean square error over that of the exact array. In bfloat16 logits are sums of rounded products, as in any head.
_LIMITS = {"float32": 1e-5, "bfloat16": 1e-2}


@dataclass(frozen=True)
class Peaks:
    """Holds the most that the chip did here.

    Attributes:
        tflops: 1e12 operations a second of a product of square matrices in the compute dtype.
        copy_gb_per_second: 1e9 bytes a second, read and written, of a copy in the device's memory.
    """

    tflops: float
    copy_gb_per_second: float


@dataclass(frozen=True)
class HeadSizes:
    """Holds the sizes of a loss head: what a micro-batch asks of it."""

    targets: int
    width: int
    vocabulary: int
    softcap: float | None


@dataclass(frozen=True)
class HeadVerdict:
    """Says what trying the loss head showed.

    Attributes:
        problem: why its numbers must not be used; None where they are right.
        errors: by name of the array, its root mean square error over that of the exact one.
        seconds: of forward and backward pass; None where it failed.
        tflops: 1e12 operations a second, counting three products for the four it computes; None where it failed.
        temporary_bytes: memory beside arguments and results, as the compiler reports it; None where it failed.
    """

    problem: str | None
    errors: dict[str, float]
    seconds: float | None = None
    tflops: float | None = None
    temporary_bytes: int | None = None


def measure_peaks(platform: str, dtype: str) -> Peaks:
    """Measures the peaks of the first device: cpu, gpu or tpu."""
    size = _SIZES.get(platform, _SIZES["gpu"])
    a = jnp.asarray(np.random.default_rng(0).standard_normal((size, size), np.float32), dtype)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=matmul_precision(a.dtype)))
    product_seconds = seconds_per_call(lambda: product(a, a))
    x = jnp.ones(_COPY_BYTES.get(platform, _COPY_BYTES["gpu"]) // 4, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    copy_seconds = seconds_per_call(lambda: copy(x))
    return Peaks(2 * size**3 / product_seconds / 1e12, 2 * x.nbytes / copy_seconds / 1e9)


def examine_head(dtype: str, sizes: HeadSizes) -> HeadVerdict:
    """Compares the loss head with float64 on small sizes, then times it on the given ones."""
    errors: dict[str, float] = {}
    try:
        errors = _head_errors(dtype, sizes.softcap)
        for name, error in errors.items():
            if not error <= _LIMITS[dtype]:  # NaN too
                return HeadVerdict(
                    f"is wrong: {name} is off by {error:.1e} of its size (right is up to {_LIMITS[dtype]:.0e})", errors
                )
        hidden, head, token = _head_inputs(dtype, sizes.targets, sizes.width, sizes.vocabulary)
        program = jax.jit(_head_program(sizes.softcap)).lower(hidden, head, token).compile()
        seconds = seconds_per_call(lambda: program(hidden, head, token))
        memory = program.memory_analysis()
        operations = 3 * 2 * sizes.targets * sizes.width * sizes.vocabulary
        return HeadVerdict(
            None, errors, seconds, operations / seconds / 1e12, None if memory is None else memory.temp_size_in_bytes
        )
    except Exception as error:  # a compiler's, a driver's, or out of memory
        return HeadVerdict(told(error), errors)


def _head_inputs(dtype: str, targets: int, width: int, vocabulary: int) -> tuple[Array, Array, Array]:
    """Returns hidden states [1, T, D], a head [V, D] in float32 whose logits have about unit variance, and tokens."""
    chance = np.random.default_rng(0)
    hidden = jnp.asarray(chance.standard_normal((1, targets, width), np.float32), dtype)
    head = jnp.asarray(chance.standard_normal((vocabulary, width), np.float32) / width**0.5)
    return hidden, head, jnp.asarray(chance.integers(0, vocabulary, (1, targets)), jnp.int32)


def _head_program(softcap: float | None) -> Callable[[Array, Array, Array], tuple[Array, Array, Array]]:
    """Returns a function of hidden states, head and tokens: the log-probs, and the gradients of a weighted sum."""

    def run(hidden: Array, head: Array, token: Array) -> tuple[Array, Array, Array]:
        index = jnp.broadcast_to(jnp.arange(token.shape[1], dtype=jnp.int32), token.shape)
        logps, pull = jax.vjp(lambda h, w: target_logps(h, w, index, token, softcap=softcap), hidden, head)
        dhidden, dhead = pull(_weights(logps.shape[1])[None])
        return logps, dhidden, dhead

    return run


def _weights(targets: int) -> Array:
    return jnp.cos(jnp.arange(targets, dtype=jnp.float32))  # gradients of both signs and many sizes


def _head_errors(dtype: str, softcap: float | None) -> dict[str, float]:
    targets, width, vocabulary = _CHECKED
    hidden, head, token = _head_inputs(dtype, targets, width, vocabulary)
    found = jax.jit(_head_program(softcap))(hidden, head, token)
    exact = _exact_head(np.asarray(hidden[0], np.float64), np.asarray(head, np.float64), np.asarray(token[0]), softcap)
    names = ("its log-probs", "its gradient for the hidden states", "its gradient for the head")
    return {
        name: float(np.sqrt(np.mean((np.asarray(a, np.float64).reshape(b.shape) - b) ** 2) / np.mean(b**2)))
        for name, a, b in zip(names, found, exact, strict=True)
    }


def _exact_head(
    hidden: np.ndarray, head: np.ndarray, token: np.ndarray, softcap: float | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Computes in float64 what `_head_program` does."""
    logits, slope = hidden @ head.T, 1.0
    if softcap is not None:
        tanh = np.tanh(logits / softcap)
        logits, slope = softcap * tanh, 1 - tanh**2
    row = np.arange(len(token))
    shifted = logits - logits.max(-1, keepdims=True)
    logps = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    weights = np.asarray(_weights(len(token)), np.float64)[:, None]
    dlogits = -np.exp(logps) * weights
    dlogits[row, token] += weights[:, 0]
    dlogits *= slope
    return logps[row, token], dlogits @ head, dlogits.T @ hidden
