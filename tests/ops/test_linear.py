"""The product of activations with weights in 16 bits, whose backward pass is written by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_simpo.ops.linear import linear


@pytest.mark.parametrize("shape", [(1, 128, 64, 96), (3, 7, 16, 8), (2, 130, 100, 64)])
def test_16_bit_products_and_gradients_are_the_float32_ones_rounded_once(shape: tuple[int, int, int, int]) -> None:
    rows, length, inner, outer = shape
    keys = jax.random.split(jax.random.key(sum(shape)), 3)
    x, w, dy = (
        jax.random.normal(key, size).astype(jnp.bfloat16)
        for key, size in zip(keys, ((rows, length, inner), (inner, outer), (rows, length, outer)), strict=True)
    )
    found, pull = jax.vjp(jax.jit(linear), x, w)
    wide = [a.astype(jnp.float32) for a in (x, w, dy)]
    with jax.default_matmul_precision("highest"):
        oracle, pull_oracle = jax.vjp(lambda a, b: jnp.einsum("bli,io->blo", a, b), *wide[:2])
    for ours, theirs in zip((found, *pull(dy)), (oracle, *pull_oracle(wide[2])), strict=True):
        assert ours.dtype == jnp.bfloat16
        # Half a unit in the last of 8 places, and a little for another order of summation.
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs, rtol=2**-8, atol=1e-4)
