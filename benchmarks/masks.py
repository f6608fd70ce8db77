"""Makes the rows and masks that benchmarks of attention run under: pairs packed into rows, shared or separate."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

if TYPE_CHECKING:
    from jax_simpo.ops.attention import Mask

Row = tuple[Int[np.ndarray, " L"], Int[np.ndarray, " L"]]  # key_end, positions
Lengths = tuple[int, int, int]  # of a pair's prompt, chosen and rejected response


def fill_row(pairs: Iterable[Lengths], length: int, *, shared: bool = True) -> Row:
    """Lays pairs out in one row, one after another, and leaves out those that do not fit; padding follows.

    Args:
        pairs: the pairs.
        length: tokens of the row.
        shared: each prompt is in the row once; otherwise before each of its responses.
    """
    key_end, positions = np.zeros(length, np.int32), np.zeros(length, np.int32)
    start = 0
    for prompt, chosen, rejected in pairs:
        # Runs of tokens: their number, their first position, and where in the pair the queries end that see them.
        if shared:
            total = prompt + chosen + rejected
            runs = [(prompt, 0, total), (chosen, prompt, prompt + chosen), (rejected, prompt, total)]
        else:
            total = 2 * prompt + chosen + rejected
            runs = [(prompt + chosen, 0, prompt + chosen), (prompt + rejected, 0, total)]
        if start + total > length:
            continue
        token = start
        for count, first, end in runs:
            key_end[token : token + count] = start + end
            positions[token : token + count] = first + np.arange(count)
            token += count
        start += total
    return key_end, positions


def live_area(key_end: Int[np.ndarray, "..."]) -> int:
    """Returns the number of pairs of a query and a key that it sees: all that attention has to compute."""
    keys = np.arange(key_end.shape[-1])
    return int(np.maximum(0, key_end - keys).sum(dtype=np.int64))


def prepared(
    key_end: Int[np.ndarray, "B L"], positions: Int[np.ndarray, "B L"], backend: str, window: int | None = None
) -> Mask:
    """Prepares the mask of a backend in one compiled call, which no time of attention contains.

    Args:
        key_end: as in rows.
        positions: as in rows.
        backend: one of `jax_simpo.ops.attention.BACKENDS`.
        window: the sliding window, in positions.
    """
    import jax

    from jax_simpo.ops.attention import prepare_mask
    from jax_simpo.ops.attention.oracle import RowMask

    room = RowMask(key_end, positions).room

    def prepare(key_end: Any, positions: Any) -> Any:
        return prepare_mask(key_end, positions, (window,), backend, room=room)

    mask: Mask = jax.block_until_ready(jax.jit(prepare)(key_end, positions))
    return mask
