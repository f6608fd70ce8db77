"""Says for which dtypes and head sizes a set of kernels is written, and refuses others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxtyping import Array, Float

from jax_simpo.errors import ConfigError

HeadSizes = Mapping[str, Sequence[int]]  # by compute dtype, the features of a head that there are kernels for


def missing_kernel(sizes: HeadSizes, dtype: str, head_dim: int) -> str | None:
    """Says that there is no kernel for heads of a model, as `Backend.obstacle` does; None where there is one."""
    known = sizes.get(dtype, ())
    if head_dim in known:
        return None
    return f"has kernels for heads of {', '.join(map(str, known))} in {dtype}, and this model's have {head_dim}"


def check_kernel(backend: str, sizes: HeadSizes, q: Float[Array, "B L H Dh"], *, interpret: bool) -> None:
    """Makes sure that there is a kernel for these queries. The interpreter takes heads of any size.

    Raises:
        ConfigError: there is none.
    """
    dtype, head_dim = str(q.dtype), q.shape[-1]
    if dtype not in sizes:
        raise ConfigError(f"`attention: {backend}` computes in {' or '.join(sizes)}, not {dtype}; set `dtype`")
    if not interpret and head_dim not in sizes[dtype]:
        raise ConfigError(
            f"`attention: {backend}` has {dtype} kernels for head sizes {', '.join(map(str, sizes[dtype]))}, and this "
            f"model's is {head_dim}; choose `attention: auto`"
        )
