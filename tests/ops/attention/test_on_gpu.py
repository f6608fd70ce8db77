"""Tests attention backends on the hardware, at their own sizes; each is skipped where it cannot run."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from jax_simpo.ops.attention import attention, prepare_mask
from jax_simpo.ops.attention.backends import load_backend, variants_of
from jax_simpo.ops.attention.choice import place_of
from jax_simpo.ops.attention.oracle import Node, RowMask, write_rows
from jax_simpo.ops.attention.triton.backend import HEAD_SIZES

pytestmark = [
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU"),
    # jax 0.11 and later announce that the lowering will go.
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated"),
]
LENGTH, HEADS, KV_HEADS = 1000, 8, 2  # no multiple of a block
ARRAYS = ("out", "dq", "dk", "dv")
# The largest distances from float32, in those of `dense` in bfloat16. In float32 `pallas` uses 16 bits, 256 times finer
# than bfloat16, and the others all, some 60,000 times finer; sums over a row lose a part of that.
BOUNDS = {"bfloat16": {}, "float32": {"pallas": 1 / 30, "triton": 1 / 1000, "banded": 1 / 1000}}


@cache
def packed_rows() -> RowMask:
    """Returns two rows: packed pairs with shared prompts, then padding; and one pair that fills its row."""

    def pair(prompt: int, chosen: int, rejected: int) -> Node:
        return Node(prompt, (Node(chosen), Node(rejected)))

    return write_rows([[pair(130, 70, 90), pair(20, 200, 1), pair(5, 100, 256)], [pair(500, 250, 250)]], LENGTH)


def inputs(width: int, kv_heads: int, dtype: str) -> list[Array]:
    """Returns q, k, v and the gradient of the result."""
    keys = jax.random.split(jax.random.key(width), 4)
    counts = (HEADS, kv_heads, kv_heads, HEADS)
    return [
        jax.random.normal(key, (2, LENGTH, heads, width)).astype(dtype) for key, heads in zip(keys, counts, strict=True)
    ]


def run(backend: str, arrays: list[Array], window: int | None, softcap: float | None) -> list[np.ndarray]:
    """Returns the result and the gradients."""
    *qkv, cotangent = arrays
    rows, scale = packed_rows(), qkv[0].shape[-1] ** -0.5
    key_end, positions = jnp.asarray(rows.key_end), jnp.asarray(rows.positions)
    mask = prepare_mask(key_end, positions, (window,), backend, room=rows.room)

    @jax.jit
    def attend(q: Array, k: Array, v: Array) -> Array:
        return attention(q, k, v, mask, scale=scale, window=window, softcap=softcap)

    out, pull = jax.vjp(attend, *qkv)
    return [np.asarray(x, np.float64) for x in (out, *pull(cotangent))]


@pytest.mark.parametrize("backend", BOUNDS["float32"])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("kv_heads", [KV_HEADS, HEADS])
@pytest.mark.parametrize(("dtype", "width"), [(d, w) for d, widths in HEAD_SIZES.items() for w in widths])
def test_values_and_gradients_are_as_near_to_float32_as_those_of_dense(
    dtype: str, width: int, kv_heads: int, window: int | None, softcap: float | None, backend: str
) -> None:
    if obstacle := load_backend(backend).obstacle(place_of(dtype=dtype, head_dim=width, softcap=softcap)):
        pytest.skip(f"{backend} {obstacle}")
    arrays = inputs(width, kv_heads, dtype)
    exact = run("dense", [x.astype(jnp.float32) for x in arrays], window, softcap)
    rounded = run("dense", [x.astype(jnp.bfloat16) for x in arrays], window, softcap)
    bound = BOUNDS[dtype].get(backend, 1.5)
    for name, ours, dense, oracle in zip(ARRAYS, run(backend, arrays, window, softcap), rounded, exact, strict=True):
        distance, of_dense = (np.sqrt(np.mean((x - oracle) ** 2)) for x in (ours, dense))
        assert distance <= bound * of_dense, name


@pytest.mark.parametrize("variant", variants_of("pallas"))
def test_every_variant_computes_what_the_default_does(variant: str) -> None:
    """The products are the same and summed in the same order, so only the rounding of the weights may differ."""
    if obstacle := load_backend("pallas").obstacle(place_of(dtype="bfloat16", head_dim=128)):
        pytest.skip(f"pallas {obstacle}")
    arrays = inputs(128, KV_HEADS, "bfloat16")
    default, other = (run(name, arrays, 100, None) for name in ("pallas", f"pallas+{variant}"))
    for name, a, b in zip(ARRAYS, default, other, strict=True):
        distance, size = (np.sqrt(np.mean(x**2)) for x in (a - b, a))
        assert distance <= 2**-8 * size, name
