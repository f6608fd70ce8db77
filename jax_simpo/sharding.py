"""Makes the mesh, and holds the one table that says which array axis is split over which mesh axis.

To change a parallelism strategy, edit `RULES`. Arrays name their axes logically ("embed", "heads", ...); no other place
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
    "embed": "fsdp",  # parameters are split along the model width, and gathered when they are used
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "layers": None,
    None: None,
}


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """Builds the `data x fsdp x tensor` mesh. One axis may be -1 and takes the devices that are left.

    On several TPU slices `data` goes over the slices, so that the slow network between them carries gradients alone.

    Args:
        data: devices along `data`: replicas of the model.
        fsdp: devices along `fsdp`: parts of the parameters, and of the rows.
        tensor: devices along `tensor`: parts of heads, feed-forward width and vocabulary.
        devices: the devices of the mesh; None takes all that jax has.

    Raises:
        MeshError: a size is not positive, the sizes do not multiply to the number of devices, or `data` is no multiple
            of the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    unsized = [axis for axis, size in sizes.items() if size == -1]
    fixed = 1  # the product of the sizes that are given
    for axis, size in sizes.items():
        if size != -1 and size < 1:
            raise MeshError(f"mesh.{axis} is {size}; an axis is a positive number, or -1 for the devices that are left")
        fixed *= 1 if size == -1 else size
    if len(unsized) > 1:
        raise MeshError(f"mesh.{' and mesh.'.join(unsized)} are both -1; only one axis can take the devices left over")
    shape = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    count = len(devices)
    if count % fixed or (not unsized and fixed != count):
        raise MeshError(
            f"mesh ({shape}) does not divide the {count} {devices[0].platform} device(s) here: its fixed axes multiply "
            f"to {fixed}. Change `mesh` so that the product is {count}, or set one axis to -1. (To try a mesh on a "
            f"CPU, set the environment variable JAX_NUM_CPU_DEVICES={fixed}.)"
        )
    if unsized:
        sizes[unsized[0]] = count // fixed
    lengths, types = tuple(sizes[axis] for axis in MESH_AXES), (AxisType.Auto,) * len(MESH_AXES)
    if (slices := slice_count(devices)) > 1:
        if sizes["data"] % slices:
            raise MeshError(
                f"mesh.data is {sizes['data']}, and the devices are {slices} TPU slices: parameters are not split over "
                f"the network between slices. Set `mesh.data` to {slices}, or a multiple of it"
            )
        within, over = (sizes["data"] // slices, *lengths[1:]), (slices, 1, 1)
        grid = mesh_utils.create_hybrid_device_mesh(within, over, devices, allow_split_physical_axes=True)
        return Mesh(grid, MESH_AXES, axis_types=types)
    try:
        return jax.make_mesh(lengths, MESH_AXES, types, devices=devices)
    except NotImplementedError:  # no whole axes of the TPU's torus have these lengths, so an axis must be split
        grid = mesh_utils.create_device_mesh(lengths, devices, allow_split_physical_axes=True)
        return Mesh(grid, MESH_AXES, axis_types=types)


def slice_count(devices: list[jax.Device]) -> int:
    """Returns the number of TPU slices that devices lie on; 1 for other devices."""
    return len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}) or 1


def platform_of(device: jax.Device) -> str:
    """Returns what kind of device computes: cpu, gpu or tpu.

    Devices that are here say "gpu", NVIDIA's and AMD's alike. Those of a topology, which are not here, and the names
    that users give to jax say "cuda" or "rocm".
    """
    return "gpu" if device.platform in ("cuda", "rocm") else str(device.platform)


def spec(*logical_axes: str | None) -> P:
    """Returns the mesh axes of an array whose axes have these logical names (`None`: not split)."""
    return P(*(RULES[axis] for axis in logical_axes))


def named(mesh: Mesh, *logical_axes: str | None) -> NamedSharding:
    """Returns the sharding of an array whose axes have these logical names."""
    return NamedSharding(mesh, spec(*logical_axes))


def local_rows(mesh: Mesh, rows: int) -> Int[np.ndarray, " _"]:
    """Returns, in order, the numbers of the rows that lie on this process's devices when `rows` rows are split."""
    indices = named(mesh, "batch").addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[index] for index in indices]))


def hosts_share_tensor(mesh: Mesh) -> bool:
    """Returns True if devices of different processes are neighbours along `tensor`, which has the most collectives."""
    return differ_along_tensor(np.vectorize(lambda device: device.process_index, otypes=[int])(mesh.devices))


def differ_along_tensor(processes: Int[np.ndarray, "data fsdp tensor"]) -> bool:
    """Returns True if process numbers, laid out like the mesh's devices, differ along the mesh's last axis."""
    return bool((processes != processes[..., :1]).any())


def constrain(x: Array, *logical_axes: str | None) -> Array:
    """Constrains an activation to its sharding on the mesh of `jax.set_mesh`; returns it unchanged without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*logical_axes))


# Collectives inside `shard_map`. Over an axis of one device they are left out, because some backends run them anyway.


def psum(x: Array, axis: str) -> Array:
    """Calls `jax.lax.psum`: the sum over an axis."""
    return jax.lax.psum(x, axis) if jax.lax.axis_size(axis) > 1 else x


def all_gather(x: Array, axis: str, dimension: int) -> Array:
    """Calls `jax.lax.all_gather`: joins the parts of a dimension."""
    return jax.lax.all_gather(x, axis, axis=dimension, tiled=True) if jax.lax.axis_size(axis) > 1 else x


def psum_scatter(x: Array, axis: str, dimension: int) -> Array:
    """Calls `jax.lax.psum_scatter`: sums over an axis and leaves each device its part of a dimension."""
    if jax.lax.axis_size(axis) == 1:
        return x
    return jax.lax.psum_scatter(x, axis, scatter_dimension=dimension, tiled=True)


def all_to_all(x: Array, axis: str, *, split: int, join: int) -> Array:
    """Calls `jax.lax.all_to_all`: splits dimension `split` and joins the parts along dimension `join`."""
    if jax.lax.axis_size(axis) == 1:
        return x
    return jax.lax.all_to_all(x, axis, split_axis=split, concat_axis=join, tiled=True)


def gather_parameter(w: Float[Array, "..."], dtype: Any, *logical_axes: str | None) -> Float[Array, "..."]:
    """Casts a parameter to the compute dtype and gathers it over `fsdp`.

    The cast comes first, so that bfloat16 is sent and not float32. The gradient is reduced and scattered to the
    parameter's own sharding, then cast to its dtype. (Plain autodiff would all-reduce it to every device.)
    """
    if jax.sharding.get_abstract_mesh().empty:
        return w.astype(dtype)
    return _gather(w, dtype, logical_axes)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(w: Array, dtype: Any, logical_axes: tuple[str | None, ...]) -> Array:
    gathered = P(*(None if RULES[axis] == "fsdp" else RULES[axis] for axis in logical_axes))
    local = jax.lax.with_sharding_constraint(w.astype(dtype), spec(*logical_axes))
    return jax.lax.with_sharding_constraint(local, gathered)


def _gather_fwd(w: Array, dtype: Any, logical_axes: tuple[str | None, ...]) -> tuple[Array, Array]:
    return _gather(w, dtype, logical_axes), jnp.zeros((), w.dtype)


def _gather_bwd(dtype: Any, logical_axes: tuple[str | None, ...], like: Any, g: Array) -> tuple[Array]:
    return (jax.lax.with_sharding_constraint(g, spec(*logical_axes)).astype(like.dtype),)


_gather.defvjp(_gather_fwd, _gather_bwd)


def put_rows(arrays: Mapping[str, Any], mesh: Mesh, rows: int | None = None) -> dict[str, Array]:
    """Sends the arrays of a micro-batch to the devices, with rows split over `data` and `fsdp`.

    Args:
        arrays: the arrays of a `RowBatch`, each [rows, ...].
        mesh: the mesh.
        rows: number of rows of the whole micro-batch, if the arrays hold only this process's rows (`local_rows`).
    """
    sharding = named(mesh, "batch", None)
    if sharding.is_fully_addressable:
        return jax.device_put(dict(arrays), sharding)

    count = len(arrays["tokens"]) if rows is None else rows
    row_numbers = np.arange(count) if rows is None else local_rows(mesh, count)  # of the rows in `arrays`

    def put(array: Any) -> Array:
        def part(index: tuple[slice, ...] | None) -> Any:
            assert index is not None
            start, stop, _ = index[0].indices(count)
            first = int(np.searchsorted(row_numbers, start))
            return array[first : first + stop - start]

        return jax.make_array_from_callback((count, *array.shape[1:]), sharding, part)

    return {name: put(array) for name, array in arrays.items()}
