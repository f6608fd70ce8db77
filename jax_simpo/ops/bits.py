"""Slices 16-bit floats on a CPU by slicing their bits.

If a loop slices an array of 16-bit floats, XLA's CPU backend converts all of it to float32 before the loop: a stack of
bfloat16 parameters would be in memory a second time, twice as large. Integers are sliced as they are.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped


def on_cpu() -> bool:
    """Returns True if the program is made for a CPU; a mesh knows, even if its devices are not on this machine."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (jax.default_backend() if device is None else device.platform) == "cpu"


def sliced_as_bits(x: Shaped[Array, "*S"]) -> bool:
    """Returns True if `slice_in_loop` slices the bits: of a bfloat16 or float16 array on a CPU."""
    return x.dtype in (jnp.bfloat16, jnp.float16) and on_cpu()


def slice_in_loop(x: Float[Array, "N *S"], start: Int[Array, ""], size: int) -> Float[Array, "M *S"]:
    """Returns `jax.lax.dynamic_slice_in_dim(x, start, size)`, in a loop that changes `start`; never copies all of `x`.

    The slice has no gradient where `sliced_as_bits(x)`: pass such an array through `without_gradient` first.
    """
    if size == len(x):
        return x
    if not sliced_as_bits(x):
        return jax.lax.dynamic_slice_in_dim(x, start, size)
    # The barrier ties the bits to the loop variable `start`. Otherwise XLA would copy all of them before the loop.
    x, start = jax.lax.optimization_barrier((x, start))
    bits = jax.lax.dynamic_slice_in_dim(jax.lax.bitcast_convert_type(x, jnp.uint16), start, size)
    return jax.lax.bitcast_convert_type(bits, x.dtype)


@jax.custom_jvp
def without_gradient(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """Returns the same array and forbids to differentiate it, since bits have no gradient.

    Silently returning zeros would corrupt training.

    Raises:
        TypeError: the array is differentiated.
    """
    return x


@without_gradient.defjvp
def _refuse(primals: tuple[Array], tangents: tuple[Array]) -> Any:
    raise TypeError(
        f"a gradient was asked for with respect to {primals[0].dtype} parameters, whose bits are sliced on a CPU: only "
        "frozen parameters may be 16 bits wide. Differentiate with respect to float32 ones"
    )
