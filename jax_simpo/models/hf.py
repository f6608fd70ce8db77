"""Hugging Face model folders: weights in, straight to their device shards, and weights out."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_simpo.errors import ModelError
from jax_simpo.models import lora
from jax_simpo.models.config import ModelConfig
from jax_simpo.models.families import FAMILIES
from jax_simpo.models.safetensors_files import BLOCK_BYTES, TensorWriter, WeightFiles, plan_files, write_index
from jax_simpo.models.transformer import Model, Params

MAX_SHARD_BYTES = 5 * 10**9

_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt"]


# ---------------------------------------------------------------------------------------------------------------------
# Finding a model and its configuration
# ---------------------------------------------------------------------------------------------------------------------


def resolve_model_folder(name_or_path: str | Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder of a model: the path itself, or the local copy of a hub id (downloaded when it is not there yet).

    Args:
        name_or_path: a folder or a hub id.
        revision: branch, tag or commit of a hub model.
        weights: whether its weights are wanted too, not only its configuration and tokenizer.

    Raises:
        ModelError: neither a folder nor a model on the hub that can be reached.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    name = str(name_or_path)
    if folder.exists():
        raise ModelError(f"{name}: is a file; a model is a folder with config.json and safetensors files")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise ModelError(f"{name}: no such folder; a model is a folder, or a hub id such as meta-llama/Llama-3.1-8B")
    import huggingface_hub  # slow to import, and a local folder does not need it

    try:
        # "*/*": some repositories keep a second copy of the weights in a subfolder.
        path = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            allow_patterns=_HUB_FILES,
            ignore_patterns=["*/*"] if weights else ["*/*", "*.safetensors"],
        )
    except Exception as error:  # not found, gated, offline, interrupted: a dozen types from two libraries
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{name}: no such folder, and the hub gave no such model ({type(error).__name__}: {reason}). Check the "
            "spelling and the network; for a gated model accept its terms and run `hf auth login`"
        ) from error
    return Path(path)


def load_model_config(folder: str | Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Reads `config.json` of a model folder: our configuration, and the file as it is."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        adapter = (path.parent / "adapter_config.json").is_file()
        hint = ". This is an adapter; `jax-simpo export --merge` makes a model of it and its base" if adapter else ""
        raise ModelError(f"{path}: no such file; a model folder has a config.json{hint}")
    try:
        raw = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(raw, dict):
        raise ModelError(f"{path}: expected a JSON object, got {type(raw).__name__}")
    return ModelConfig.from_hf(raw, where=str(path)), raw


def load_generation_config(folder: str | Path) -> dict[str, Any] | None:
    """`generation_config.json` of a model folder, to be handed on to `save_model`; None where there is none."""
    path = Path(folder) / "generation_config.json"
    try:
        return json.loads(path.read_text()) if path.is_file() else None
    except json.JSONDecodeError as error:
        raise ModelError(f"{path}: not valid JSON ({error})") from error


# ---------------------------------------------------------------------------------------------------------------------
# Names and shapes
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tensor:
    """One tensor of a checkpoint and the part of our parameters that it is."""

    name: str
    path: str  # of the parameter, "layers/mlp/up/kernel"
    layer: int | None  # which layer of a stacked parameter
    shape: tuple[int, ...]  # in the checkpoint
    transposed: bool  # kernels are [in, out] here and [out, in] there


def _tensors(model: Model) -> list[_Tensor]:
    """Every tensor of the model's checkpoint, layer by layer in the order of the family's table."""
    shapes = {_join(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(model.abstract)}
    names = {path: name for path, name in FAMILIES[model.config.model_type].names.items() if path in shapes}

    def tensor(path: str, layer: int | None) -> _Tensor:
        shape, transposed = shapes[path][0 if layer is None else 1 :], path.endswith("/kernel")
        return _Tensor(names[path].format(layer), path, layer, shape[::-1] if transposed else shape, transposed)

    stacked = [path for path in names if path.startswith("layers/")]
    single = [tensor(path, None) for path in names if path not in stacked]
    layers = [tensor(path, layer) for layer in range(model.config.num_layers) for path in stacked]
    return [single[0], *layers, *single[1:]]  # the embedding first, the norm and the head last


def tensor_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of the model's checkpoint, in the order they are exported."""
    return {tensor.name: tensor.shape for tensor in _tensors(model)}


def _join(path: tuple[Any, ...]) -> str:
    return "/".join(key.key for key in path)


# ---------------------------------------------------------------------------------------------------------------------
# In
# ---------------------------------------------------------------------------------------------------------------------


def load_params(folder: str | Path, model: Model, mesh: Mesh) -> Params:
    """Reads the weights of a model folder onto the mesh: float32, or the compute dtype where they are frozen.

    Each device's part is read from the files on its own, so the host holds one part of one parameter at a time. Of a
    model with adapters this is the base.

    Raises:
        ModelError: a tensor is missing, extra or has another shape than `config.json` says.
        MeshError: the mesh does not divide the model.
    """
    (_, base), (_, shardings) = lora.split(model.abstract), lora.split(model.shardings(mesh))
    files = WeightFiles(Path(folder))
    tensors = _tensors(model)
    _check_tensors(files, model, tensors)
    tensors_of: dict[str, list[_Tensor]] = {}
    for tensor in tensors:
        tensors_of.setdefault(tensor.path, []).append(tensor)

    def load(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.Array:
        return _load_parameter(files, tensors_of[_join(path)], leaf, sharding)

    return jax.tree_util.tree_map_with_path(load, base, shardings)


def _load_parameter(
    files: WeightFiles, tensors: list[_Tensor], leaf: jax.ShapeDtypeStruct, sharding: NamedSharding
) -> jax.Array:
    shape = leaf.shape
    devices_of: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}  # replicas of a part are read once
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


def _read_part(files: WeightFiles, tensors: list[_Tensor], index: tuple[slice, ...], dtype: Any) -> np.ndarray:
    def read(tensor: _Tensor, index: tuple[slice, ...]) -> np.ndarray:
        return files.read(tensor.name, index[::-1]).T if tensor.transposed else files.read(tensor.name, index)

    if tensors[0].layer is None:
        return np.ascontiguousarray(read(tensors[0], index), dtype)
    part = np.empty([i.stop - i.start for i in index], dtype)
    for i, tensor in enumerate(tensors[index[0]]):
        part[i] = read(tensor, index[1:])
    return part


def _check_tensors(files: WeightFiles, model: Model, tensors: list[_Tensor]) -> None:
    names = {tensor.name for tensor in tensors}
    missing = [tensor.name for tensor in tensors if tensor.name not in files]
    if missing:
        raise ModelError(
            f"{files.folder}: {_some(missing)} missing from the safetensors files; config.json asks for "
            f"{model.config.num_layers} layers of a {model.config.model_type} model"
        )
    family = FAMILIES[model.config.model_type]
    spare = "|".join(family.ignored)
    extra = [name for name in files if name not in names and not re.fullmatch(spare, name)]
    head = family.names["lm_head/embedding"]
    if model.config.tie_word_embeddings and head in extra:  # some exporters write the tied head a second time
        _check_tied(files, family.names["embed/embedding"], head)
        extra.remove(head)
    if extra:
        raise ModelError(
            f"{files.folder}: {_some(extra)} of the safetensors files has no place in the {model.config.model_type} "
            "model that config.json describes; use the config.json that belongs to these weights"
        )
    for tensor in tensors:
        files.check_dtype(tensor.name)
        if files.shape(tensor.name) != tensor.shape:
            raise ModelError(
                f"{files.where(tensor.name)} has shape {list(files.shape(tensor.name))}, but config.json makes it "
                f"{list(tensor.shape)}; use the config.json that belongs to these weights"
            )


def _check_tied(files: WeightFiles, embedding: str, head: str) -> None:
    same = files.shape(embedding) == files.shape(head)
    rows = files.shape(head)[0]
    for start in range(0, rows if same else 0, 4096):
        block = (slice(start, min(start + 4096, rows)), slice(None))
        same = same and np.array_equal(files.read(embedding, block), files.read(head, block))
    if not same:
        raise ModelError(
            f"{files.where(head)} differs from `{embedding}`, but config.json says tie_word_embeddings=true; set it "
            "to false to train with both, or remove the tensor"
        )


def _some(names: list[str], most: int = 5) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:most])
    return f"tensor {shown}" + (f" and {len(names) - most} more" if len(names) > most else "")


# ---------------------------------------------------------------------------------------------------------------------
# Out
# ---------------------------------------------------------------------------------------------------------------------


def shard_bytes(size: str) -> int:
    """A file size as Hugging Face writes it: "5GB", "500MB", or a number of bytes.

    Raises:
        ModelError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?)?B?", size, re.IGNORECASE)
    if found is None:
        raise ModelError(f"max_shard_size {size!r} is no file size; write 500MB, 5GB or a number of bytes")
    unit = (found[2] or "").lower()
    number = float(found[1]) * (1024 if unit.endswith("i") else 1000) ** " kmg".index(unit[:1] or " ")
    if number < 1:
        raise ModelError(f"max_shard_size {size!r}: a file has at least a byte")
    return int(number)


def save_model(
    params: Params,
    model: Model,
    folder: str | Path,
    dtype: str = "bfloat16",
    *,
    tokenizer: Any = None,
    generation_config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Writes a folder that `AutoModelForCausalLM.from_pretrained` loads. Adapters are merged into their kernels.

    The folder is written under another name beside its place and then moved there, so a killed export leaves the
    former model, or none, but never half a model. In a multi-process run every process calls this and the first one
    writes.

    Args:
        params: the parameters, on the mesh they are trained on.
        model: their model.
        folder: where to; an earlier export there is replaced.
        dtype: the dtype of the stored weights, `float32` or `bfloat16`.
        tokenizer: a transformers tokenizer, saved alongside.
        generation_config: as `load_generation_config` gives it; made from the configuration if None.
        max_shard_bytes: most bytes per safetensors file.

    Raises:
        ModelError: something that is no model is in the way, or the folder cannot be written.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ModelError(f"export dtype {dtype!r} is not supported; use float32 or bfloat16")
    tensors = {tensor.name: tensor for tensor in _tensors(model)}
    leaves = {_join(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    files = plan_files(tensor_shapes(model), dtype, max_shard_bytes)
    with replacing(folder) as temporary:
        for file, shapes in files.items():
            with TensorWriter(temporary / file, shapes, dtype) if temporary else nullcontext() as writer:
                for name in shapes:
                    tensor = tensors[name]
                    for start, rows in _blocks(leaves[tensor.path], tensor, dtype, _adapter(leaves, tensor, model)):
                        if writer:
                            writer.write(name, rows, start)
        if temporary:
            write_index(temporary, files, dtype)
            config = _with_special_tokens(model.config, tokenizer)
            write_json(temporary / "config.json", config.to_hf(dtype))
            write_json(temporary / "generation_config.json", generation_config or _generation_config(config))
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
    return Path(folder).absolute()


@contextmanager
def replacing(folder: str | Path) -> Iterator[Path | None]:
    """A new folder to write to, which takes the place of `folder` when all is written; None but on the first process.

    Raises:
        ModelError: something that is no model is in the way, or the folder cannot be written.
    """
    folder = Path(folder).absolute()
    temporary = None
    try:
        temporary = _fresh_folder_beside(folder) if jax.process_index() == 0 else None
        yield temporary
        if temporary:
            _move_into_place(temporary, folder)
    except OSError as error:
        raise ModelError(f"{folder}: the model cannot be written there ({error})") from error
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)  # gone already, unless something failed
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("save_model")


class _Adapter(NamedTuple):
    """What is merged into a kernel: `lora.merged`'s matrices, of all layers, and their scale."""

    a: jax.Array
    b: jax.Array
    scale: float


def _adapter(leaves: Mapping[str, jax.Array], tensor: _Tensor, model: Model) -> _Adapter | None:
    """The adapter of a linear layer's kernel, if it has one."""
    path = f"{tensor.path.removesuffix('/kernel')}/{lora.KEY}"
    if f"{path}/a" not in leaves:
        return None
    assert model.lora is not None
    return _Adapter(leaves[f"{path}/a"], leaves[f"{path}/b"], model.lora.scale)


def _blocks(leaf: jax.Array, tensor: _Tensor, dtype: str, adapter: _Adapter | None) -> Iterator[tuple[int, np.ndarray]]:
    """A tensor as the checkpoint has it, in blocks of its rows, each with the number of its first row.

    A block is merged and cast on the devices. Where they belong to several processes it is gathered to each of them, so
    that any process can read it; so many hold it then that it must be small, and it must be gathered alone: where the
    rows are split over devices, a block is made of the same rows of each one's part.
    """
    own = leaf.sharding
    axis = leaf.ndim - 1 if tensor.transposed else leaf.ndim - len(tensor.shape)  # of the checkpoint's rows
    held = own.shard_shape(leaf.shape)[axis]
    parts = leaf.shape[axis] // held
    row_bytes = int(np.prod(tensor.shape[1:], dtype=np.int64)) * jnp.dtype(dtype).itemsize
    count = min(held, max(1, BLOCK_BYTES // (row_bytes * parts)))
    everywhere = None
    if isinstance(own, NamedSharding) and not own.is_fully_addressable:
        everywhere = NamedSharding(own.mesh, PartitionSpec())
    for start in range(0, held, count):
        start = min(start, held - count)  # the last block begins earlier, to be of the same shape
        x = _pick(leaf, adapter, tensor.layer, start, axis, (parts, count), dtype, everywhere)
        block = np.asarray(x if everywhere is None else x.addressable_data(0))
        for part, rows in enumerate(block):
            yield part * held + start, rows
        del x, block  # before the next one is made


@partial(jax.jit, static_argnames=("axis", "block", "dtype", "sharding"))
def _pick(
    leaf: jax.Array,
    adapter: _Adapter | None,
    layer: jax.Array | None,
    start: jax.Array,
    axis: int,
    block: tuple[int, int],
    dtype: str,
    sharding: NamedSharding | None,
) -> jax.Array:
    def of_layer(x: jax.Array) -> jax.Array:
        return x if layer is None else jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)

    def cut(x: jax.Array, axis: int) -> jax.Array:
        """The block's rows, [parts, rows of a part, ...]."""
        x = x.reshape(*x.shape[:axis], block[0], -1, *x.shape[axis + 1 :])
        return jnp.moveaxis(jax.lax.dynamic_slice_in_dim(x, start, block[1], axis + 1), (axis, axis + 1), (0, 1))

    x = cut(of_layer(leaf), axis if layer is None else axis - 1)
    if adapter is not None:  # rows of the checkpoint are a kernel's columns
        columns = jax.vmap(lora.merged, in_axes=(0, None, 0, None))
        turned = columns(x.mT, of_layer(adapter.a), cut(of_layer(adapter.b), 1).mT, adapter.scale)
        x = turned.mT
    x = x.astype(dtype)
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)


def _with_special_tokens(config: ModelConfig, tokenizer: Any) -> ModelConfig:
    """A fresh model starts and ends text as its tokenizer does; a configuration that names the tokens keeps them."""

    def pick(key: str) -> Any:
        own = getattr(config, key)
        return getattr(tokenizer, key, None) if own is None else own

    return replace(config, bos_token_id=pick("bos_token_id"), eos_token_id=pick("eos_token_id"))


def _generation_config(config: ModelConfig) -> dict[str, Any]:
    hf = config.to_hf()
    tokens = {key: hf[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if hf[key] is not None}
    return {"_from_model_config": True, **tokens}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a file as transformers writes its own."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


# What an export may replace: a folder with anything else in it is not only a model.
_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model", "README.md")


def check_replaceable(folder: Path) -> None:
    """Makes sure that an export to this folder would replace nothing but a model.

    Raises:
        ModelError: it would.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ModelError(f"{folder}: is a file; export to another folder")
    foreign = [path.name for path in folder.iterdir() if not any(path.match(p) for p in _MODEL_FILES)]
    if foreign:
        raise ModelError(
            f"{folder}: holds {foreign[0]!r}, which is not part of a model, and an export replaces the whole "
            "folder; export to another one"
        )


def _fresh_folder_beside(folder: Path) -> Path:
    former = _former(folder)
    if former.exists() and not folder.exists():  # killed between the two moves of the last export
        former.rename(folder)
    check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left_over in folder.parent.glob(f".{folder.name}.writing-*"):
        shutil.rmtree(left_over)
    temporary = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
    temporary.mkdir()
    return temporary


def _move_into_place(temporary: Path, folder: Path) -> None:
    for path in temporary.iterdir():  # on the disk before the name says that it is there
        with path.open("rb") as file:
            os.fsync(file.fileno())
    former = _former(folder)
    shutil.rmtree(former, ignore_errors=True)
    if folder.exists():
        folder.rename(former)
    temporary.rename(folder)
    shutil.rmtree(former, ignore_errors=True)


def _former(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.former")
