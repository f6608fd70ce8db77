"""Numeric settings that more than one file shares: precision of products, names of saved results, the lowest score."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

# Names (of `jax.ad_checkpoint.checkpoint_name`) under which a rematerialisation policy keeps results, so that the
# backward pass does not compute them again: what an attention returns, and products of activations with weights.
SAVED_ATTENTION = "attention"
SAVED_PRODUCT = "product"

# Stands for minus infinity where two such numbers are subtracted: being finite, it gives no NaN.
LOWEST = -1e30


def matmul_precision(dtype: Any) -> jax.lax.Precision | None:
    """Asks for full float32 products of float32 inputs: TPUs and GPUs would otherwise round these to fewer bits."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
