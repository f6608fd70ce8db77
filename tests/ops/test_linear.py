"""Tests the product of activations with weights, whose backward pass is written by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_simpo.ops.linear import linear


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(1, 128, 64, 96), (3, 7, 16, 8), (2, 130, 100, 64), (2, 9, 24, 24)])
def test_products_and_gradients_are_those_of_float64_rounded_once(
    shape: tuple[int, int, int, int], dtype: jnp.dtype
) -> None:
    rows, length, inner, outer = shape
    keys = jax.random.split(jax.random.key(sum(shape)), 3)
    x, w, dy = (
        jax.random.normal(key, size).astype(dtype)
        for key, size in zip(keys, ((rows, length, inner), (inner, outer), (rows, length, outer)), strict=True)
    )
    out, pull = jax.vjp(jax.jit(linear), x, w)
    wide_x, wide_w, wide_dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    oracles = wide_x @ wide_w, wide_dy @ wide_w.T, np.einsum("bli,blo->io", wide_x, wide_dy)
    # bfloat16: half a unit in the last of 8 places, and a little for the order of summation; float32: only the latter.
    rtol, atol = (1e-5, 1e-5) if dtype == jnp.float32 else (2**-8, 1e-4)
    for ours, oracle in zip((out, *pull(dy)), oracles, strict=True):
        assert ours.dtype == dtype
        np.testing.assert_allclose(np.asarray(ours, np.float64), oracle, rtol=rtol, atol=atol)
