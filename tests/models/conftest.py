"""Small Llama models, as transformers makes and saves them: the oracle of this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 16384,
    "initializer_range": 0.1,  # larger than usual, so that attention and the feed-forward part matter
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama2": {},
    "llama3_tied": {
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "llama3.1": {
        "num_key_value_heads": 4,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "linear_rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide_heads": {"head_dim": 32, "num_key_value_heads": 2},
}


@pytest.fixture
def hf_config() -> dict[str, Any]:
    """A `config.json` as a mapping, in the way of transformers 4."""
    return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SIZES}


@pytest.fixture
def make_hf() -> Callable[..., LlamaForCausalLM]:
    """Makes a random Llama whose norms and biases are not trivial."""

    def make(family: str = "llama3.1", seed: int = 0, **fields: Any) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **FAMILIES[family], **fields})).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name or name.endswith("bias"):
                    parameter.add_(0.3 * torch.randn_like(parameter))
        return model

    return make


@pytest.fixture
def saved(make_hf: Callable[..., LlamaForCausalLM], tmp_path: Path) -> Path:
    """The folder of a saved random model with untied head (3 layers)."""
    folder = tmp_path / "saved"
    make_hf().save_pretrained(folder)
    return folder
