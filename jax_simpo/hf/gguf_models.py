"""Reads models from GGUF files: the configuration from the metadata, and the weights under Hugging Face's names.

A GGUF file names things as llama.cpp does, and stores some tensors in another form than Hugging Face: see `_read_form`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jax_simpo.errors import ModelError
from jax_simpo.gguf_files import GgufFile, StoredTensor, open_gguf
from jax_simpo.hf.families import FAMILIES
from jax_simpo.models.config import Llama3Scaling, ModelConfig, Rope
from jax_simpo.models.rope import rope_frequencies

# Parameter path -> name of the tensor in a GGUF file, in which `{}` stands for the layer's number. llama.cpp has one
# name for one job, whatever the family (gguf-py, `tensor_mapping.py`).
_NAMES = {
    "embed/embedding": "token_embd.weight",
    "layers/attention_norm/scale": "blk.{}.attn_norm.weight",
    "layers/attention/q/kernel": "blk.{}.attn_q.weight",
    "layers/attention/q/bias": "blk.{}.attn_q.bias",
    "layers/attention/k/kernel": "blk.{}.attn_k.weight",
    "layers/attention/k/bias": "blk.{}.attn_k.bias",
    "layers/attention/v/kernel": "blk.{}.attn_v.weight",
    "layers/attention/v/bias": "blk.{}.attn_v.bias",
    "layers/attention/o/kernel": "blk.{}.attn_output.weight",
    "layers/attention/o/bias": "blk.{}.attn_output.bias",
    "layers/attention/q_norm/scale": "blk.{}.attn_q_norm.weight",
    "layers/attention/k_norm/scale": "blk.{}.attn_k_norm.weight",
    "layers/attention_post_norm/scale": "blk.{}.post_attention_norm.weight",
    "layers/mlp_norm/scale": "blk.{}.ffn_norm.weight",
    "layers/mlp/gate/kernel": "blk.{}.ffn_gate.weight",
    "layers/mlp/gate/bias": "blk.{}.ffn_gate.bias",
    "layers/mlp/up/kernel": "blk.{}.ffn_up.weight",
    "layers/mlp/up/bias": "blk.{}.ffn_up.bias",
    "layers/mlp/down/kernel": "blk.{}.ffn_down.weight",
    "layers/mlp/down/bias": "blk.{}.ffn_down.bias",
    "layers/mlp_post_norm/scale": "blk.{}.post_ffw_norm.weight",
    "final_norm/scale": "output_norm.weight",
    "lm_head/embedding": "output.weight",
}
_HEAD, _EMBEDDING, _ROPE_FACTORS = "output.weight", "token_embd.weight", "rope_freqs.weight"

# Every Llama 3.1, 3.2 and 3.3 has these; a GGUF file holds only the factors that follow from them.
_LLAMA3_BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_GEMMA2_27B_LAYERS = 46

# Metadata of an architecture, after its name, that says nothing about the mathematics.
_HARMLESS = ("vocab_size", "rope.scaling.finetuned", "tensor_data_layout")


# ---------------------------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------------------------


def read_gguf_config(path: Path) -> dict[str, Any]:
    """Returns the `config.json` that the metadata of a GGUF file amounts to, as `read_model_config` takes it.

    Raises:
        ModelError: the file cannot be read, or describes a model that is not supported.
    """
    file = open_gguf(path)
    architecture = file.text("general.architecture")
    if architecture not in _OWN_FIELDS:
        raise ModelError(
            f"{path}: general.architecture={architecture!r} is not supported; supported are {', '.join(_OWN_FIELDS)} "
            "(a Mistral is stored as llama)"
        )
    values = _Metadata(file, architecture)
    heads, width = values.take("attention.head_count"), values.take("embedding_length")
    head_dim = values.take("attention.key_length", None)
    if head_dim is None and _is_size(heads) and _is_size(width):
        head_dim = width // heads
    for key in ("attention.value_length", "rope.dimension_count"):
        values.require(key, head_dim if _is_size(head_dim) else values.take(key, None))  # what is no size fails below
    if _EMBEDDING not in file.tensors:
        raise ModelError(f"{path}: tensor `{_EMBEDDING}` is missing; download or convert the model again")
    raw = {
        "model_type": architecture,
        "architectures": [FAMILIES[architecture].architecture],
        "vocab_size": file.tensors[_EMBEDDING].shape[0],
        "hidden_size": width,
        "intermediate_size": values.take("feed_forward_length"),
        "num_hidden_layers": values.take("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": values.take("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": values.take("context_length"),
        "rms_norm_eps": values.take("attention.layer_norm_rms_epsilon"),
        "rope_theta": values.take("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(values, head_dim),
        "tie_word_embeddings": _HEAD not in file.tensors,
        **_token_ids(file),
        **_OWN_FIELDS[architecture](values, head_dim),
    }
    values.refuse_the_rest()
    return raw


class _Metadata:
    """The metadata of one architecture, of which every key must be taken: one left over may change the mathematics."""

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self.file, self._prefix = file, f"{architecture}."
        self._left = {key for key in file.metadata if key.startswith(self._prefix)}

    def take(self, key: str, *default: Any) -> Any:
        """Returns the value of a key, or the default."""
        key = self._prefix + key
        self._left.discard(key)
        if key not in self.file.metadata and not default:
            raise ModelError(f"{self.file.path}: has no metadata `{key}`; convert the model again with llama.cpp")
        return self.file.metadata.get(key, *default)

    def require(self, key: str, only: Any) -> None:
        """Raises ModelError if a key is there and has another value."""
        if (value := self.take(key, only)) != only:
            raise ModelError(f"{self.file.path}: {self._prefix}{key}={value!r} is not supported; only {only!r} is")

    def refuse_the_rest(self) -> None:
        """Raises ModelError if a key was not taken."""
        left = sorted(self._left - {self._prefix + key for key in _HARMLESS})
        if left:
            raise ModelError(
                f"{self.file.path}: unknown metadata `{left[0]}`={self.file.metadata[left[0]]!r}; it may change what "
                "the model computes, so the file is not read. Use the model's Hugging Face folder"
            )


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def _token_ids(file: GgufFile) -> dict[str, Any]:
    """Returns the special tokens. Several tokens may end an answer: of a text (`eos`) and of a turn (`eot`)."""

    def token(name: str) -> Any:
        return file.metadata.get(f"tokenizer.ggml.{name}_token_id")

    ends = list(dict.fromkeys(end for end in (token("eos"), token("eot")) if end is not None))
    return {
        "bos_token_id": token("bos"),
        "eos_token_id": ends if len(ends) > 1 else (ends or [None])[0],
        "pad_token_id": token("padding"),
    }


def _rope_scaling(values: _Metadata, head_dim: Any) -> dict[str, Any] | None:
    """Returns `rope_scaling`: linear by its metadata, or Llama 3's by the tensor of its factors."""
    path = values.file.path
    kind, factor = values.take("rope.scaling.type", "none"), values.take("rope.scaling.factor", None)
    original = values.take("rope.scaling.original_context_length", None)
    factors = values.file.tensors.get(_ROPE_FACTORS)
    if kind not in ("none", "linear"):
        raise ModelError(
            f"{path}: rope.scaling.type={kind!r} is not supported; supported are none, linear and Llama 3's"
        )
    if kind == "linear":
        if factors is not None:
            raise ModelError(
                f"{path}: has both rope.scaling.type=linear and tensor `{_ROPE_FACTORS}`; one is supported"
            )
        return {"rope_type": "linear", "factor": factor}
    if factors is None or not _is_size(head_dim):  # the configuration is refused for what is no size
        return None
    numbers = factors.read()
    bands = _LLAMA3_BANDS if original is None else {**_LLAMA3_BANDS, "original_max_position_embeddings": original}
    theta = values.take("rope.freq_base", 10000.0)
    scaling = Llama3Scaling(factor=float(str(np.float32(numbers.max(initial=1.0)))), **bands)
    plain, scaled = (rope_frequencies(Rope(theta, kind), head_dim) for kind in (None, scaling))
    if numbers.shape != plain.shape or not np.allclose(plain / scaled, numbers, rtol=1e-5):
        raise ModelError(
            f"{factors} stretches RoPE in another way than Llama 3.1, 3.2 and 3.3 do ({bands}), which is not "
            "supported. Use the model's Hugging Face folder"
        )
    return {"rope_type": "llama3", **vars(scaling)}


def _llama(values: _Metadata, _: Any) -> dict[str, Any]:
    """Finds biases among the tensors. A window makes it a Mistral; llama.cpp itself writes none for Mistrals."""
    tensors = values.file.tensors
    window = values.take("attention.sliding_window", None)
    if window is not None:
        return {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}
    return {"attention_bias": "blk.0.attn_q.bias" in tensors, "mlp_bias": "blk.0.ffn_up.bias" in tensors}


def _qwen2(values: _Metadata, _: Any) -> dict[str, Any]:
    return {}


def _qwen3(values: _Metadata, _: Any) -> dict[str, Any]:
    return {"attention_bias": "blk.0.attn_q.bias" in values.file.tensors}


def _gemma2(values: _Metadata, head_dim: Any) -> dict[str, Any]:
    """Adds the scale of attention, which is in no file: llama.cpp knows the 27B model by its number of layers."""
    heads, width = values.take("attention.head_count"), values.take("embedding_length")
    is_27b = values.take("block_count") == _GEMMA2_27B_LAYERS and _is_size(width) and _is_size(heads)
    return {
        "query_pre_attn_scalar": width // heads if is_27b else head_dim,
        "attn_logit_softcapping": values.take("attn_logit_softcapping", None),
        "final_logit_softcapping": values.take("final_logit_softcapping", None),
        "sliding_window": values.take("attention.sliding_window"),
    }


_OWN_FIELDS: dict[str, Callable[[_Metadata, Any], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
}


# ---------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------


class GgufWeights:
    """The tensors of a GGUF file under Hugging Face's names and in its form, in the way of `WeightFiles`.

    Args:
        path: the file.
        config: the configuration that `read_gguf_config` gave.

    Raises:
        ModelError: the file cannot be read.
    """

    holder, description = "the GGUF file", "its metadata"
    remedy = "download or convert the model again"

    def __init__(self, path: Path, config: ModelConfig) -> None:
        self.folder, self._config = path, config
        tensors = open_gguf(path).tensors
        family = FAMILIES[config.model_type]
        self._own: dict[str, str] = {}
        for parameter, name in family.names.items():
            layers = range(config.num_layers) if parameter.startswith("layers/") else [None]
            self._own |= {name.format(layer): _NAMES[parameter].format(layer) for layer in layers}
        hf_names = {own: name for name, own in self._own.items()}
        # Those without a place keep their own names; of the RoPE factors the configuration is made.
        self._stored = {hf_names.get(own, own): tensor for own, tensor in tensors.items() if own != _ROPE_FACTORS}

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def own_name(self, name: str) -> str:
        """Returns the name of a tensor in the file, for error messages."""
        return self._own.get(name, name)

    def locate(self, name: str) -> str:
        """Returns the tensor's file and name, for error messages."""
        return str(self._stored[name])

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        return self._stored[name].shape

    def check_dtype(self, name: str) -> None:
        """Raises ModelError if the tensor cannot be dequantised."""
        self._stored[name].check_kind()

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads the part of a tensor at `index` (one slice per axis) as float32. No other rows are read."""
        tensor = self._stored[name]
        rows = np.arange(tensor.shape[0])[index[0]]
        return _read_form(tensor, rows, self._config)[(slice(None), *index[1:])]


def _read_form(tensor: StoredTensor, rows: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Reads rows of a tensor, given by their numbers in Hugging Face's form.

    llama.cpp's `convert_hf_to_gguf.py` changes two kinds of tensors. For `llama` it reorders the rows of each head's
    queries and keys, so that RoPE turns neighbours (2i, 2i + 1) where Hugging Face turns (i, i + half). For Gemma it
    adds the 1 of `1 + w` to norms.
    """
    job = tensor.name.split(".")[-2]
    if job in ("attn_q", "attn_k") and config.model_type in ("llama", "mistral"):
        head, place = np.divmod(rows, config.head_dim)
        side, pair = np.divmod(place, config.head_dim // 2)
        rows = head * config.head_dim + 2 * pair + side
    numbers = tensor.read(rows)
    if config.norm_offset and job.endswith("norm"):
        numbers = numbers - 1
    return numbers
