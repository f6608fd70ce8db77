"""The product of activations with a weight matrix, forwards and backwards, in the form each platform is fast at."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jax_simpo.ops.numerics import SAVED_PRODUCT, matmul_precision


def linear(x: Float[Array, "B L In"], w: Float[Array, "In Out"]) -> Float[Array, "B L Out"]:
    """`x @ w` in their common dtype: sums in float32, rounded once. Rematerialisation may keep it."""
    return checkpoint_name(product(x, w), SAVED_PRODUCT)


@jax.custom_vjp
def product(x: Float[Array, "B L In"], w: Float[Array, "In Out"]) -> Float[Array, "B L Out"]:
    """`linear`, but made again in the backward pass wherever anything is."""
    return _einsum("bli,io->blo", x, w)


def _forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return product(x, w), (x, w)


def _backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = saved
    return _einsum("blo,io->bli", dy, w), _weight_gradient(x, dy)


product.defvjp(_forward, _backward)


def _weight_gradient(x: Array, dy: Array) -> Array:
    """`x.T @ dy`. XLA's CPU products want the left operand transposed and write it so: let that be the narrower one."""
    straight = partial(_einsum, "bli,blo->io")
    if x.dtype != jnp.float32 or x.shape[-1] < dy.shape[-1]:
        return straight(x, dy)

    def swapped(x: Array, dy: Array) -> Array:
        # Without a barrier XLA swaps the operands back.
        return jax.lax.optimization_barrier(_einsum("blo,bli->oi", dy, x)).T

    return jax.lax.platform_dependent(x, dy, cpu=swapped, default=straight)


def _einsum(subscripts: str, a: Array, b: Array) -> Array:
    """The product in its operands' dtype, its sums in float32.

    On a CPU, XLA takes the matrix units of 16-bit numbers only where it is asked for a float32 result. Elsewhere asking
    for one would write it to memory before it is rounded.
    """
    narrow = partial(jnp.einsum, subscripts, precision=matmul_precision(a.dtype))
    if a.dtype == jnp.float32:
        return narrow(a, b)

    def wide(a: Array, b: Array) -> Array:
        product = jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)
        # Folded into the product, a transposition that follows makes a form of it that XLA cannot run.
        return jax.lax.optimization_barrier(product).astype(a.dtype)

    return jax.lax.platform_dependent(a, b, cpu=wide, default=narrow)
