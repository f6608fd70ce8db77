"""Describes Gemma 2: soft caps, windows in every other layer, four norms a block (times `1 + w`), scaled embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jax_simpo.hf.families import llama
from jax_simpo.hf.families.family import Family
from jax_simpo.hf.fields import Fields

if TYPE_CHECKING:
    from jax_simpo.models.config import ModelConfig

# Llama's `post_attention_layernorm` norms the input of the feed-forward part. Gemma 2 has that norm under another name,
# and gives this name to a norm of the output of attention.
_NAMES = {
    **llama.NAMES,
    "layers/attention_post_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers/mlp_norm/scale": "model.layers.{}.pre_feedforward_layernorm.weight",
    "layers/mlp_post_norm/scale": "model.layers.{}.post_feedforward_layernorm.weight",
}


def _read(fields: Fields) -> dict[str, Any]:
    fields.require("hidden_activation", "gelu_pytorch_tanh")
    # Published files have these two fields, but transformers uses `hidden_activation` and `sliding_window` alone.
    fields.ignore("hidden_act", "sliding_window_size")
    bias, layers = fields.flag("attention_bias", False), fields.size("num_hidden_layers")
    return {
        "qkv_bias": bias,
        "output_bias": bias,
        "activation": "gelu_tanh",
        "post_norms": True,
        "norm_offset": True,
        "scale_embeddings": True,
        "query_pre_attn_scalar": fields.size("query_pre_attn_scalar"),
        "attention_softcap": fields.number_or_none("attn_logit_softcapping"),
        "logit_softcap": fields.number_or_none("final_logit_softcapping"),
        "layer_windows": fields.windows(fields.size_or_none("sliding_window"), [i % 2 == 0 for i in range(layers)]),
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": "gelu_pytorch_tanh",  # for programs that read this older field
        "attention_bias": config.qkv_bias,
        "query_pre_attn_scalar": config.query_pre_attn_scalar,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
        # transformers builds the mask of windowed layers even for a model without any, so it needs a size.
        "sliding_window": max((window for window in config.layer_windows if window), default=4096),
        "layer_types": config.layer_types,
    }


GEMMA2 = Family(
    "Gemma2ForCausalLM",
    _NAMES,
    _read,
    _write,
    absent={
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
)
