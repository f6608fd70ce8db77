"""Describes Qwen 3 (dense): Qwen 2 without its biases, and with a norm of each head's query and key before RoPE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jax_simpo.hf.families import llama
from jax_simpo.hf.families.family import Family
from jax_simpo.hf.families.qwen2 import ABSENT, read_windows, write_windows
from jax_simpo.hf.fields import Fields

if TYPE_CHECKING:
    from jax_simpo.models.config import ModelConfig

_NAMES = {
    **llama.NAMES,
    "layers/attention/q_norm/scale": "model.layers.{}.self_attn.q_norm.weight",
    "layers/attention/k_norm/scale": "model.layers.{}.self_attn.k_norm.weight",
}


def _read(fields: Fields) -> dict[str, Any]:
    fields.require("hidden_act", "silu")
    bias = fields.flag("attention_bias", False)
    return {"qkv_bias": bias, "output_bias": bias, "qk_norm": True, "layer_windows": read_windows(fields)}


def _write(config: ModelConfig) -> dict[str, Any]:
    return {"hidden_act": "silu", "attention_bias": config.qkv_bias, **write_windows(config)}


QWEN3 = Family("Qwen3ForCausalLM", _NAMES, _read, _write, {**ABSENT, "head_dim": 128})
