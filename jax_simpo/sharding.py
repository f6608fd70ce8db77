"""The mesh, and the one table that says which array axis lies on which mesh axis.

To change a parallelism strategy, edit `RULES`. Arrays name their axes logically ("embed", "heads", ...); nothing else
in the program writes a `PartitionSpec` for a parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jax_simpo.errors import MeshError

MESH_AXES = ("data", "fsdp", "tensor")

RULES: dict[str | None, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",  # parameters are split along the model width and gathered when used
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "layers": None,
    None: None,
}


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """Builds the `data x fsdp x tensor` mesh; one axis may be -1 and takes the devices that are left.

    Raises:
        MeshError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    unknown = [axis for axis, size in sizes.items() if size == -1]
    known = 1
    for axis, size in sizes.items():
        if size != -1 and size < 1:
            raise MeshError(f"mesh.{axis} is {size}; an axis is a positive number, or -1 for the devices that are left")
        known *= 1 if size == -1 else size
    if len(unknown) > 1:
        raise MeshError(f"mesh.{' and mesh.'.join(unknown)} are both -1; only one axis can take the devices left over")
    shape = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    count = len(devices)
    if count % known or (not unknown and known != count):
        raise MeshError(
            f"mesh ({shape}) does not divide the {count} {devices[0].platform} device(s) here: its fixed axes multiply "
            f"to {known}. Change `mesh` so that the product is {count}, or set one axis to -1. (To try a mesh on a "
            f"CPU, set the environment variable JAX_NUM_CPU_DEVICES={known}.)"
        )
    if unknown:
        sizes[unknown[0]] = count // known
    lengths, types = tuple(sizes[axis] for axis in MESH_AXES), (AxisType.Auto,) * len(MESH_AXES)
    try:
        return jax.make_mesh(lengths, MESH_AXES, types, devices=devices)
    except NotImplementedError:  # a TPU's torus has axes of other lengths; they are split only where it has to be
        grid = mesh_utils.create_device_mesh(lengths, devices, allow_split_physical_axes=True)
        return Mesh(grid, MESH_AXES, axis_types=types)


def spec(*logical_axes: str | None) -> P:
    """The mesh axes of an array whose axes carry these logical names (`None`: not split)."""
    return P(*(RULES[axis] for axis in logical_axes))


def named(mesh: Mesh, *logical_axes: str | None) -> NamedSharding:
    """The sharding of an array whose axes carry these logical names."""
    return NamedSharding(mesh, spec(*logical_axes))


def local_rows(mesh: Mesh, rows: int) -> Int[np.ndarray, " _"]:
    """Which of so many rows, split over `data` and `fsdp`, lie on devices of this process: their numbers, in order."""
    held = named(mesh, "batch").addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[index] for index in held]))


def hosts_share_tensor(mesh: Mesh) -> bool:
    """Whether devices of different processes are neighbours along `tensor`, whose collectives are the most frequent."""
    return differ_along_tensor(np.vectorize(lambda device: device.process_index, otypes=[int])(mesh.devices))


def differ_along_tensor(processes: Int[np.ndarray, "data fsdp tensor"]) -> bool:
    """Whether numbers of processes, as their devices lie in the mesh, change along its last axis."""
    return bool((processes != processes[..., :1]).any())


def constrain(x: Array, *logical_axes: str | None) -> Array:
    """Holds an activation to its sharding under the mesh of `jax.set_mesh`; does nothing without one."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*logical_axes))


# Collectives inside `shard_map`; over an axis of one device they do nothing, which is not free on every backend.


def psum(x: Array, axis: str) -> Array:
    """`jax.lax.psum`."""
    return jax.lax.psum(x, axis) if jax.lax.axis_size(axis) > 1 else x


def all_gather(x: Array, axis: str, dimension: int) -> Array:
    """`jax.lax.all_gather` of the parts of a dimension."""
    return jax.lax.all_gather(x, axis, axis=dimension, tiled=True) if jax.lax.axis_size(axis) > 1 else x


def psum_scatter(x: Array, axis: str, dimension: int) -> Array:
    """`jax.lax.psum_scatter` to the parts of a dimension."""
    if jax.lax.axis_size(axis) == 1:
        return x
    return jax.lax.psum_scatter(x, axis, scatter_dimension=dimension, tiled=True)


def all_to_all(x: Array, axis: str, *, split: int, join: int) -> Array:
    """`jax.lax.all_to_all`: parts of one dimension for parts of another."""
    if jax.lax.axis_size(axis) == 1:
        return x
    return jax.lax.all_to_all(x, axis, split_axis=split, concat_axis=join, tiled=True)


def gather_parameter(w: Float[Array, "..."], dtype: Any, *logical_axes: str | None) -> Float[Array, "..."]:
    """Casts a parameter to the compute dtype and gathers it over `fsdp`, once, for the use that follows.

    The cast comes first, so bfloat16 travels, not float32. The gradient takes the way back: reduced and scattered to
    the parameter's own sharding (left to autodiff it would be all-reduced to every device), then cast to its dtype.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return w.astype(dtype)
    return _gather(w, dtype, logical_axes)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(w: Array, dtype: Any, logical_axes: tuple[str | None, ...]) -> Array:
    whole = P(*(None if RULES[axis] == "fsdp" else RULES[axis] for axis in logical_axes))
    local = jax.lax.with_sharding_constraint(w.astype(dtype), spec(*logical_axes))
    return jax.lax.with_sharding_constraint(local, whole)


def _gather_fwd(w: Array, dtype: Any, logical_axes: tuple[str | None, ...]) -> tuple[Array, Array]:
    return _gather(w, dtype, logical_axes), jnp.zeros((), w.dtype)


def _gather_bwd(dtype: Any, logical_axes: tuple[str | None, ...], like: Any, g: Array) -> tuple[Array]:
    return (jax.lax.with_sharding_constraint(g, spec(*logical_axes)).astype(like.dtype),)


_gather.defvjp(_gather_fwd, _gather_bwd)


def put_rows(arrays: Mapping[str, Any], mesh: Mesh, rows: int | None = None) -> dict[str, Array]:
    """Sends the arrays of a micro-batch to the devices, rows split over `data` and `fsdp`.

    Args:
        arrays: of a `RowBatch`.
        mesh: where to.
        rows: rows of the whole micro-batch, where the arrays hold only this process's (those of `local_rows`).
    """
    sharding = named(mesh, "batch", None)
    if sharding.is_fully_addressable:
        return jax.device_put(dict(arrays), sharding)

    count = len(arrays["tokens"]) if rows is None else rows
    held = np.arange(count) if rows is None else local_rows(mesh, count)

    def put(array: Any) -> Array:
        def part(index: tuple[slice, ...] | None) -> Any:
            assert index is not None
            start, stop, _ = index[0].indices(count)
            first = int(np.searchsorted(held, start))
            return array[first : first + stop - start]

        return jax.make_array_from_callback((count, *array.shape[1:]), sharding, part)

    return {name: put(array) for name, array in arrays.items()}
