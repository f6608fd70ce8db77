"""Writes the weights of a model as a Hugging Face folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from jax_simpo.errors import ModelError
from jax_simpo.hf.config import write_model_config
from jax_simpo.hf.safetensors_files import BLOCK_BYTES, TensorWriter, split_into_files, write_index
from jax_simpo.hf.tensors import CheckpointTensor, checkpoint_tensors, join_path, tensor_shapes
from jax_simpo.models import lora
from jax_simpo.models.config import ModelConfig
from jax_simpo.models.transformer import Model, Params
from jax_simpo.run import whole

MAX_SHARD_BYTES = 5 * 10**9


def shard_bytes(size: str) -> int:
    """Reads a file size as Hugging Face writes it, "5GB", "500MB" or a number of bytes; returns bytes.

    Raises:
        ModelError: the text is no file size, or less than a byte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?)?B?", size, re.IGNORECASE)
    if match is None:
        raise ModelError(f"max_shard_size {size!r} is no file size; write 500MB, 5GB or a number of bytes")
    unit = (match[2] or "").lower()
    number = float(match[1]) * (1024 if unit.endswith("i") else 1000) ** " kmg".index(unit[:1] or " ")
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

    The folder is written under a temporary name beside its place and then moved there, so a killed export leaves the
    former model, or none, but never half a model. In a run of several processes all of them call this, and the first
    one writes.

    Args:
        params: the parameters, on the mesh they are trained on.
        model: the model of these parameters.
        folder: the folder to write; an earlier export there is replaced.
        dtype: the dtype of the stored weights, `float32` or `bfloat16`.
        tokenizer: a transformers tokenizer, saved alongside.
        generation_config: as `load_generation_config` returns it; made from the configuration if None.
        max_shard_bytes: most bytes per safetensors file.

    Returns:
        The absolute path of the folder.

    Raises:
        ModelError: the folder holds files that are not part of a model, or cannot be written.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ModelError(f"export dtype {dtype!r} is not supported; use float32 or bfloat16")
    tensors = {tensor.name: tensor for tensor in checkpoint_tensors(model)}
    leaves = {join_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    files = split_into_files(tensor_shapes(model), dtype, max_shard_bytes)
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
            write_json(temporary / "config.json", write_model_config(config, dtype))
            write_json(temporary / "generation_config.json", generation_config or _generation_config(config))
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
    return Path(folder).absolute()


@contextmanager
def replacing(folder: str | Path) -> Iterator[Path | None]:
    """Gives the first process a new folder to write to, which takes the place of `folder`; gives the others None.

    Raises:
        ModelError: a file that is no part of a model is in the way, or the folder cannot be written.
    """
    with whole.replacing(folder) if jax.process_index() == 0 else nullcontext() as temporary:
        yield temporary
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("save_model")


class _Adapter(NamedTuple):
    """An adapter to merge into a kernel: its two matrices, stacked over layers, and their scale."""

    a: jax.Array
    b: jax.Array
    scale: float


def _adapter(leaves: Mapping[str, jax.Array], tensor: CheckpointTensor, model: Model) -> _Adapter | None:
    """Returns the adapter of a linear layer's kernel; None if the kernel has none."""
    path = f"{tensor.path.removesuffix('/kernel')}/{lora.ADAPTER_KEY}"
    if f"{path}/a" not in leaves:
        return None
    assert model.lora is not None
    return _Adapter(leaves[f"{path}/a"], leaves[f"{path}/b"], model.lora.scale)


def _blocks(
    leaf: jax.Array, tensor: CheckpointTensor, dtype: str, adapter: _Adapter | None
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields a tensor as the checkpoint stores it, in blocks of rows, each with the number of its first row.

    A block is merged and cast on the devices. If these belong to several processes, the block is replicated, so that
    each process can read it; every device then holds the block, so it must be small. If the rows are split over
    devices, a block consists of the same rows of each device's part, so that nothing but the block is replicated.
    """
    sharding = leaf.sharding
    axis = leaf.ndim - 1 if tensor.transposed else leaf.ndim - len(tensor.shape)  # the checkpoint's rows
    part_rows = sharding.shard_shape(leaf.shape)[axis]
    parts = leaf.shape[axis] // part_rows
    row_bytes = int(np.prod(tensor.shape[1:], dtype=np.int64)) * jnp.dtype(dtype).itemsize
    block_rows = min(part_rows, max(1, BLOCK_BYTES // (row_bytes * parts)))
    replicated = None
    if isinstance(sharding, NamedSharding) and not sharding.is_fully_addressable:
        replicated = NamedSharding(sharding.mesh, PartitionSpec())
    for start in range(0, part_rows, block_rows):
        start = min(start, part_rows - block_rows)  # the last block begins earlier, so that it has the same shape
        x = _pick(leaf, adapter, tensor.layer, start, axis, (parts, block_rows), dtype, replicated)
        block = np.asarray(x if replicated is None else x.addressable_data(0))
        for part, rows in enumerate(block):
            yield part * part_rows + start, rows
        del x, block  # free this block before the next one is made


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
    """Returns a block of a tensor's rows, merged with its adapter and cast: [parts, rows of a part, ...].

    `axis` is the axis of the checkpoint's rows in `leaf`; `block` the number of parts and the rows of each.
    """

    def of_layer(x: jax.Array) -> jax.Array:
        return x if layer is None else jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)

    def cut(x: jax.Array, axis: int) -> jax.Array:
        """Returns the block's rows, [parts, rows of a part, ...]."""
        x = x.reshape(*x.shape[:axis], block[0], -1, *x.shape[axis + 1 :])
        return jnp.moveaxis(jax.lax.dynamic_slice_in_dim(x, start, block[1], axis + 1), (axis, axis + 1), (0, 1))

    x = cut(of_layer(leaf), axis if layer is None else axis - 1)
    if adapter is not None:  # the checkpoint's rows are the kernel's columns
        merge_columns = jax.vmap(lora.merged, in_axes=(0, None, 0, None))
        kernel_columns = merge_columns(x.mT, of_layer(adapter.a), cut(of_layer(adapter.b), 1).mT, adapter.scale)
        x = kernel_columns.mT
    x = x.astype(dtype)
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)


def _with_special_tokens(config: ModelConfig, tokenizer: Any) -> ModelConfig:
    """Copies `config` and fills in the tokenizer's first and last token of a text where `config` names none."""

    def pick(key: str) -> Any:
        token = getattr(config, key)
        return getattr(tokenizer, key, None) if token is None else token

    return replace(config, bos_token_id=pick("bos_token_id"), eos_token_id=pick("eos_token_id"))


def _generation_config(config: ModelConfig) -> dict[str, Any]:
    hf = write_model_config(config)
    tokens = {key: hf[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if hf[key] is not None}
    return {"_from_model_config": True, **tokens}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file in the format in which transformers writes its own."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
