"""Attention of new tokens over keys and values that were computed before: what a decoding step computes.

Training attends within a row, under a `Mask`. Here the queries are a few new tokens per sequence, usually one, and most
keys are stored. Several sequences may share stored keys: the samples of a prompt read the prompt's, which are in memory
once. A query sees the keys whose position is no later than its own; a sliding window adds
`query position - key position < window`. So an empty place is one whose position is `NOWHERE`, later than any query's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jax_simpo.ops.attention.backends import ScoreRule
from jax_simpo.ops.numerics import LOWEST, matmul_precision
from jax_simpo.sharding import RULES

NOWHERE = 2**30  # the position of a place that holds no key


class StoredKeys(NamedTuple):
    """The stored keys and values of one layer, for S sequences with C places each. Heads come before places, so that
    products with them copy nothing.

    Attributes:
        k: rotated keys.
        v: values.
        positions: int32 position of each key; `NOWHERE` where there is none.
    """

    k: Float[Array, "S K C Dh"]
    v: Float[Array, "S K C Dh"]
    positions: Int[Array, "S C"]


def cached_attention(
    q: Float[Array, "B L H Dh"],
    k: Float[Array, "B L K Dh"],
    v: Float[Array, "B L K Dh"],
    positions: Int[Array, "B L"],
    stored: Sequence[StoredKeys],
    rule: ScoreRule,
) -> Float[Array, "B L H Dh"]:
    """Computes attention over stored keys and the new tokens' own; the result has q's dtype.

    The softmax is computed in float32. Under the mesh of `jax.set_mesh` sequences are split over `batch` and heads over
    `heads`, and devices do not talk to each other.

    Args:
        q: rotated queries of the new tokens; head `h` reads key/value head `h // (H / K)`.
        k: their rotated keys.
        v: their values.
        positions: int32 positions of the new tokens.
        stored: stored keys; where they are of S sequences, sequence `b` reads those of `b // (B / S)`.
        rule: scale, window and soft cap.
    """

    def attend(q: Array, k: Array, v: Array, positions: Array, stored: Sequence[StoredKeys]) -> Array:
        own = StoredKeys(k.swapaxes(1, 2), v.swapaxes(1, 2), positions)
        return _attend(q, positions, [*stored, own], rule)

    if jax.sharding.get_abstract_mesh().empty:
        return attend(q, k, v, positions, stored)
    batch, heads = RULES["batch"], RULES["heads"]
    new: Any = P(batch, None, heads, None)
    old: Any = P(batch, heads)
    where: Any = P(batch)
    sharded = jax.shard_map(
        attend,
        in_specs=(new, new, new, P(batch), [StoredKeys(old, old, where)] * len(stored)),
        out_specs=new,
        check_vma=False,
    )
    return sharded(q, k, v, positions, list(stored))


def _attend(q: Array, positions: Array, parts: Sequence[StoredKeys], rule: ScoreRule) -> Array:
    """Computes one softmax over the keys of all parts. G queries, H / K heads, read one key/value head."""
    rows, length, heads, width = q.shape
    kv_heads = parts[0].k.shape[1]
    grouped = jnp.moveaxis(q.reshape(rows, length, kv_heads, heads // kv_heads, width), 1, 3)
    scores = [_scores(grouped, positions, part, rule) for part in parts]
    # A new token sees at least its own key, so no maximum is that of an empty set.
    most = jnp.stack([x.max(-1) for x in scores]).max(0)[..., None]
    weights = [jnp.exp(x - most) for x in scores]
    total = sum(x.sum(-1, keepdims=True) for x in weights)
    sums = [_product(x.astype(part.v.dtype), part.v) for x, part in zip(weights, parts, strict=True)]
    return jnp.moveaxis(sum(sums) / total, 3, 1).reshape(q.shape).astype(q.dtype)


def _scores(
    q: Float[Array, "B K G L Dh"], positions: Int[Array, "B L"], part: StoredKeys, rule: ScoreRule
) -> Float[Array, "B K G L C"]:
    scores = rule.scale * _product(q, part.k.swapaxes(2, 3))
    if rule.softcap is not None:
        scores = rule.softcap * jnp.tanh(scores / rule.softcap)
    of_keys = jnp.repeat(part.positions, len(q) // len(part.k), axis=0)
    distance = positions[:, :, None] - of_keys[:, None]
    seen = distance >= 0 if rule.window is None else (distance >= 0) & (distance < rule.window)
    return jnp.where(seen[:, None, None], scores, LOWEST)


def _product(x: Float[Array, "B K G L X"], y: Float[Array, "S K X Y"]) -> Float[Array, "B K G L Y"]:
    """Multiplies what belongs to new tokens with what is stored, float32: one product per sequence and head."""
    rows, heads, groups, length, _ = x.shape
    sequences, each = len(y), rows // len(y)
    # In this form, with the rows of a sequence side by side, XLA multiplies 16-bit numbers on a CPU too.
    joined = x.reshape(sequences, each, heads, groups * length, -1).swapaxes(1, 2)
    joined = joined.reshape(sequences, heads, each * groups * length, -1)
    out = jnp.einsum(
        "skmx,skxy->skmy", joined, y, precision=matmul_precision(y.dtype), preferred_element_type=jnp.float32
    )
    return out.reshape(sequences, heads, each, groups * length, -1).swapaxes(1, 2).reshape(*x.shape[:4], -1)
