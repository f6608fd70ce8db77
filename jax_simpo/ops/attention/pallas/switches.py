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
        half_lists: kernels whose steps are half a block long (dQ, dK and dV; forward with heads of 256) skip the dead
            halves of a block, and mask its mixed halves only. Otherwise every half counts as its whole block does.
        ping_pong: the two warpgroups of the forward kernel take turns at the tensor cores: one computes its softmax
            while the other's products run (FlashAttention-3, section 3.1).
        overlap: each warpgroup of the forward kernel computes the softmax of a step while its product with the values
            of the step before runs (FlashAttention-3, section 3.2).
    """

    heavy_first: bool = True
    half_lists: bool = True
    ping_pong: bool = False
    overlap: bool = False

    @property
    def of_lists(self) -> dict[str, bool]:
        """The choices that the lists of live blocks are made by: arguments of `bounds.find_block_bounds`."""
        return {"heavy_first": self.heavy_first, "half_lists": self.half_lists}


DEFAULTS = Switches()
