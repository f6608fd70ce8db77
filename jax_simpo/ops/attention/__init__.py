"""Attention under the mask of packed rows with shared prompts.

`prepare_mask` makes the mask once per batch and `attention` applies it in every layer (`dispatch.py`). The rule that
says which keys a query sees is `mask.visible_at`. Each backend has a file of its own; `backends.py` lists them and says
what a new one must bring, and `choice.py` which of them can run in a place. `evidence.py` tries them there.
"""

from __future__ import annotations

from jax_simpo.ops.attention.backends import BACKENDS
from jax_simpo.ops.attention.choice import choose, place_of
from jax_simpo.ops.attention.dispatch import attention, prepare_causal_mask, prepare_mask
from jax_simpo.ops.attention.mask import Mask, Room, visible_at

__all__ = [
    "BACKENDS",
    "Mask",
    "Room",
    "attention",
    "choose",
    "place_of",
    "prepare_causal_mask",
    "prepare_mask",
    "visible_at",
]
