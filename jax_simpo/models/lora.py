"""LoRA adapters: instead of a linear layer's kernel, the product of two thin matrices beside it is trained.

`y = x @ kernel + alpha / rank * (x @ a) @ b` (Hu et al., arXiv 2106.09685), as peft computes it. An adapter's
parameters are stored next to the kernel, under the key `adapter`; all other parameters are the base.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jax_simpo.ops.linear import linear, product
from jax_simpo.ops.numerics import matmul_precision
from jax_simpo.sharding import gather_parameter

ADAPTER_KEY = "adapter"  # names an adapter's parameters in the dict of their linear layer


@dataclass(frozen=True)
class Lora:
    """The linear layers that have an adapter, and the adapter's size.

    Attributes:
        rank: the rank of the product of the two matrices.
        alpha: the product is scaled by `alpha / rank`.
        targets: the linear layers, by their paths in a decoder layer ("attention/q").
    """

    rank: int
    alpha: int | float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        """The factor of the matrices' product."""
        return self.alpha / self.rank


class Adapter(nnx.Module):
    """Computes the term that is added to a linear layer's output: `scale * (x @ a) @ b`.

    As in peft, `a` is drawn at random and `b` is zero. Each matrix is split over the mesh along the axis that it shares
    with the kernel.
    """

    def __init__(self, lora: Lora, axes: tuple[str, str], sizes: tuple[int, int], rngs: nnx.Rngs) -> None:
        bound = sizes[0] ** -0.5  # peft's kaiming_uniform_(a=sqrt(5))
        a = jax.random.uniform(rngs.adapters(), (sizes[0], lora.rank), minval=-bound, maxval=bound)
        self.a = nnx.Param(a, axes=(axes[0], None))
        self.b = nnx.Param(jnp.zeros((lora.rank, sizes[1])), axes=(None, axes[1]))
        self.scale = lora.scale

    def __call__(self, x: Float[Array, "B L In"]) -> Float[Array, "B L Out"]:
        a, b = (gather_parameter(param[...], x.dtype, *param.axes) for param in (self.a, self.b))
        # `linear` lets the backward pass keep the thin product; `product` recomputes the wide one, which is cheap.
        return product(linear(x, a), b) * self.scale


def merged(
    kernel: Float[Array, "In Out"], a: Float[Array, "In R"], b: Float[Array, "R Out"], scale: Any
) -> Float[Array, "In Out"]:
    """Returns the float32 kernel of a linear layer that computes the same as `kernel` with its adapter."""
    update = jnp.matmul(a, b, precision=matmul_precision(jnp.dtype(jnp.float32)))
    return kernel.astype(jnp.float32) + scale * update


def split(params: Any) -> tuple[Any, Any]:
    """Splits a model's nested dict into the adapters and the base. Either may be empty."""
    adapters: dict[str, Any] = {}
    base: dict[str, Any] = {}
    for key, value in params.items():
        if key == ADAPTER_KEY:
            adapters[key] = value
        elif isinstance(value, dict):
            inner_adapters, inner_base = split(value)
            adapters |= {key: inner_adapters} if inner_adapters else {}
            base |= {key: inner_base} if inner_base else {}
        else:
            base[key] = value
    return adapters, base


def join(adapters: Any, base: Any) -> Any:
    """Joins the two dicts that `split` returns."""
    entries = {**base, **adapters}
    return {key: join(adapters[key], base[key]) if key in adapters and key in base else entries[key] for key in entries}
