"""Reads and writes adapter folders in peft's format: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_simpo.errors import ModelError
from jax_simpo.hf import write
from jax_simpo.hf.lora_targets import linear_layers
from jax_simpo.hf.safetensors_files import TensorWriter, WeightFiles
from jax_simpo.models.config import ModelConfig
from jax_simpo.models.lora import ADAPTER_KEY, Lora
from jax_simpo.models.transformer import Model, Params

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

# Fields of peft for features that are not built in: they must be empty.
_MUST_BE_EMPTY = (
    *("modules_to_save", "rank_pattern", "alpha_pattern", "layers_to_transform", "layer_replication", "lora_bias"),
    *("use_rslora", "use_dora", "use_qalora", "fan_in_fan_out", "trainable_token_indices", "target_parameters"),
    *("alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "velora_config"),
)
# Initialisations that also change the base model. The adapter then fits only the changed base.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter's folder and the settings in its `adapter_config.json`.

    Attributes:
        folder: the folder.
        base: the base model of the adapter, a folder or hub id; None where the file names none.
        revision: branch, tag or commit of a base on the hub.
        rank: the rank of the adapter's matrices.
        alpha: the product of the matrices is scaled by `alpha / rank`.
    """

    folder: Path
    base: str | None
    revision: str | None
    rank: int
    alpha: int | float

    def lora(self, config: ModelConfig) -> Lora:
        """Returns the adapter's settings, with the layers of the base that it is on. They follow from its tensors.

        Raises:
            ModelError: a tensor belongs to no linear layer, or one has an adapter in some of the decoder layers only.
        """
        files = _open(self.folder)
        unplaced = set(files)
        targets = []
        for path in linear_layers(config.model_type):
            names = {name for _, _, name in _peft_tensors(config, path)}
            if not names & unplaced:
                continue
            if missing := sorted(names - unplaced):
                raise ModelError(
                    f"{self.folder / WEIGHTS}: tensor `{missing[0]}` is missing: the base model has "
                    f"{config.num_layers} layers, and an adapter must be on all of them. {self._base_hint}"
                )
            targets.append(path)
            unplaced -= names
        if unplaced or not targets:
            problem = f"tensor `{min(unplaced)}` has no place in" if unplaced else "there is no tensor for"
            raise ModelError(
                f"{self.folder / WEIGHTS}: {problem} a {config.model_type} model of {config.num_layers} layers. "
                f"{self._base_hint}"
            )
        return Lora(self.rank, self.alpha, tuple(targets))

    @property
    def _base_hint(self) -> str:
        return f"Give the adapter's own base model; `base_model_name_or_path` of {CONFIG} is {self.base!r}"


def find(folder: Path) -> AdapterFolder | None:
    """Reads the configuration of the adapter in a folder; returns None if the folder holds a whole model or no adapter.

    Raises:
        ModelError: the folder holds an adapter of a kind that is not built in.
    """
    file = folder / CONFIG
    if not file.is_file() or (folder / "config.json").exists():
        return None
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        kind, rank, alpha = fields["peft_type"], fields["r"], fields["lora_alpha"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file}: not the configuration of a LoRA adapter ({error!r})") from error
    if kind != "LORA" or not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1:
        raise ModelError(
            f"{file}: `peft_type`, `r` and `lora_alpha` are {kind!r}, {rank!r} and {alpha!r}; expected LORA and numbers"
        )
    unsupported = [key for key in _MUST_BE_EMPTY if fields.get(key)]
    unsupported += ["bias"] if fields.get("bias", "none") != "none" else []
    unsupported += ["init_lora_weights"] if str(fields.get("init_lora_weights")).startswith(_CHANGES_BASE) else []
    if unsupported:
        raise ModelError(
            f"{file}: `{unsupported[0]}` is {fields[unsupported[0]]!r}, which is not built in; merge the adapter with "
            "peft (`merge_and_unload`) and use the merged model"
        )
    for key in ("base_model_name_or_path", "revision"):
        if not isinstance(fields.get(key), str | None):
            raise ModelError(f"{file}: `{key}` is {fields[key]!r}; expected text or null")
    return AdapterFolder(folder, fields.get("base_model_name_or_path") or None, fields.get("revision"), rank, alpha)


def load(folder: Path, model: Model, mesh: Mesh) -> Params:
    """Reads an adapter onto the mesh as float32: the trained part of the parameters, as `Model.split` returns it.

    Args:
        folder: the folder with `adapter_model.safetensors`.
        model: the base model with the adapter that the folder describes.
        mesh: the mesh that the arrays are placed on.

    Raises:
        ModelError: a tensor does not have the shape that follows from the base model and the rank.
        MeshError: the mesh does not divide the model.
    """
    files = _open(folder)
    shardings = model.split(model.shardings(mesh))[0]

    def load_matrix(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.Array:
        keys = [key.key for key in path]  # layers, attention, q, adapter, a
        tensors = _peft_tensors(model.config, "/".join(keys[1:-2]))
        names = {layer: name for layer, matrix, name in tensors if matrix == keys[-1]}
        for name in names.values():  # all before memory is taken for what `r` says
            files.check_dtype(name)
            if files.shape(name) != leaf.shape[:0:-1]:
                raise ModelError(
                    f"{files.locate(name)} has shape {list(files.shape(name))}, but the base model and `r` of {CONFIG} "
                    f"make it {list(leaf.shape[:0:-1])}; give the base model that the adapter was trained on"
                )
        stacked = np.empty(leaf.shape, np.float32)
        for layer, name in names.items():
            stacked[layer] = files.read(name, (slice(None), slice(None))).T
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: stacked[index])

    return jax.tree_util.tree_map_with_path(load_matrix, model.split(model.abstract)[0], shardings)


def save(
    params: Params,
    model: Model,
    folder: str | Path,
    dtype: str = "float32",
    *,
    base: str | None,
    revision: str | None = None,
    tokenizer: Any = None,
) -> Path:
    """Writes an adapter without its base, as a folder that `peft.PeftModel.from_pretrained` loads.

    As with `save_model`, a killed export leaves no half adapter; every process calls this and the first one writes.

    Args:
        params: the model's parameters, or the adapter's alone.
        model: the model of these parameters, with an adapter.
        folder: the folder to write; an earlier export there is replaced.
        dtype: of the stored matrices, `float32` or `bfloat16`.
        base: the base model, a folder or hub id.
        revision: branch, tag or commit of a base on the hub.
        tokenizer: a transformers tokenizer, saved alongside.

    Raises:
        ModelError: the folder holds files that are not part of a model, or cannot be written.
    """
    assert model.lora is not None
    adapters = {path: _adapter_of(model.split(params)[0], path) for path in model.lora.targets}
    matrices = {(path, key): _fetch(leaf) for path, adapter in adapters.items() for key, leaf in adapter.items()}
    tensors = [(layer, path, key, name) for path in adapters for layer, key, name in _peft_tensors(model.config, path)]
    tensors.sort(key=lambda tensor: tensor[0])  # layer by layer
    with write.replacing(folder) as temporary:
        if temporary:
            shapes = {name: matrices[path, key].shape[:0:-1] for _, path, key, name in tensors}
            with TensorWriter(temporary / WEIGHTS, shapes, dtype) as writer:
                for layer, path, key, name in tensors:
                    writer.write(name, matrices[path, key][layer].T)
            write.write_json(temporary / CONFIG, _fields(model, base, revision))
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
    return Path(folder)


def _fields(model: Model, base: str | None, revision: str | None) -> dict[str, Any]:
    """Returns the content of `adapter_config.json`. peft fills absent fields with its defaults."""
    assert model.lora is not None
    modules = linear_layers(model.config.model_type)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": model.lora.rank,
        "lora_alpha": model.lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": [modules[path].rpartition(".")[2] for path in model.lora.targets],
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "inference_mode": True,
    }


def _peft_tensors(config: ModelConfig, path: str) -> Iterator[tuple[int, str, str]]:
    """Lists the tensors of a linear layer's adapters: decoder layer, matrix (`a` or `b`), name of the tensor in peft.

    peft stores the matrices transposed: A is [rank, in] and B [out, rank].
    """
    module = linear_layers(config.model_type)[path]
    for layer in range(config.num_layers):
        for key in ("a", "b"):
            yield layer, key, f"base_model.model.{module.format(layer)}.lora_{key.upper()}.weight"


def _adapter_of(adapters: Params, path: str) -> dict[str, jax.Array]:
    """Returns the matrices of a linear layer's adapters, `a` and `b`, each stacked over the decoder layers."""
    subtree: Any = adapters["layers"]
    for key in path.split("/"):
        subtree = subtree[key]
    return subtree[ADAPTER_KEY]


def _fetch(leaf: jax.Array) -> np.ndarray:
    """Copies a matrix to the host. It is replicated first, so that each process holds all of it."""
    sharding = leaf.sharding
    if isinstance(sharding, NamedSharding):
        leaf = jax.jit(lambda x: x, out_shardings=NamedSharding(sharding.mesh, P()))(leaf)
    return np.asarray(leaf.addressable_data(0))


def _open(folder: Path) -> WeightFiles:
    if not (folder / WEIGHTS).is_file():
        raise ModelError(f"{folder}: has {CONFIG} but no {WEIGHTS}; an adapter is read from safetensors only")
    return WeightFiles(folder, [WEIGHTS])
