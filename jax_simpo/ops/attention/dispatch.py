"""The two functions that models call: one prepares the mask of a batch, one computes attention under it.

Both hand over to the backend that the mask names. Under a mesh each device prepares the mask of its own rows and
computes its own rows and heads, without talking to other devices.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jax_simpo.ops.attention.backends import ScoreRule, load_backend
from jax_simpo.ops.attention.mask import Mask, Room
from jax_simpo.sharding import RULES


def prepare_mask(
    key_end: Int[Array, "B L"],
    positions: Int[Array, "B L"],
    windows: tuple[int | None, ...] = (None,),
    backend: str = "blockwise",
    *,
    room: Room | None = None,
    interpret: bool = False,
) -> Mask:
    """Makes the mask of a batch, once, outside the loop over layers.

    Args:
        key_end: int32, end (exclusive) of the queries that see each key; 0 for padding.
        positions: int32 RoPE positions, counted in each response's own sequence.
        windows: the distinct sliding windows (in positions) of the model's layers; `None` is full attention.
        backend: one of `backends.BACKENDS`.
        room: bounds of what a row may hold; needed by `cudnn`, and what makes `banded` cheaper than `dense`.
        interpret: run `splash`, `pallas`, `triton` and `cudnn` without their hardware, slowly, for tests.

    Raises:
        ValueError: the backend is unknown, or needs `room`.
    """
    prepare = load_backend(backend).prepare

    def prepare_tables(key_end: Array, positions: Array) -> tuple[Any, ...]:
        mask = Mask(key_end, positions, (), windows, backend, room, interpret)
        return tuple(prepare(mask, window) for window in windows)

    if not jax.sharding.get_abstract_mesh().empty:
        by_row = P(RULES["batch"])
        prepare_tables = jax.shard_map(prepare_tables, in_specs=(by_row, by_row), out_specs=by_row, check_vma=False)
    tables = prepare_tables(key_end, positions)
    return Mask(key_end, positions, tables, windows, backend, room, interpret)


def prepare_causal_mask(
    positions: Int[Array, "B L"],
    windows: tuple[int | None, ...] = (None,),
    backend: str = "blockwise",
    *,
    interpret: bool = False,
) -> Mask:
    """Makes the mask of rows that hold one sequence each, as long as the row; see `prepare_mask`."""
    key_end = jnp.full_like(positions, positions.shape[1])
    room = Room(1, positions.shape[1], positions.shape[1])
    return prepare_mask(key_end, positions, windows, backend, room=room, interpret=interpret)


def attention(
    q: Float[Array, "B L H Dh"],
    k: Float[Array, "B L K Dh"],
    v: Float[Array, "B L K Dh"],
    mask: Mask,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Float[Array, "B L H Dh"]:
    """Computes grouped-query attention under the mask; the result has q's dtype, and padding gives zeros.

    The softmax is computed in float32. Under the mesh of `jax.set_mesh` rows are split over `batch` and heads over
    `heads`.

    Args:
        q: queries; head `h` reads key/value head `h // (H / K)`.
        k: keys.
        v: values.
        mask: of `prepare_mask`.
        scale: factor on the scores.
        window: sliding window in positions, one of `mask.windows`; `None` for none.
        softcap: `softcap * tanh(score / softcap)` after the scale and before the mask, `None` for none.
    """
    backend, rule = load_backend(mask.backend), ScoreRule(float(scale), window, softcap)

    def attend(q: Array, k: Array, v: Array, mask: Mask) -> Array:
        return backend.attend(q, k, v, mask, rule)

    if jax.sharding.get_abstract_mesh().empty:
        return attend(q, k, v, mask)
    by_head = P(RULES["batch"], None, RULES["heads"], None)
    sharded = jax.shard_map(
        attend, in_specs=(by_head, by_head, by_head, P(RULES["batch"])), out_specs=by_head, check_vma=False
    )
    return sharded(q, k, v, mask)
