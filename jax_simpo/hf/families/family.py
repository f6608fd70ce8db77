"""Defines the description of a model family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jax_simpo.hf.fields import Fields

if TYPE_CHECKING:
    from jax_simpo.models.config import ModelConfig

# Old checkpoints carry the RoPE frequencies, which follow from config.json.
_ROPE_FREQUENCIES = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq")


@dataclass(frozen=True)
class Family:
    """The description of a model family: its configuration's own fields, and the names of its checkpoints' tensors.

    Attributes:
        architecture: the class with which transformers loads a model of the family.
        names: parameter path -> name of the checkpoint's tensor, in which `{}` stands for the layer's number. The
            checkpoint stores kernels transposed ([out, in]) and everything else unchanged. Paths of parameters that a
            configuration does not have are skipped.
        read: returns the values of `ModelConfig` that differ from its defaults, from the configuration's fields.
        write: returns the configuration's fields besides those that all families have.
        absent: the values of fields that are not in the file, where transformers has other defaults for the family.
        ignored: patterns of tensors that a checkpoint may hold and the model does not use.
    """

    architecture: str
    names: Mapping[str, str]
    read: Callable[[Fields], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]
    absent: Mapping[str, Any]
    ignored: tuple[str, ...] = _ROPE_FREQUENCIES
