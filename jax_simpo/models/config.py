"""What a decoder looks like, read from a Hugging Face `config.json` and written back to one.

Every field of the file is either read, known to be harmless, or an error: a field that changes the mathematics and is
unknown here would give a model that runs and is wrong.

A further family is a further entry in `ARCHITECTURES`, the fields it needs in `ModelConfig` (a default that means
"off" keeps the other families as they are), and its name table in `jax_simpo.models.families`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jax_simpo.errors import ModelError

ARCHITECTURES = {"llama": "LlamaForCausalLM"}  # model_type -> the class transformers loads it with


@dataclass(frozen=True)
class LinearScaling:
    """All RoPE frequencies divided by one factor (position interpolation, arXiv 2306.15595)."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's RoPE: long wavelengths divided by `factor`, short ones kept, a ramp between the two."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: the base of its frequencies and how they are stretched for longer contexts."""

    theta: float = 10000.0
    scaling: LinearScaling | Llama3Scaling | None = None


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of a decoder; everything the weights and the forward pass depend on."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Rope
    tie_word_embeddings: bool
    attention_bias: bool  # on q, k, v and o
    mlp_bias: bool  # on gate, up and down
    initializer_range: float
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The distinct sliding windows of the layers' attention, in positions; `None` sees everything before it."""
        return (None,)

    @staticmethod
    def from_hf(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """Reads a Hugging Face model configuration, as transformers 4 or 5 writes it.

        Args:
            raw: the parsed `config.json`, or a mapping of the same shape.
            where: the file or config key it comes from, for error messages.

        Raises:
            ModelError: the architecture or a field is not supported, missing or of the wrong type.
        """
        fields = _Fields(raw, where)
        model_type = _model_type(fields)
        hidden_size = fields.size("hidden_size")
        num_heads = fields.size("num_attention_heads")
        num_kv_heads = fields.size("num_key_value_heads", num_heads)
        if raw.get("head_dim") is None and hidden_size % num_heads:
            raise ModelError(
                f"{where}: hidden_size={hidden_size} is not a multiple of num_attention_heads={num_heads}; set "
                "`head_dim`, or sizes that divide"
            )
        if num_heads % num_kv_heads:
            raise ModelError(
                f"{where}: num_attention_heads={num_heads} is not a multiple of num_key_value_heads={num_kv_heads}"
            )
        head_dim = fields.size("head_dim", hidden_size // num_heads)
        if head_dim % 2:
            raise ModelError(f"{where}: head_dim={head_dim} is odd; rotary positions turn pairs, so it must be even")
        config = ModelConfig(
            model_type=model_type,
            vocab_size=fields.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=fields.size("intermediate_size"),
            num_layers=fields.size("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_position_embeddings=fields.size("max_position_embeddings", 2048),
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope=_rope(fields),
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
            attention_bias=fields.flag("attention_bias", False),
            mlp_bias=fields.flag("mlp_bias", False),
            initializer_range=fields.number("initializer_range", 0.02),
            bos_token_id=fields.token("bos_token_id"),
            eos_token_id=fields.token("eos_token_id", several=True),
            pad_token_id=fields.token("pad_token_id"),
        )
        fields.require("hidden_act", "silu")
        fields.refuse_the_rest()
        return config

    def to_hf(self, dtype: str = "float32") -> dict[str, Any]:
        """The `config.json` of this model, for weights stored in `dtype`; loads in transformers 4 and 5.

        RoPE is written the way of transformers 4 (`rope_theta`, `rope_scaling`), which both versions read.
        """
        scaling: dict[str, Any] | None = None
        if isinstance(self.rope.scaling, LinearScaling):
            scaling = {"rope_type": "linear", **vars(self.rope.scaling)}
        elif isinstance(self.rope.scaling, Llama3Scaling):
            scaling = {"rope_type": "llama3", **vars(self.rope.scaling)}
        eos = list(self.eos_token_id) if isinstance(self.eos_token_id, tuple) else self.eos_token_id
        return {
            "architectures": [ARCHITECTURES[self.model_type]],
            "attention_bias": self.attention_bias,
            "attention_dropout": 0.0,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": self.initializer_range,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "mlp_bias": self.mlp_bias,
            "model_type": self.model_type,
            "num_attention_heads": self.num_heads,
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": self.num_kv_heads,
            "pad_token_id": self.pad_token_id,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_scaling": scaling,
            "rope_theta": self.rope.theta,
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": dtype,
            "use_cache": True,
            "vocab_size": self.vocab_size,
        }


# Fields that describe files, defaults of generation or of other tasks' heads: the hidden states do not depend on them.
_HARMLESS = frozenset(
    "architectures dtype torch_dtype transformers_version use_cache return_dict output_attentions output_hidden_states "
    "torchscript problem_type finetuning_task task_specific_params tokenizer_class prefix id2label label2id "
    "num_labels classifier_dropout chunk_size_feed_forward use_bfloat16 tf_legacy_loss pretraining_tp name_or_path "
    "attn_implementation experts_implementation sep_token_id decoder_start_token_id max_sequence_length max_length "
    "min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p "
    "repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size num_return_sequences "
    "output_scores return_dict_in_generate remove_invalid_values cache_implementation unsloth_version unsloth_fixed "
    "unsloth_training transformers.js_config tie_last_hidden_states".split()
)

# Fields that would change the mathematics, with the only value under which they do not.
_ONLY: dict[str, Any] = {
    "attention_dropout": 0,
    "is_encoder_decoder": False,
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "partial_rotary_factor": 1,
    "use_sliding_window": False,
}


class _Fields:
    """The fields of one configuration; remembers which were read, so that the rest can be refused."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw, self.where = raw, where
        self.read: set[str] = {"model_type"}

    def _get(self, key: str, default: Any) -> Any:
        self.read.add(key)
        value = self.raw.get(key)
        if value is not None:
            return value
        if default is None:
            raise ModelError(f"{self.where}: no field `{key}`; a model cannot be built without it")
        return default

    def size(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelError(f"{self.where}: {key}={value!r}, expected a positive whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ModelError(f"{self.where}: {key}={value!r}, expected a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise ModelError(f"{self.where}: {key}={value!r}, expected true or false")
        return value

    def token(self, key: str, several: bool = False) -> Any:
        self.read.add(key)
        value = self.raw.get(key)
        ids = value if several and isinstance(value, list | tuple) else [value]
        if value is not None and any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
            raise ModelError(f"{self.where}: {key}={value!r}, expected a token id{' or a list of them' * several}")
        return tuple(ids) if several and isinstance(value, list | tuple) else value

    def require(self, key: str, only: Any) -> None:
        value = self._get(key, only)
        if value != only:
            raise ModelError(f"{self.where}: {key}={value!r} is not supported; only {only!r} is")

    def refuse_the_rest(self) -> None:
        if self.raw.get("quantization_config"):
            raise ModelError(
                f"{self.where}: the weights are quantised (`quantization_config`); training needs the float32, "
                "bfloat16 or float16 weights, so use the unquantised model"
            )
        if self.raw.get("auto_map"):
            raise ModelError(
                f"{self.where}: `auto_map` says that the model runs code of its own, which is not supported; if it is "
                f"a plain {self.raw.get('model_type')} model, remove the field"
            )
        for key, only in _ONLY.items():
            self.require(key, only)
        # A null switches a field off, and a leading underscore marks transformers' own notes.
        unknown = [
            key
            for key, value in self.raw.items()
            if key not in self.read | _HARMLESS and value not in (None, {}, []) and not key.startswith("_")
        ]
        if unknown:
            named = ", ".join(f"`{key}`={self.raw[key]!r}" for key in unknown)
            raise ModelError(
                f"{self.where}: unknown field(s) {named}; they may change what the model computes. Remove those that "
                "do not; a model that needs them is not supported"
            )


def _model_type(fields: _Fields) -> str:
    supported = ", ".join(f"{kind} ({name})" for kind, name in ARCHITECTURES.items())
    named = fields.raw.get("architectures") or []
    model_type = fields.raw.get("model_type")
    if model_type is None:  # old files and hand-written mappings name the class alone
        model_type = next((kind for kind, name in ARCHITECTURES.items() if name in named), None)
    if model_type not in ARCHITECTURES:
        what = f"model_type={model_type!r}" if model_type else "no field `model_type`"
        raise ModelError(f"{fields.where}: {what}; supported are {supported}")
    if named and ARCHITECTURES[model_type] not in named:
        raise ModelError(f"{fields.where}: architectures={named!r} is not a language model we know: {supported}")
    return model_type


def _rope(fields: _Fields) -> Rope:
    """Reads `rope_scaling` + `rope_theta` (transformers 4) or `rope_parameters` (transformers 5)."""
    found = []
    for key in ("rope_scaling", "rope_parameters"):
        fields.read.add(key)
        value = fields.raw.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise ModelError(f"{fields.where}: {key}={value!r}, expected a mapping with `rope_type`")
        if value:
            found.append(_rope_of(value, fields, f"{fields.where}: {key}"))
    if not found:
        return Rope(theta=fields.number("rope_theta", 10000.0))
    if any(rope != found[0] for rope in found):
        raise ModelError(f"{fields.where}: `rope_scaling` and `rope_parameters` disagree; keep one of them")
    return found[0]


def _rope_of(value: Mapping[str, Any], top: _Fields, where: str) -> Rope:
    inner = _Fields(value, where)
    theta = inner.number("rope_theta", top.number("rope_theta", 10000.0))
    if top.raw.get("rope_theta") is not None and theta != top.number("rope_theta"):
        raise ModelError(f"{where}: rope_theta={theta} differs from the field `rope_theta` outside; keep one of them")
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
            raise ModelError(f"{where}: rope_type={kind!r} is not supported; supported are default, linear and llama3")
    inner.refuse_the_rest()
    return Rope(theta=theta, scaling=scaling)
