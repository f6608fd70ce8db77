"""Describes Mistral: a Llama with a sliding window in the attention of all layers, or of none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jax_simpo.hf.families import llama
from jax_simpo.hf.families.family import Family
from jax_simpo.hf.fields import Fields

if TYPE_CHECKING:
    from jax_simpo.models.config import ModelConfig


def _read(fields: Fields) -> dict[str, Any]:
    fields.require("hidden_act", "silu")
    return {"layer_windows": (fields.size_or_none("sliding_window"),) * fields.size("num_hidden_layers")}


def _write(config: ModelConfig) -> dict[str, Any]:
    return {"hidden_act": "silu", "sliding_window": config.layer_windows[0]}


MISTRAL = Family(
    "MistralForCausalLM",
    llama.NAMES,
    _read,
    _write,
    absent={"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
)
