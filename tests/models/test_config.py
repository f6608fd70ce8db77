"""`ModelConfig` reads what transformers writes, writes what transformers reads, and refuses to guess."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from transformers import LlamaConfig

from jax_simpo.errors import ModelError
from jax_simpo.models.config import LinearScaling, Llama3Scaling, ModelConfig, Rope

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_the_llama_3_1_file_of_transformers_4_is_read() -> None:
    config = ModelConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009],
            "hidden_act": "silu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 14336,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": LLAMA3,
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.43.0.dev0",
            "use_cache": True,
            "vocab_size": 128256,
        }
    )
    assert (config.head_dim, config.num_kv_heads, config.rms_norm_eps) == (128, 8, 1e-5)
    assert config.rope == Rope(500000.0, Llama3Scaling(8.0, 1.0, 4.0, 8192))
    assert config.eos_token_id == (128001, 128008, 128009)


def test_absent_fields_mean_what_they_mean_in_transformers(hf_config: dict[str, Any]) -> None:
    for key in ("num_key_value_heads", "max_position_embeddings", "initializer_range"):
        del hf_config[key]
    ours, theirs = ModelConfig.from_hf(hf_config), LlamaConfig(**hf_config)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == theirs.head_dim
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.initializer_range == theirs.initializer_range
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings


@pytest.mark.parametrize(
    ("fields", "rope"),
    [
        ({"rope_theta": 5e5}, Rope(5e5)),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, Rope(5e5, Llama3Scaling(8.0, 1.0, 4.0, 8192))),
        ({"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}, Rope(5e5, Llama3Scaling(8.0, 1.0, 4.0, 8192))),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, Rope(5e5)),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, Rope(1e4, LinearScaling(4.0))),
        ({"rope_scaling": None, "rope_theta": 5e5}, Rope(5e5)),
    ],
)
def test_rope_is_read_in_the_way_of_transformers_4_and_5(
    hf_config: dict[str, Any], fields: dict[str, Any], rope: Rope
) -> None:
    assert ModelConfig.from_hf({**hf_config, **fields}).rope == rope


@pytest.mark.parametrize("scaling", [None, LinearScaling(4.0), Llama3Scaling(8.0, 1.0, 4.0, 8192)])
@pytest.mark.parametrize("eos", [None, 2, (2, 5)])
def test_writing_and_reading_back_changes_nothing(
    hf_config: dict[str, Any], scaling: LinearScaling | Llama3Scaling | None, eos: int | tuple[int, ...] | None
) -> None:
    config = replace(ModelConfig.from_hf(hf_config), rope=Rope(5e5, scaling), eos_token_id=eos, attention_bias=True)
    assert ModelConfig.from_hf(config.to_hf()) == config
    assert ModelConfig.from_hf(LlamaConfig(**config.to_hf()).to_dict()) == config


def test_a_trained_config_turns_the_cache_back_on(hf_config: dict[str, Any]) -> None:
    assert ModelConfig.from_hf({**hf_config, "use_cache": False}).to_hf()["use_cache"] is True


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "mamba"}, r"model_type='mamba'; supported are llama \(LlamaForCausalLM\)"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; only 'silu'"),
        ({"sliding_window": 4096}, "unknown field.*`sliding_window`=4096"),
        ({"attn_logit_softcapping": 50.0}, "unknown field.*attn_logit_softcapping"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1 is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"auto_map": {"AutoModel": "modeling.X"}}, "code of its own"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "rope_scaling: no field `low_freq_factor`"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0, "beta": 1}}, "rope_scaling: unknown field.*beta"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta=500000.0 differs"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "default"}},
            "`rope_scaling` and `rope_parameters` disagree",
        ),
        ({"vocab_size": "320"}, "vocab_size='320', expected a positive whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes', expected true or false"),
        ({"eos_token_id": "</s>"}, "eos_token_id='</s>', expected a token id"),
        ({"num_attention_heads": 7}, "hidden_size=64 is not a multiple of num_attention_heads=7"),
        ({"num_key_value_heads": 3}, "num_attention_heads=8 is not a multiple of num_key_value_heads=3"),
        ({"head_dim": 15}, "head_dim=15 is odd"),
    ],
)
def test_what_is_not_supported_is_an_error_that_names_it(
    hf_config: dict[str, Any], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message) as error:
        ModelConfig.from_hf({**hf_config, **fields}, where="the/config.json")
    assert str(error.value).startswith("the/config.json")


def test_a_missing_size_is_an_error_that_names_it(hf_config: dict[str, Any]) -> None:
    del hf_config["intermediate_size"]
    with pytest.raises(ModelError, match="no field `intermediate_size`"):
        ModelConfig.from_hf(hf_config)


def test_fields_that_do_not_change_the_mathematics_are_accepted(hf_config: dict[str, Any]) -> None:
    harmless = {"pretraining_tp": 2, "unsloth_version": "x", "_name_or_path": "y", "sliding_window": None}
    assert ModelConfig.from_hf({**hf_config, **harmless}) == ModelConfig.from_hf(hf_config)
