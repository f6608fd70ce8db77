"""Rotary position embedding (arXiv 2104.09864), equal to that of transformers to the last bit."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jax_simpo.models.config import LinearScaling, Llama3Scaling, Rope


def rope_tables(
    rope: Rope, head_dim: int, positions: Int[Array, "B L"], dtype: Any
) -> tuple[Float[Array, "B L 1 Half"], Float[Array, "B L 1 Half"]]:
    """Computes cosines and sines of every token's rotary angles in float32, then casts them to `dtype`."""
    angles = positions[:, :, None, None].astype(jnp.float32) * rope_frequencies(rope, head_dim)
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def rotate(x: Float[Array, "B L H Dh"], cos: Array, sin: Array) -> Float[Array, "B L H Dh"]:
    """Rotates features i and i + Dh/2 as a pair (the half-split layout of Hugging Face checkpoints)."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rope_frequencies(rope: Rope, head_dim: int) -> Float[np.ndarray, " Half"]:
    """Returns the rotation per position of each pair of features, in radians, float32."""
    # As in PyTorch, exponents are rounded to float32. PyTorch's float32 power nearly always is the rounded float64 one.
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1) / np.power(np.float64(rope.theta), exponents.astype(np.float64)).astype(np.float32)
    if isinstance(rope.scaling, LinearScaling):
        return frequencies / np.float32(rope.scaling.factor)
    if isinstance(rope.scaling, Llama3Scaling):
        return _llama3_frequencies(rope.scaling, frequencies)
    return frequencies


def _llama3_frequencies(scaling: Llama3Scaling, frequencies: Float[np.ndarray, " Half"]) -> Float[np.ndarray, " Half"]:
    """Scales the frequencies in three bands by wavelength, with the operations of transformers, all in float32."""
    factor, low, high = (np.float32(x) for x in (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor))
    length = np.float32(scaling.original_max_position_embeddings)
    wavelength = np.float32(2 * math.pi) / frequencies
    ramp = (length / wavelength - low) / (high - low)
    blend = (1 - ramp) * frequencies / factor + ramp * frequencies
    between = (wavelength >= length / high) & (wavelength <= length / low)
    return np.where(between, blend, np.where(wavelength > length / low, frequencies / factor, frequencies))
