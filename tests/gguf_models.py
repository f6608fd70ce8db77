"""Writes transformers' models as GGUF files, in the way of llama.cpp's `convert_hf_to_gguf.py`.

Nothing here is taken from `jax_simpo`: names come from gguf-py's own table, and the two changes of form (the order of
rows in queries and keys, the 1 of Gemma's norms) are written here as llama.cpp writes them.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests import small_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed: pip install 'jax-simpo[gguf]'")

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2"}


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute` of convert_hf_to_gguf.py."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def tensors_of(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """The tensors of a GGUF file in float32, by their names there."""
    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    enum = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(enum, config.num_hidden_layers)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data = tensor.float().numpy()
        if architecture == "llama" and name.endswith(("q_proj.weight", "q_proj.bias")):
            data = permute(data, config.num_attention_heads)
        if architecture == "llama" and name.endswith(("k_proj.weight", "k_proj.bias")):
            data = permute(data, config.num_key_value_heads)
        if architecture == "gemma2" and name.endswith("norm.weight"):
            data = data + 1
        tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))] = data
    if config.rope_parameters["rope_type"] == "llama3":
        tensors["rope_freqs.weight"] = _rope_factors(config)
    return tensors


def _rope_factors(config: Any) -> np.ndarray:
    """The factors that convert_hf_to_gguf.py computes for Llama 3.1 in `generate_extra_tensors`."""
    rope, dim = config.rope_parameters, config.head_dim
    low_wavelength = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    high_wavelength = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    factors = []
    for i in range(0, dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / dim)
        if wavelength < high_wavelength:
            factors.append(1.0)
        elif wavelength > low_wavelength:
            factors.append(rope["factor"])
        else:
            smooth = (rope["original_max_position_embeddings"] / wavelength - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"]
            )
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


def write(
    model: PreTrainedModel,
    path: Path,
    kind: str = "F32",
    *,
    change: dict[str, np.ndarray | None] | None = None,
    metadata: dict[str, Any] | None = None,
    **writer_options: Any,
) -> Path:
    """Writes a model.

    Args:
        model: the model.
        path: the file.
        kind: the type of its matrices, such as F16 or Q8_0; vectors are F32, as llama.cpp writes them.
        change: tensors to put in the place of the model's, or beside them; None removes one.
        metadata: keys to write besides, or in place of the usual ones; None leaves one out.
        writer_options: for `gguf.GGUFWriter`.
    """
    config = model.config
    arch = ARCHITECTURES[config.model_type]
    rope = config.rope_parameters
    keys: dict[str, Any] = {
        f"{arch}.vocab_size": config.vocab_size,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{arch}.rope.freq_base": rope["rope_theta"],
        "general.file_type": 0,
    }
    head_dim = getattr(config, "head_dim", None)
    if head_dim is not None:
        keys |= {f"{arch}.attention.key_length": head_dim, f"{arch}.attention.value_length": head_dim}
    if arch == "llama":
        keys[f"{arch}.rope.dimension_count"] = head_dim
    if rope["rope_type"] == "linear":
        keys |= {f"{arch}.rope.scaling.type": "linear", f"{arch}.rope.scaling.factor": rope["factor"]}
    if arch == "gemma2":
        keys |= {
            f"{arch}.attn_logit_softcapping": config.attn_logit_softcapping,
            f"{arch}.final_logit_softcapping": config.final_logit_softcapping,
            f"{arch}.attention.sliding_window": config.sliding_window,
        }
    for name in ("bos", "eos"):
        if (token := getattr(config, f"{name}_token_id")) is not None:
            keys[f"tokenizer.ggml.{name}_token_id"] = token
    if config.pad_token_id is not None:
        keys["tokenizer.ggml.padding_token_id"] = config.pad_token_id
    writer = gguf.GGUFWriter(path, arch, **writer_options)
    add(writer, {**keys, **(metadata or {})})
    for name, data in {**tensors_of(model), **(change or {})}.items():
        if data is None:
            continue
        of_kind = gguf.GGMLQuantizationType[kind if data.ndim > 1 else "F32"]
        writer.add_tensor(name, gguf.quantize(data, of_kind), raw_dtype=of_kind)
    finish(writer)
    return path


def write_with_tokenizer(model: PreTrainedModel, path: Path, template: str) -> Path:
    """Writes a model with the tokens of `small_tokenizer`, of which there may be fewer than rows of its embeddings."""
    tokenizer = small_tokenizer.train()
    content = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(content["vocab"], key=content["vocab"].__getitem__)
    spare = [f"[PAD{i}]" for i in range(len(tokens), model.config.vocab_size)]
    special = {tokenizer.bos_token, tokenizer.eos_token}
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens + spare,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens] + [5] * len(spare),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in content["merges"]],
        "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.chat_template": template,
    }
    return write(model, path, metadata=metadata)


def add(writer: Any, metadata: dict[str, Any]) -> None:
    """Adds metadata of the types in which llama.cpp writes them."""
    for key, value in metadata.items():
        match value:
            case None:
                continue
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case list():
                writer.add_array(key, value)


def finish(writer: Any) -> None:
    """Writes the file to the disk."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
