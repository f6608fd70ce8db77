"""Small models of every family, as transformers makes and saves them: an oracle for `models` and `hf`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedModel

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

# Kinds of Llama, by their fields.
LLAMAS: dict[str, dict[str, Any]] = {
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

# The other families. Windows are shorter than the sequences of the tests and soft caps within the reach of scores and
# logits, so that leaving one out shows.
OTHERS: dict[str, dict[str, Any]] = {
    "mistral": {"model_type": "mistral", "num_key_value_heads": 4, "sliding_window": 12},
    "gemma2": {
        "model_type": "gemma2",
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": 12,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "tie_word_embeddings": True,
        "pad_token_id": None,
    },
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen2_windows": {
        "model_type": "qwen2",
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 12,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 16},
}
FAMILIES = {**LLAMAS, **OTHERS}


@pytest.fixture
def hf_config() -> dict[str, Any]:
    """A Llama's `config.json` as a mapping, in the way of transformers 4."""
    return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SIZES}


@pytest.fixture(scope="session")
def make_hf() -> Callable[..., PreTrainedModel]:
    """Makes a random model whose norms and biases are not trivial."""
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(family: str = "llama3.1", seed: int = 0, **fields: Any) -> PreTrainedModel:
        values = {"model_type": "llama", **SIZES, **FAMILIES[family], **fields}
        torch.manual_seed(seed)
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        # Of transformers' own implementations this one knows soft caps on a CPU.
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
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
