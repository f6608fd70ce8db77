"""The mask of a batch: the one rule that says which keys a query sees.

Key `k` of a row is visible to query `q` iff `k <= q < key_end[k]`; a sliding window adds
`positions[q] - positions[k] < window`. That one rule is causality, branch isolation (chosen from rejected), isolation
of packed pairs and padding. A query that sees no key (padding) gets zeros, in values and gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int

from jax_simpo.ops.attention import blockwise
from jax_simpo.ops.attention.choice import IMPLEMENTATIONS
from jax_simpo.sharding import RULES


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("key_end", "positions", "tables"),
    meta_fields=("windows", "implementation", "interpret"),
)
@dataclass(frozen=True)
class Mask:
    """The mask of a batch in the form its implementation wants, made once per batch by `prepare_mask`.

    `tables` holds, for each of `windows`, what the implementation's module made of the mask: lists of live blocks, or
    where the tokens of each response lie. Every array has the rows first, so that the mask shards with the batch.
    """

    key_end: Int[Array, "B L"]
    positions: Int[Array, "B L"]
    tables: tuple[Any, ...]
    windows: tuple[int | None, ...]
    implementation: str
    interpret: bool


def prepare_mask(
    key_end: Int[Array, "B L"],
    positions: Int[Array, "B L"],
    windows: tuple[int | None, ...] = (None,),
    implementation: str = "blockwise",
    *,
    sequences: int | None = None,
    interpret: bool = False,
) -> Mask:
    """Does, once per batch and outside the layer scan, all that attention needs to know of the mask.

    Args:
        key_end: int32, see the module docstring; padding is 0.
        positions: int32 RoPE positions, each in its own response's sequence.
        windows: the distinct sliding windows (in positions) of the model's layers; `None` is full attention.
        implementation: one of `IMPLEMENTATIONS`.
        sequences: at most so many responses in a row; `cudnn` needs it, the others do not look at it.
        interpret: run `splash`, `pallas` and `cudnn` without their hardware, slowly, for tests.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention implementation {implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if implementation == "cudnn" and sequences is None:
        raise ValueError("attention implementation 'cudnn' must be told `sequences`, how many responses a row may hold")

    def local(key_end: Array, positions: Array) -> tuple[Any, ...]:
        if implementation == "dense":
            return ()
        if implementation == "cudnn":
            from jax_simpo.ops.attention import cudnn

            assert sequences is not None
            return (cudnn.prepare(key_end, positions, sequences=sequences),) * len(windows)
        if implementation == "blockwise":
            prepare: Any = blockwise.find_live_blocks
        elif implementation == "splash":
            from jax_simpo.ops.attention import splash

            prepare = splash.prepare
        else:
            from jax_simpo.ops.attention.pallas import kernel

            prepare = kernel.prepare
        return tuple(prepare(key_end, positions, window) for window in windows)

    by_row = P(RULES["batch"])
    if not jax.sharding.get_abstract_mesh().empty:
        local = jax.shard_map(local, in_specs=(by_row, by_row), out_specs=by_row, check_vma=False)
    return Mask(key_end, positions, local(key_end, positions), windows, implementation, interpret)


def visible(
    key_end: Int[Array, "B L"], positions: Int[Array, "B L"], window: int | None = None
) -> Bool[Array, "B L L"]:
    """The whole mask, `[row, query, key]`: the rule of the module docstring written out."""
    index = jnp.arange(key_end.shape[-1])
    query, key = index[:, None], index[None, :]
    see = (key <= query) & (query < key_end[:, None, :])
    if window is not None:
        see &= positions[:, :, None] - positions[:, None, :] < window
    return see
