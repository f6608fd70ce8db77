"""Attention under a `key_end` mask, one switch over its implementations.

Which implementation a run takes is decided in `choice.py`.
"""

from __future__ import annotations

from jax_simpo.ops.attention.attend import attention
from jax_simpo.ops.attention.choice import IMPLEMENTATIONS, resolve_implementation
from jax_simpo.ops.attention.mask import Mask, prepare_mask, visible

__all__ = ["IMPLEMENTATIONS", "Mask", "attention", "prepare_mask", "resolve_implementation", "visible"]
