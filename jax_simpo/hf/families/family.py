"""What one family of models says about itself."""

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
    """A family: its configuration's own fields, and how the tensors of its Hugging Face checkpoints are called.

    Attributes:
        architecture: the class transformers loads it with.
        names: our parameter path -> Hugging Face name, `{}` being the layer number. Kernels are stored the other way
            round there ([out, in]); everything else as it is. Paths that a configuration has no use for are skipped.
        read: what of `ModelConfig` differs from its defaults, by the configuration's fields.
        write: the fields to write for a configuration, beside those that all families have.
        absent: what a field means that is not in the file, where transformers has a default of its own for the family.
        ignored: patterns of tensors that a checkpoint may hold and the model has no use for.
    """

    architecture: str
    names: Mapping[str, str]
    read: Callable[[Fields], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]
    absent: Mapping[str, Any]
    ignored: tuple[str, ...] = _ROPE_FREQUENCIES
