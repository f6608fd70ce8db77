"""Lists the tensors of a model's checkpoint: their names and shapes, and the parts of the parameters they store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from jax_simpo.hf.families import FAMILIES
from jax_simpo.models.transformer import Model


@dataclass(frozen=True)
class CheckpointTensor:
    """One tensor of a checkpoint, and the part of the parameters that it stores.

    Attributes:
        name: the tensor's name in the checkpoint.
        path: the parameter's path, such as "layers/mlp/up/kernel".
        layer: the tensor's index in a parameter that stacks all layers; None for other parameters.
        shape: the tensor's shape in the checkpoint.
        transposed: True for kernels, which are [in, out] in the parameters and [out, in] in the checkpoint.
    """

    name: str
    path: str
    layer: int | None
    shape: tuple[int, ...]
    transposed: bool


def checkpoint_tensors(model: Model) -> list[CheckpointTensor]:
    """Returns every tensor of the model's checkpoint, layer by layer in the order of the family's table."""
    shapes = {join_path(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(model.abstract)}
    names = {path: name for path, name in FAMILIES[model.config.model_type].names.items() if path in shapes}

    def tensor(path: str, layer: int | None) -> CheckpointTensor:
        shape, transposed = shapes[path][0 if layer is None else 1 :], path.endswith("/kernel")
        return CheckpointTensor(
            names[path].format(layer), path, layer, shape[::-1] if transposed else shape, transposed
        )

    stacked = [path for path in names if path.startswith("layers/")]
    single = [tensor(path, None) for path in names if path not in stacked]
    layers = [tensor(path, layer) for layer in range(model.config.num_layers) for path in stacked]
    return [single[0], *layers, *single[1:]]  # the embedding first, the norm and the head last


def tensor_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape of the tensors of the model's checkpoint, in the order of export."""
    return {tensor.name: tensor.shape for tensor in checkpoint_tensors(model)}


def join_path(path: tuple[Any, ...]) -> str:
    """Joins the keys of a parameter's path in the tree with slashes."""
    return "/".join(key.key for key in path)
