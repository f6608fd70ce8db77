"""Tests that configurations go from transformers and back unchanged, and that unknown fields are refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from transformers import AutoConfig, LlamaConfig

from jax_simpo.errors import ModelError
from jax_simpo.hf.config import read_model_config, write_model_config
from jax_simpo.models.config import LinearScaling, Llama3Scaling, Rope

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_the_llama_3_1_file_of_transformers_4_is_read() -> None:
    config = read_model_config(
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
    ours, theirs = read_model_config(hf_config), LlamaConfig(**hf_config)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == theirs.head_dim
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.initializer_range == theirs.initializer_range
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings


MINIMAL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
}


@pytest.mark.parametrize("family", ["mistral", "gemma2", "qwen2", "qwen3"])
def test_absent_fields_mean_what_they_mean_in_transformers_for_every_family(family: str) -> None:
    ours, theirs = read_model_config({"model_type": family, **MINIMAL}), AutoConfig.for_model(family, **MINIMAL)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == getattr(theirs, "head_dim", 64 // 32)
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.query_pre_attn_scalar == getattr(theirs, "query_pre_attn_scalar", ours.head_dim)
    assert ours.attention_softcap == getattr(theirs, "attn_logit_softcapping", None)
    assert ours.logit_softcap == getattr(theirs, "final_logit_softcapping", None)
    types = getattr(theirs, "layer_types", ["sliding_attention"] * 4)
    assert ours.layer_windows == tuple(theirs.sliding_window if t == "sliding_attention" else None for t in types)


COMMON = {"attention_dropout": 0.0, "initializer_range": 0.02, "torch_dtype": "bfloat16", "use_cache": True}
# The content of published files, as transformers 4 wrote them.
PUBLISHED: dict[str, dict[str, Any]] = {
    "Mistral-7B-Instruct-v0.1": {
        **COMMON,
        "architectures": ["MistralForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "transformers_version": "4.34.0.dev0",
        "vocab_size": 32000,
    },
    "gemma-2-9b-it": {
        **COMMON,
        "architectures": ["Gemma2ForCausalLM"],
        "attention_bias": False,
        "attn_logit_softcapping": 50.0,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": 1,
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "max_position_embeddings": 8192,
        "model_type": "gemma2",
        "num_attention_heads": 16,
        "num_hidden_layers": 42,
        "num_key_value_heads": 8,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "sliding_window_size": 4096,
        "transformers_version": "4.42.0.dev0",
        "vocab_size": 256000,
    },
    "Qwen2.5-7B": {
        **COMMON,
        "architectures": ["Qwen2ForCausalLM"],
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "hidden_act": "silu",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 131072,
        "max_window_layers": 28,
        "model_type": "qwen2",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "transformers_version": "4.40.1",
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": 152064,
    },
    "Qwen3-8B": {
        **COMMON,
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "max_position_embeddings": 40960,
        "max_window_layers": 36,
        "model_type": "qwen3",
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "transformers_version": "4.51.0",
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
}


def test_published_files_are_read() -> None:
    configs = {name: read_model_config(raw) for name, raw in PUBLISHED.items()}
    mistral, gemma, qwen2, qwen3 = configs.values()
    assert mistral.windows == (4096,)
    assert gemma.layer_windows == (4096, None) * 21
    assert (gemma.attention_softcap, gemma.logit_softcap, gemma.query_pre_attn_scalar) == (50.0, 30.0, 256)
    assert gemma.tie_word_embeddings and gemma.post_norms and gemma.norm_offset and gemma.scale_embeddings
    assert qwen2.windows == (None,) and qwen2.qkv_bias and not qwen2.output_bias
    assert qwen3.windows == (None,) and qwen3.qk_norm and not qwen3.qkv_bias and qwen3.head_dim == 128


@pytest.mark.parametrize("name", PUBLISHED)
def test_writing_and_reading_back_changes_nothing_in_any_family(name: str) -> None:
    config = read_model_config(PUBLISHED[name])
    assert read_model_config(write_model_config(config)) == config
    fields = write_model_config(config)
    assert read_model_config(AutoConfig.for_model(fields.pop("model_type"), **fields).to_dict()) == config


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({"max_window_layers": 3}, (None, None, None, 16)),
        ({"max_window_layers": 0}, (16, 16, 16, 16)),
        ({"layer_types": ["sliding_attention", "full_attention"] * 2}, (16, None, 16, None)),
        ({"use_sliding_window": False}, (None, None, None, None)),
    ],
)
def test_windows_of_qwen_layers_are_those_of_transformers(
    fields: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    raw = {**MINIMAL, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 4, **fields}
    theirs = AutoConfig.for_model("qwen2", **raw)
    types = ["sliding_attention" if window else "full_attention" for window in windows]
    assert theirs.layer_types == types
    config = read_model_config({"model_type": "qwen2", **raw})
    assert config.layer_windows == windows
    assert read_model_config(write_model_config(config)) == config


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("mistral", {"layer_types": ["full_attention"] * 4}, "unknown field.*layer_types"),
        ("mistral", {"attention_bias": True}, "unknown field.*attention_bias"),
        ("mistral", {"sliding_window": -1}, "sliding_window=-1, expected a positive whole number"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation='gelu' is not supported"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
        ("gemma2", {"layer_types": ["full_attention"] * 3}, "layer_types has 3 entries, but num_hidden_layers=4"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 4}, "layer_types=.*expected a list of 'full_attention'"),
        ("gemma2", {"sliding_window": None}, "layers with sliding attention, but no window; set `sliding_window`"),
        ("gemma2", {"attn_logit_softcapping": "50"}, "attn_logit_softcapping='50', expected a positive number"),
        ("gemma2", {"sliding_window_pattern": 6}, "unknown field.*sliding_window_pattern"),
        ("qwen2", {"use_mrope": True}, "use_mrope=True is not supported"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "no window; .*`use_sliding_window`"),
        ("qwen2", {"dual_chunk_attention_config": {"chunk_size": 4}}, "unknown field.*dual_chunk_attention_config"),
        ("qwen3", {"mlp_bias": True}, "unknown field.*mlp_bias"),
        ("qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn' is not supported"),
    ],
)
def test_what_a_family_does_not_know_is_an_error(family: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_model_config({"model_type": family, **MINIMAL, **fields})


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
    assert read_model_config({**hf_config, **fields}).rope == rope


@pytest.mark.parametrize("scaling", [None, LinearScaling(4.0), Llama3Scaling(8.0, 1.0, 4.0, 8192)])
@pytest.mark.parametrize("eos", [None, 2, (2, 5)])
def test_writing_and_reading_back_changes_nothing(
    hf_config: dict[str, Any], scaling: LinearScaling | Llama3Scaling | None, eos: int | tuple[int, ...] | None
) -> None:
    config = replace(
        read_model_config(hf_config), rope=Rope(5e5, scaling), eos_token_id=eos, qkv_bias=True, output_bias=True
    )
    assert read_model_config(write_model_config(config)) == config
    assert read_model_config(LlamaConfig(**write_model_config(config)).to_dict()) == config


def test_a_trained_config_turns_the_cache_back_on(hf_config: dict[str, Any]) -> None:
    assert write_model_config(read_model_config({**hf_config, "use_cache": False}))["use_cache"] is True


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model_type": "mamba"},
            r"model_type='mamba'; supported are llama \(LlamaForCausalLM\), mistral .*gemma2 .*qwen2 .*qwen3",
        ),
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
        ({"num_hidden_layers": 10**12}, "num_hidden_layers=1000000000000, expected at most 10,000"),
        ({"hidden_size": 2**31}, "hidden_size=2147483648, expected at most 2,147,483,647"),
        ({"rope_theta": 10**400}, "rope_theta=1000.*, expected a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan, expected a positive number"),
        ({"model_type": ["llama"]}, r"model_type=\['llama'\], .*; expected text and a list of texts"),
        ({"architectures": 3}, "architectures=3; expected text and a list of texts"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes', expected true or false"),
        ({"eos_token_id": "</s>"}, "eos_token_id='</s>', expected a token id"),
        ({"num_attention_heads": 7}, "hidden_size=64 is not a multiple of num_attention_heads=7"),
        ({"num_key_value_heads": 3}, "num_attention_heads=8 is not a multiple of num_key_value_heads=3"),
        ({"head_dim": 15}, "head_dim=15 is odd"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000, expected at most 10,000"),
        ({"max_position_embeddings": 10**30}, "max_position_embeddings=10{30}, expected at most 2,147,483,647"),
        ({"rms_norm_eps": math.inf}, "rms_norm_eps=inf, expected a positive number"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps=nan, expected a positive number"),
        ({"rope_theta": 10**400}, "rope_theta=10{400}, expected a positive number"),
    ],
)
def test_what_is_not_supported_is_an_error_that_names_it(
    hf_config: dict[str, Any], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message) as error:
        read_model_config({**hf_config, **fields}, source="the/config.json")
    assert str(error.value).startswith("the/config.json")


def test_a_missing_size_is_an_error_that_names_it(hf_config: dict[str, Any]) -> None:
    del hf_config["intermediate_size"]
    with pytest.raises(ModelError, match="no field `intermediate_size`"):
        read_model_config(hf_config)


def test_fields_that_do_not_change_the_mathematics_are_accepted(hf_config: dict[str, Any]) -> None:
    harmless = {"pretraining_tp": 2, "unsloth_version": "x", "_name_or_path": "y", "sliding_window": None}
    assert read_model_config({**hf_config, **harmless}) == read_model_config(hf_config)


@pytest.mark.parametrize(
    "key", ["unk_token_id", "sep_token_id", "image_token_id", "boi_token_id", "suppress_token_ids"]
)
def test_ids_of_tokens_are_accepted_whatever_they_are_called(hf_config: dict[str, Any], key: str) -> None:
    assert read_model_config({**hf_config, key: 3}) == read_model_config(hf_config)
