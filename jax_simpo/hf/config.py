"""Reads a `ModelConfig` from a Hugging Face `config.json`, and writes one back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jax_simpo.errors import ModelError
from jax_simpo.hf.families import FAMILIES
from jax_simpo.hf.fields import Fields
from jax_simpo.models.config import LinearScaling, Llama3Scaling, ModelConfig, Rope

# A hundred times as deep as the largest published models. Everything that is listed once for each layer, such as the
# names of tensors, is listed before the weights are looked at.
MOST_LAYERS = 10_000


def read_model_config(raw: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """Reads a Hugging Face model configuration, as transformers 4 or 5 writes it.

    Args:
        raw: the parsed `config.json`, or a mapping of the same shape.
        source: the file or config key that `raw` comes from, for error messages.

    Raises:
        ModelError: the architecture or a field is not supported, missing or of the wrong type.
    """
    model_type = _model_type(raw, source)
    family = FAMILIES[model_type]
    raw = {**family.absent, **raw}
    fields = Fields(raw, source)
    hidden_size = fields.size("hidden_size")
    num_heads = fields.size("num_attention_heads")
    num_kv_heads = fields.size("num_key_value_heads", num_heads)
    if raw.get("head_dim") is None and hidden_size % num_heads:
        raise ModelError(
            f"{source}: hidden_size={hidden_size} is not a multiple of num_attention_heads={num_heads}; set "
            "`head_dim`, or sizes that divide"
        )
    if num_heads % num_kv_heads:
        raise ModelError(
            f"{source}: num_attention_heads={num_heads} is not a multiple of num_key_value_heads={num_kv_heads}"
        )
    head_dim = fields.size("head_dim", hidden_size // num_heads)
    if head_dim % 2:
        raise ModelError(f"{source}: head_dim={head_dim} is odd; rotary positions turn pairs, so it must be even")
    num_layers = fields.size("num_hidden_layers", most=MOST_LAYERS)
    common = ModelConfig(
        model_type=model_type,
        vocab_size=fields.size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.size("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=fields.size("max_position_embeddings", 2048),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=_rope(fields),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        initializer_range=fields.number("initializer_range", 0.02),
        query_pre_attn_scalar=head_dim,
        layer_windows=(None,) * num_layers,
        bos_token_id=fields.token("bos_token_id"),
        eos_token_id=fields.token("eos_token_id", or_list=True),
        pad_token_id=fields.token("pad_token_id"),
    )
    config = replace(common, **family.read(fields))
    fields.refuse_the_rest()
    return config


def write_model_config(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """Returns the content of a model's `config.json`, for weights stored in `dtype`. transformers 4 and 5 load it.

    RoPE is written as transformers 4 writes it (`rope_theta`, `rope_scaling`), because both versions read that form.
    """
    scaling: dict[str, Any] | None = None
    if isinstance(config.rope.scaling, LinearScaling):
        scaling = {"rope_type": "linear", **vars(config.rope.scaling)}
    elif isinstance(config.rope.scaling, Llama3Scaling):
        scaling = {"rope_type": "llama3", **vars(config.rope.scaling)}
    eos = list(config.eos_token_id) if isinstance(config.eos_token_id, tuple) else config.eos_token_id
    return {
        "architectures": [FAMILIES[config.model_type].architecture],
        "attention_dropout": 0.0,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos,
        "head_dim": config.head_dim,
        "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": config.model_type,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "pad_token_id": config.pad_token_id,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": scaling,
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": config.vocab_size,
        **FAMILIES[config.model_type].write(config),
    }


def _model_type(raw: Mapping[str, Any], source: str) -> str:
    """Returns the key of `FAMILIES` that a configuration names, by its `model_type` or else by its architecture."""
    supported = ", ".join(f"{kind} ({family.architecture})" for kind, family in FAMILIES.items())
    architectures = raw.get("architectures") or []
    model_type = raw.get("model_type")
    if not isinstance(architectures, list | tuple) or not isinstance(model_type, str | None):
        raise ModelError(
            f"{source}: model_type={model_type!r}, architectures={architectures!r}; expected text and a list of texts"
        )
    if model_type is None:  # old files and hand-written mappings name the class alone
        model_type = next((kind for kind, family in FAMILIES.items() if family.architecture in architectures), None)
    if model_type not in FAMILIES:
        problem = f"model_type={model_type!r}" if model_type else "no field `model_type`"
        raise ModelError(f"{source}: {problem}; supported are {supported}")
    if architectures and FAMILIES[model_type].architecture not in architectures:
        raise ModelError(f"{source}: architectures={architectures!r} is not a supported language model: {supported}")
    return model_type


def _rope(fields: Fields) -> Rope:
    """Reads `rope_scaling` + `rope_theta` (transformers 4) or `rope_parameters` (transformers 5)."""
    ropes = []
    for key in ("rope_scaling", "rope_parameters"):
        fields.read.add(key)
        value = fields.raw.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise ModelError(f"{fields.source}: {key}={value!r}, expected a mapping with `rope_type`")
        if value:
            ropes.append(_rope_of(value, fields, f"{fields.source}: {key}"))
    if not ropes:
        return Rope(theta=fields.number("rope_theta", 10000.0))
    if any(rope != ropes[0] for rope in ropes):
        raise ModelError(f"{fields.source}: `rope_scaling` and `rope_parameters` disagree; keep one of them")
    return ropes[0]


def _rope_of(value: Mapping[str, Any], top: Fields, source: str) -> Rope:
    """Reads one RoPE mapping; `top` holds the configuration's own fields, where `rope_theta` may stand instead."""
    inner = Fields(value, source)
    theta = inner.number("rope_theta", top.number("rope_theta", 10000.0))
    if top.raw.get("rope_theta") is not None and theta != top.number("rope_theta"):
        raise ModelError(f"{source}: rope_theta={theta} differs from the field `rope_theta` outside; keep one of them")
    inner.read |= {"rope_type", "type"}
    kind = value.get("rope_type", value.get("type", "default"))
    scaling: LinearScaling | Llama3Scaling | None
    match kind:
        case "default":
            scaling = None
        case "linear":
            scaling = LinearScaling(factor=inner.number("factor"))
        case "llama3":
            scaling = Llama3Scaling(
                factor=inner.number("factor"),
                low_freq_factor=inner.number("low_freq_factor"),
                high_freq_factor=inner.number("high_freq_factor"),
                original_max_position_embeddings=inner.size("original_max_position_embeddings"),
            )
        case _:
            raise ModelError(f"{source}: rope_type={kind!r} is not supported; supported are default, linear and llama3")
    inner.refuse_the_rest()
    return Rope(theta=theta, scaling=scaling)
