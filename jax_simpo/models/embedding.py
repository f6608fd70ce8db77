"""Looks up tokens in an embedding table that is split over the mesh, without gathering the table.

The table is split by columns (`embed` over fsdp) and by rows (`vocab` over tensor). Each device looks up its own
columns for the tokens of its whole fsdp group; then one all-to-all gives every device all columns of its own batch
rows. The gradient goes the same way back. So the devices exchange a few thousand hidden states instead of a table of
128 thousand, and no device holds more of the table, or of its gradient, than its own part.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jax_simpo.sharding import RULES, all_gather, all_to_all, psum, spec

_COLUMN_AXIS, _ROW_AXIS = str(RULES["embed"]), str(RULES["vocab"])
_BATCH = P(RULES["batch"])


def lookup(table: Float[Array, "V D"], tokens: Int[Array, "B L"], dtype: Any) -> Float[Array, "B L D"]:
    """Returns the table's row of each token, in `dtype`; a token outside the vocabulary gives NaN."""
    if jax.sharding.get_abstract_mesh().empty:
        return jnp.take(table, tokens, axis=0).astype(dtype)
    return _lookup(dtype, table, tokens)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lookup(dtype: Any, table: Array, tokens: Array) -> Array:
    local = partial(_local_lookup, dtype, len(table))
    return jax.shard_map(local, in_specs=(spec("vocab", "embed"), _BATCH), out_specs=_BATCH, check_vma=False)(
        table, tokens
    )


def _forward(dtype: Any, table: Array, tokens: Array) -> tuple[Array, tuple[Array, Array]]:
    return _lookup(dtype, table, tokens), (table, tokens)


def _backward(dtype: Any, saved: tuple[Array, Array], dx: Array) -> tuple[Array, None]:
    table_spec = spec("vocab", "embed")
    local = jax.shard_map(_local_gradient, in_specs=(table_spec, _BATCH, _BATCH), out_specs=table_spec, check_vma=False)
    return local(*saved, dx), None


_lookup.defvjp(_forward, _backward)


def _local_lookup(dtype: Any, vocabulary: int, table: Array, tokens: Array) -> Array:
    tokens = all_gather(tokens, _COLUMN_AXIS, 0)
    index, is_local = _local_index(table, tokens)
    columns = jnp.where(is_local, table[jnp.where(is_local[..., 0], index, 0)], 0).astype(dtype)
    columns = psum(columns, _ROW_AXIS)  # the parts are zero on all devices but one
    known = (tokens >= 0) & (tokens < vocabulary)
    columns = jnp.where(known[..., None], columns, jnp.nan)
    return all_to_all(columns, _COLUMN_AXIS, split=0, join=2)


def _local_gradient(table: Array, tokens: Array, dx: Array) -> Array:
    tokens = all_gather(tokens, _COLUMN_AXIS, 0)
    columns = all_to_all(dx, _COLUMN_AXIS, split=2, join=0)
    index, is_local = _local_index(table, tokens)
    columns = jnp.where(is_local, columns.astype(table.dtype), 0)
    gradient = jnp.zeros_like(table).at[jnp.where(is_local[..., 0], index, 0)].add(columns)
    return psum(gradient, "data")


def _local_index(table: Array, tokens: Array) -> tuple[Array, Array]:
    """Returns each token's row in this device's part of the table, and True [B, L, 1] where the part has that row."""
    index = tokens - jax.lax.axis_index(_ROW_AXIS) * len(table)
    return index, ((index >= 0) & (index < len(table)))[..., None]
