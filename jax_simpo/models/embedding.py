"""Token lookup in an embedding table that is split over the mesh, without gathering the table.

The table is split by columns (`embed` over fsdp) and by rows (`vocab` over tensor). Each device looks up its own
columns for the tokens of its whole fsdp group, then one all-to-all gives every device all columns of its own rows; the
gradient takes the same way back. So what travels is a few thousand hidden states, not a table of 128 thousand, and no
device ever holds more of the table, or of its gradient, than its own part.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jax_simpo.sharding import RULES, all_gather, all_to_all, psum, spec

_COLUMNS, _ROWS = str(RULES["embed"]), str(RULES["vocab"])
_BATCH = P(RULES["batch"])


def lookup(table: Float[Array, "V D"], tokens: Int[Array, "B L"], dtype: Any) -> Float[Array, "B L D"]:
    """The table's row of each token, in `dtype`; a token outside the vocabulary gives NaN."""
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
    tokens = all_gather(tokens, _COLUMNS, 0)
    index, mine = _local_index(table, tokens)
    columns = jnp.where(mine, table[jnp.where(mine[..., 0], index, 0)], 0).astype(dtype)
    columns = psum(columns, _ROWS)  # all but one of the parts are zero
    known = (tokens >= 0) & (tokens < vocabulary)
    columns = jnp.where(known[..., None], columns, jnp.nan)
    return all_to_all(columns, _COLUMNS, split=0, join=2)


def _local_gradient(table: Array, tokens: Array, dx: Array) -> Array:
    tokens = all_gather(tokens, _COLUMNS, 0)
    columns = all_to_all(dx, _COLUMNS, split=2, join=0)
    index, mine = _local_index(table, tokens)
    columns = jnp.where(mine, columns.astype(table.dtype), 0)
    gradient = jnp.zeros_like(table).at[jnp.where(mine[..., 0], index, 0)].add(columns)
    return psum(gradient, "data")


def _local_index(table: Array, tokens: Array) -> tuple[Array, Array]:
    """Row of this device's part of the table, and whether the token lies in it (with a last axis of one)."""
    index = tokens - jax.lax.axis_index(_ROWS) * len(table)
    return index, ((index >= 0) & (index < len(table)))[..., None]
