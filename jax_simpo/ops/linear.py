"""Multiplies activations with a weight matrix, forward and backward, in the form that is fast on each platform."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jax_simpo.ops.numerics import SAVED_PRODUCT, matmul_precision


def linear(x: Float[Array, "B L In"], w: Float[Array, "In Out"]) -> Float[Array, "B L Out"]:
    """Returns `x @ w` in their common dtype: sums in float32, rounded once.

    A rematerialisation policy may keep the product, by the name `SAVED_PRODUCT`.
    """
    return checkpoint_name(product(x, w), SAVED_PRODUCT)


@jax.custom_vjp
def product(x: Float[Array, "B L In"], w: Float[Array, "In Out"]) -> Float[Array, "B L Out"]:
    """Computes `linear` without the name, so that no rematerialisation policy keeps the product."""
    return _einsum("bli,io->blo", x, w)


def _forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return product(x, w), (x, w)


def _backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = saved
    return _einsum("blo,io->bli", dy, w), _weight_gradient(x, dy)


product.defvjp(_forward, _backward)


def _weight_gradient(x: Array, dy: Array) -> Array:
    """Returns `x.T @ dy`. On a CPU, XLA writes a transposed copy of the left operand, so that is the narrower one."""
    straight = partial(_einsum, "bli,blo->io")
    if x.dtype != jnp.float32 or x.shape[-1] < dy.shape[-1]:
        return straight(x, dy)

    def swapped(x: Array, dy: Array) -> Array:
        # Without a barrier XLA swaps the operands back.
        return jax.lax.optimization_barrier(_einsum("blo,bli->oi", dy, x)).T

    return jax.lax.platform_dependent(x, dy, cpu=swapped, default=straight)


def _einsum(subscripts: str, a: Array, b: Array) -> Array:
    """Returns the product in its operands' dtype, with sums in float32.

    On a CPU, XLA uses the matrix units of 16-bit numbers only for products with a float32 result. On other platforms
    such a result would be written to memory before it is rounded.
    """
    narrow = partial(jnp.einsum, subscripts, precision=matmul_precision(a.dtype))
    if a.dtype == jnp.float32:
        return narrow(a, b)

    def wide(a: Array, b: Array) -> Array:
        product = jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)
        # The barrier keeps a transposition that follows out of the product: XLA cannot run that form.
        return jax.lax.optimization_barrier(product).astype(a.dtype)

    return jax.lax.platform_dependent(a, b, cpu=wide, default=narrow)
