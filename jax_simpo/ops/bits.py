"""Slices of 16-bit floats on a CPU, where XLA has none: their bits are sliced instead.

XLA's CPU backend converts an array of 16-bit floats that a loop slices to float32, the whole of it, before the loop: a
stack of bfloat16 parameters would lie in memory a second time, twice as large. Integers it slices as they are.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped


def on_cpu() -> bool:
    """Whether the program is made for a CPU; the mesh knows, for its devices need not be here."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (jax.default_backend() if device is None else device.platform) == "cpu"


def sliced_as_bits(x: Shaped[Array, "*S"]) -> bool:
    """Whether `slice_in_loop` takes slices of the bits: of a bfloat16 or float16 array on a CPU."""
    return x.dtype in (jnp.bfloat16, jnp.float16) and on_cpu()


def slice_in_loop(x: Float[Array, "N *S"], start: Int[Array, ""], size: int) -> Float[Array, "M *S"]:
    """`jax.lax.dynamic_slice_in_dim(x, start, size)` in a loop that changes `start`; it never copies all of `x`.

    It has no gradient where `sliced_as_bits(x)`: see `without_gradient`.
    """
    if size == len(x):
        return x
    if not sliced_as_bits(x):
        return jax.lax.dynamic_slice_in_dim(x, start, size)
    # Tied to the number of the round, the bits are taken in the loop. XLA would make a copy of all of them before it.
    x, start = jax.lax.optimization_barrier((x, start))
    bits = jax.lax.dynamic_slice_in_dim(jax.lax.bitcast_convert_type(x, jnp.uint16), start, size)
    return jax.lax.bitcast_convert_type(bits, x.dtype)


@jax.custom_jvp
def without_gradient(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """The same array, of which bits are sliced: they have no gradient, and nobody shall get zeros instead.

    Raises:
        TypeError: it is differentiated.
    """
    return x


@without_gradient.defjvp
def _refuse(primals: tuple[Array], tangents: tuple[Array]) -> Any:
    raise TypeError(
        f"a gradient was asked for with respect to {primals[0].dtype} parameters, of which a CPU slices the bits: only "
        "frozen parameters may be 16 bits wide. Differentiate with respect to float32 ones"
    )
