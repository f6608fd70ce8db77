"""The sizes of the pieces that the kernels work on, for each dtype and head size. It needs no library of kernels.

They were chosen by compiling (benchmarks/gpu_attention.py): on Ampere and Ada no kernel takes more than the 99 KiB of
shared memory that a block of threads may have on Ada (4090, L4, L40S), the least of all GPUs from Ampere on, and hardly
a register is spilled. How fast they are has not been measured.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

BLOCK = 64  # queries and keys of a block of the lists


class Tiles(NamedTuple):
    """The sizes of one kernel, static."""

    block: int  # queries and keys in a block of the lists
    heads: int  # query heads of a tile of queries, which has `block * heads` rows and one key/value head
    step: int  # rows of the other side (keys, for a tile of queries) in a pass of the loop; divides `block`
    warps: int
    stages: int  # passes of the loop that are in flight, the one that computes among them


class Tilings(NamedTuple):
    """The sizes of each kernel."""

    forward: Tiles
    dq: Tiles
    dk_dv: Tiles


# By dtype and head size: query heads of a tile where the group has an even number, and for each kernel (forward, dQ,
# dK/dV) the steps in a block and the warps. float32 products do not run on the tensor cores; operands and sums of a
# head of 256 would need twice the shared memory.
_SIZES: dict[str, dict[int, tuple[int, tuple[tuple[int, int], ...]]]] = {
    "bfloat16": {
        64: (2, ((1, 4), (1, 8), (1, 4))),
        128: (2, ((1, 8), (2, 8), (1, 8))),
        256: (1, ((2, 8), (4, 8), (4, 8))),
    },
    "float32": {
        64: (1, ((2, 8), (2, 8), (2, 8))),
        128: (1, ((4, 8), (4, 8), (4, 8))),
    },
}
HEAD_SIZES = {dtype: tuple(sizes) for dtype, sizes in _SIZES.items()}
_STAGES = 2


def tilings(width: int, dtype: Any, group: int, block: int = BLOCK) -> Tilings:
    """Returns the sizes of the three kernels.

    Args:
        width: features of a head; one that there is no kernel for, as in tests, gets the sizes of the next larger.
        dtype: of the arrays.
        group: query heads that share a key/value head.
        block: queries and keys of a block.
    """
    sizes = _SIZES[jnp.dtype(dtype).name]
    heads, kernels = sizes[min(size for size in sizes if size >= width)]
    (forward, dq, dk_dv) = (Tiles(block, 1, block // parts, warps, _STAGES) for parts, warps in kernels)
    if heads == 1:
        return Tilings(forward, dq, dk_dv)
    if group % heads == 0:
        return Tilings(forward._replace(heads=heads), dq._replace(heads=heads), dk_dv)
    # Half as many rows: half as many warps, and no fewer than a multiprocessor runs at once.
    return Tilings(forward._replace(warps=4), dq._replace(warps=4), dk_dv)
