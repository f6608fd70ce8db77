"""LoRA: beside a frozen linear layer, the product of two thin matrices that are trained in its place.

`y = x @ kernel + alpha / rank * (x @ a) @ b` (Hu et al., arXiv 2106.09685), as peft has it. An adapter's parameters lie
next to the kernel's, under the key `adapter`; everything else of the model is its base.
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

KEY = "adapter"  # of an adapter's parameters, in the dict of their linear layer


@dataclass(frozen=True)
class Lora:
    """Which linear layers have an adapter, and of what size.

    Attributes:
        rank: of the product of the two matrices.
        alpha: the product is scaled by `alpha / rank`.
        targets: the linear layers, by their paths in a decoder layer ("attention/q").
    """

    rank: int
    alpha: int | float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        """What the product of the matrices is multiplied by."""
        return self.alpha / self.rank


class Adapter(nnx.Module):
    """What is added to a linear layer's output. Its matrices are drawn as peft draws them: the second one is zero.

    They are split over the mesh as the kernel is, along the axis that they have in common with it.
    """

    def __init__(self, lora: Lora, axes: tuple[str, str], sizes: tuple[int, int], rngs: nnx.Rngs) -> None:
        bound = sizes[0] ** -0.5  # Kaiming's uniform distribution with a = sqrt(5)
        a = jax.random.uniform(rngs.adapters(), (sizes[0], lora.rank), minval=-bound, maxval=bound)
        self.a = nnx.Param(a, axes=(axes[0], None))
        self.b = nnx.Param(jnp.zeros((lora.rank, sizes[1])), axes=(None, axes[1]))
        self.scale = lora.scale

    def __call__(self, x: Float[Array, "B L In"]) -> Float[Array, "B L Out"]:
        a, b = (gather_parameter(param[...], x.dtype, *param.axes) for param in (self.a, self.b))
        # The thin product may be kept for the backward pass; the wide one is cheap to make of it again.
        return product(linear(x, a), b) * self.scale


def merged(
    kernel: Float[Array, "In Out"], a: Float[Array, "In R"], b: Float[Array, "R Out"], scale: Any
) -> Float[Array, "In Out"]:
    """The kernel of one linear layer that computes what a layer and its adapter do together, float32."""
    wide = jnp.matmul(a, b, precision=matmul_precision(jnp.dtype(jnp.float32)))
    return kernel.astype(jnp.float32) + scale * wide


def split(params: Any) -> tuple[Any, Any]:
    """A model's nested dict in two: the adapters, and the base. Either may be empty."""
    adapters: dict[str, Any] = {}
    base: dict[str, Any] = {}
    for key, value in params.items():
        if key == KEY:
            adapters[key] = value
        elif isinstance(value, dict):
            inner_adapters, inner_base = split(value)
            adapters |= {key: inner_adapters} if inner_adapters else {}
            base |= {key: inner_base} if inner_base else {}
        else:
            base[key] = value
    return adapters, base


def join(adapters: Any, base: Any) -> Any:
    """The whole of what `split` has split."""
    both = {**base, **adapters}
    return {key: join(adapters[key], base[key]) if key in adapters and key in base else both[key] for key in both}
