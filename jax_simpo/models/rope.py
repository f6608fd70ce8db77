"""Rotary position embedding (arXiv 2104.09864), to the last bit as transformers has it."""

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
    """Cosines and sines of every token's rotary angles: float32 angles, then cast."""
    angles = positions[:, :, None, None].astype(jnp.float32) * rope_frequencies(rope, head_dim)
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def rotate(x: Float[Array, "B L H Dh"], cos: Array, sin: Array) -> Float[Array, "B L H Dh"]:
    """Turns feature i together with feature i + Dh/2 (the half-split layout of Hugging Face checkpoints)."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rope_frequencies(rope: Rope, head_dim: int) -> Float[np.ndarray, " Half"]:
    """Radians per position, float32, one for each pair of features."""
    # Exponents rounded to float32 first, as in PyTorch; its float32 power is the float64 one rounded, nearly always.
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1) / np.power(np.float64(rope.theta), exponents.astype(np.float64)).astype(np.float32)
    if isinstance(rope.scaling, LinearScaling):
        return frequencies / np.float32(rope.scaling.factor)
    if isinstance(rope.scaling, Llama3Scaling):
        return _llama3_frequencies(rope.scaling, frequencies)
    return frequencies


def _llama3_frequencies(scaling: Llama3Scaling, frequencies: Float[np.ndarray, " Half"]) -> Float[np.ndarray, " Half"]:
    """Three bands by wavelength, in the order of operations of transformers (float32 throughout)."""
    factor, low, high = (np.float32(x) for x in (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor))
    length = np.float32(scaling.original_max_position_embeddings)
    wavelength = np.float32(2 * math.pi) / frequencies
    ramp = (length / wavelength - low) / (high - low)
    blend = (1 - ramp) * frequencies / factor + ramp * frequencies
    between = (wavelength >= length / high) & (wavelength <= length / low)
    return np.where(between, blend, np.where(wavelength > length / low, frequencies / factor, frequencies))
