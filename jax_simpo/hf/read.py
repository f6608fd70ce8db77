"""Reads the weights of a model, from a folder or a GGUF file, straight into their device shards."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jax_simpo.errors import ModelError
from jax_simpo.gguf_files import is_gguf
from jax_simpo.hf.families import FAMILIES
from jax_simpo.hf.gguf_models import GgufWeights
from jax_simpo.hf.safetensors_files import WeightFiles
from jax_simpo.hf.tensors import CheckpointTensor, checkpoint_tensors, join_path
from jax_simpo.models import lora
from jax_simpo.models.transformer import Model, Params

Weights = WeightFiles | GgufWeights


def load_params(folder: str | Path, model: Model, mesh: Mesh) -> Params:
    """Reads the weights of a model onto the mesh: float32, or the compute dtype for frozen parameters.

    Each device's part is read from the files separately, so the host holds one part of one parameter at a time. For a
    model with adapters, only the parameters of the base are read.

    Args:
        folder: the model's folder, or its GGUF file.
        model: the model that the folder describes.
        mesh: the mesh that the parameters are placed on.

    Raises:
        ModelError: a tensor is missing, extra, of an unreadable dtype or of another shape than `config.json` says.
        MeshError: the mesh does not divide the model.
    """
    (_, base), (_, shardings) = lora.split(model.abstract), lora.split(model.shardings(mesh))
    files = _open(Path(folder), model)
    tensors = checkpoint_tensors(model)
    _check_tensors(files, model, tensors)
    tensors_of: dict[str, list[CheckpointTensor]] = {}
    for tensor in tensors:
        tensors_of.setdefault(tensor.path, []).append(tensor)

    def load(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.Array:
        return _load_parameter(files, tensors_of[join_path(path)], leaf, sharding)

    return jax.tree_util.tree_map_with_path(load, base, shardings)


def check_params(folder: str | Path, model: Model) -> None:
    """Makes sure that `load_params` can read the weights of a folder, from the headers of its files alone.

    A header gives the name, dtype and shape of every tensor and with them the length that the file must have. Data is
    read only where a checkpoint holds a tied head a second time, which must equal the embedding.

    Raises:
        ModelError: a file is missing or cut short, or a tensor is missing, extra, of an unreadable dtype or of another
            shape than `config.json` says.
    """
    _check_tensors(_open(Path(folder), model), model, checkpoint_tensors(model))


def _open(path: Path, model: Model) -> Weights:
    return GgufWeights(path, model.config) if is_gguf(path) else WeightFiles(path)


def _load_parameter(
    files: Weights, tensors: list[CheckpointTensor], leaf: jax.ShapeDtypeStruct, sharding: NamedSharding
) -> jax.Array:
    """Reads one parameter as a global array, one part per distinct shard."""
    shape = leaf.shape
    # Bounds of a part -> the devices that hold it: a part with several replicas is read once.
    devices_of: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(i.indices(size)[:2] for i, size in zip(index or (), shape, strict=True))
        devices_of.setdefault(bounds, []).append(device)
    parts = []
    for bounds, devices in devices_of.items():
        host = _read_part(files, tensors, tuple(slice(*b) for b in bounds), leaf.dtype)
        parts += [jax.device_put(host, device) for device in devices]
        jax.block_until_ready(parts)
        del host  # this part has left the host before the next one is read
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def _read_part(files: Weights, tensors: list[CheckpointTensor], index: tuple[slice, ...], dtype: Any) -> np.ndarray:
    """Reads the part of a parameter at `index`, from the one tensor it is or from one tensor per layer."""

    def read(tensor: CheckpointTensor, index: tuple[slice, ...]) -> np.ndarray:
        return files.read(tensor.name, index[::-1]).T if tensor.transposed else files.read(tensor.name, index)

    if tensors[0].layer is None:
        return np.ascontiguousarray(read(tensors[0], index), dtype)
    part = np.empty([i.stop - i.start for i in index], dtype)
    for i, tensor in enumerate(tensors[index[0]]):
        part[i] = read(tensor, index[1:])
    return part


def _check_tensors(files: Weights, model: Model, tensors: list[CheckpointTensor]) -> None:
    """Raises ModelError unless the files hold the model's tensors, in their shapes, and no others."""
    names = {tensor.name for tensor in tensors}
    missing = [files.own_name(tensor.name) for tensor in tensors if tensor.name not in files]
    if missing:
        raise ModelError(
            f"{files.folder}: {_name_tensors(missing)} missing from {files.holder}; {files.description} asks for "
            f"{model.config.num_layers} layers (`num_hidden_layers`) of a {model.config.model_type} model"
        )
    family = FAMILIES[model.config.model_type]
    ignored = "|".join(family.ignored)
    extra = [name for name in files if name not in names and not re.fullmatch(ignored, name)]
    head = family.names["lm_head/embedding"]
    if model.config.tie_word_embeddings and head in extra:  # some exporters write the tied head a second time
        _check_tied(files, family.names["embed/embedding"], head)
        extra.remove(head)
    if extra:
        raise ModelError(
            f"{files.folder}: {_name_tensors(extra)} of {files.holder} has no place in the {model.config.model_type} "
            f"model that {files.description} describes; {files.remedy}"
        )
    for tensor in tensors:
        files.check_dtype(tensor.name)
        if files.shape(tensor.name) != tensor.shape:
            raise ModelError(
                f"{files.locate(tensor.name)} has shape {list(files.shape(tensor.name))}, but {files.description} "
                f"makes it {list(tensor.shape)}; {files.remedy}"
            )


def _check_tied(files: Weights, embedding: str, head: str) -> None:
    """Raises ModelError unless the two tensors are equal. They are compared in blocks of rows."""
    same = files.shape(embedding) == files.shape(head)
    rows = files.shape(head)[0]
    for start in range(0, rows if same else 0, 4096):
        block = (slice(start, min(start + 4096, rows)), slice(None))
        same = same and np.array_equal(files.read(embedding, block), files.read(head, block))
    if not same:
        raise ModelError(
            f"{files.locate(head)} differs from `{embedding}`, but config.json says tie_word_embeddings=true; set it "
            "to false to train with both, or remove the tensor"
        )


def _name_tensors(names: list[str], most: int = 5) -> str:
    """Lists tensors for an error message, at most `most` of them by name."""
    shown = ", ".join(f"`{name}`" for name in names[:most])
    return f"tensor {shown}" + (f" and {len(names) - most} more" if len(names) > most else "")
