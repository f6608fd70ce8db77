"""Settings that every matrix product and every rematerialised layer of the program shares."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

# The name under which a rematerialisation policy keeps an attention's result, so that the backward pass need not run
# the attention again.
SAVED = "attention"


def matmul_precision(dtype: Any) -> jax.lax.Precision | None:
    """Full float32 products for float32 inputs: TPUs and GPUs would otherwise round them to fewer bits."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
