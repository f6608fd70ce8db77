"""Variants of the kernels that only a GPU can judge: they compute the same numbers, and differ in what runs when."""

from __future__ import annotations

from typing import NamedTuple


class Switches(NamedTuple):
    """Static choices among variants of the kernels; the defaults are what `attention: pallas` runs.

    docs/decisions/003-attention-on-gpu.md says what is known of each. `jax-simpo doctor` compares those that are
    `VARIANTS` in `backend.py`.

    Attributes:
        heavy_first: the tiles with most live blocks are launched first, those of all heads, so that no long one is
            left for the end. Otherwise tiles come as they lie in the row, head by head.
        ping_pong: the two warpgroups of the forward kernel take turns at the tensor cores: one computes its softmax
            while the other's products run (FlashAttention-3, section 3.1).
        overlap: each warpgroup of the forward kernel computes the softmax of a step while its product with the values
            of the step before runs (FlashAttention-3, section 3.2).
    """

    heavy_first: bool = True
    ping_pong: bool = False
    overlap: bool = False


DEFAULTS = Switches()
