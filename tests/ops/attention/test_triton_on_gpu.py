"""Tests `triton` and `banded` on the hardware, at their own sizes; skipped where there is no GPU that can run them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_simpo.ops.attention import attention, prepare_mask
from jax_simpo.ops.attention.backends import load_backend
from jax_simpo.ops.attention.choice import place_of
from jax_simpo.ops.attention.triton.backend import HEAD_SIZES
from tests.ops.attention.test_pallas_on_gpu import HEADS, KV_HEADS, LENGTH, packed_rows

pytestmark = [
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU"),
    # jax 0.11 and later announce that the lowering will go.
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated"),
]


@pytest.mark.parametrize("backend", ["triton", "banded"])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (100, None), (100, 5.0)])
@pytest.mark.parametrize("kv_heads", [KV_HEADS, HEADS])
@pytest.mark.parametrize(("dtype", "width"), [(d, w) for d, widths in HEAD_SIZES.items() for w in widths])
def test_values_and_gradients_are_as_near_to_float32_as_those_of_dense(
    dtype: str, width: int, kv_heads: int, window: int | None, softcap: float | None, backend: str
) -> None:
    if obstacle := load_backend(backend).obstacle(place_of(dtype=dtype, head_dim=width, softcap=softcap)):
        pytest.skip(f"{backend} {obstacle}")
    key_end, positions = packed_rows()
    keys = jax.random.split(jax.random.key(width), 4)
    q, k, v, dout = (
        jax.random.normal(key, (2, LENGTH, heads, width)).astype(dtype)
        for key, heads in zip(keys, (HEADS, kv_heads, kv_heads, HEADS), strict=True)
    )

    def run(backend: str, *arrays: jax.Array) -> list[np.ndarray]:
        *inputs, cotangent = arrays
        mask = prepare_mask(key_end, positions, (window,), backend)
        attend = lambda q, k, v: attention(q, k, v, mask, scale=width**-0.5, window=window, softcap=softcap)  # noqa: E731
        out, pull = jax.vjp(jax.jit(attend), *inputs)
        return [np.asarray(a, np.float64) for a in (out, *pull(cotangent))]

    exact = run("dense", *(a.astype(jnp.float32) for a in (q, k, v, dout)))
    rounded = run("dense", *(a.astype(jnp.bfloat16) for a in (q, k, v, dout)))
    for name, ours, dense, oracle in zip(
        ("out", "dq", "dk", "dv"), run(backend, q, k, v, dout), rounded, exact, strict=True
    ):
        distance, bound = (np.sqrt(np.mean((a - oracle) ** 2)) for a in (ours, dense))
        # float32 is exact to its last bits, some 60,000 times finer than bfloat16; sums over a row lose a part of that.
        assert distance <= (1.5 * bound if dtype == "bfloat16" else bound / 1000), name
