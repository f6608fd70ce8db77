"""Describes Llama 2, 3 and 3.x. The other families are described by their differences from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jax_simpo.hf.families.family import Family
from jax_simpo.hf.fields import Fields

if TYPE_CHECKING:
    from jax_simpo.models.config import ModelConfig

NAMES = {
    "embed/embedding": "model.embed_tokens.weight",
    "layers/attention_norm/scale": "model.layers.{}.input_layernorm.weight",
    "layers/attention/q/kernel": "model.layers.{}.self_attn.q_proj.weight",
    "layers/attention/q/bias": "model.layers.{}.self_attn.q_proj.bias",
    "layers/attention/k/kernel": "model.layers.{}.self_attn.k_proj.weight",
    "layers/attention/k/bias": "model.layers.{}.self_attn.k_proj.bias",
    "layers/attention/v/kernel": "model.layers.{}.self_attn.v_proj.weight",
    "layers/attention/v/bias": "model.layers.{}.self_attn.v_proj.bias",
    "layers/attention/o/kernel": "model.layers.{}.self_attn.o_proj.weight",
    "layers/attention/o/bias": "model.layers.{}.self_attn.o_proj.bias",
    "layers/mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers/mlp/gate/kernel": "model.layers.{}.mlp.gate_proj.weight",
    "layers/mlp/gate/bias": "model.layers.{}.mlp.gate_proj.bias",
    "layers/mlp/up/kernel": "model.layers.{}.mlp.up_proj.weight",
    "layers/mlp/up/bias": "model.layers.{}.mlp.up_proj.bias",
    "layers/mlp/down/kernel": "model.layers.{}.mlp.down_proj.weight",
    "layers/mlp/down/bias": "model.layers.{}.mlp.down_proj.bias",
    "final_norm/scale": "model.norm.weight",
    "lm_head/embedding": "lm_head.weight",
}


def _read(fields: Fields) -> dict[str, Any]:
    fields.require("hidden_act", "silu")
    bias = fields.flag("attention_bias", False)
    return {"qkv_bias": bias, "output_bias": bias, "mlp_bias": fields.flag("mlp_bias", False)}


def _write(config: ModelConfig) -> dict[str, Any]:
    return {"hidden_act": "silu", "attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


LLAMA = Family("LlamaForCausalLM", NAMES, _read, _write, absent={})
