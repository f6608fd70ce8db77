"""Measures what a chip can do."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jax_simpo.ops.clock import seconds_per_call
from jax_simpo.ops.numerics import matmul_precision

_SIZES = {"cpu": 2048, "gpu": 8192, "tpu": 8192}  # of the square matrices whose product is the peak
_COPY_BYTES = {"cpu": 1 << 28, "gpu": 1 << 31, "tpu": 1 << 31}


@dataclass(frozen=True)
class Peaks:
    """Holds the most that the chip did here.

    Attributes:
        tflops: 1e12 operations a second of a product of square matrices in the compute dtype.
        copy_gb_per_second: 1e9 bytes a second, read and written, of a copy in the device's memory.
    """

    tflops: float
    copy_gb_per_second: float


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
