"""Describes a decoder: the sizes and switches on which its weights and its forward pass depend.

`jax_simpo.hf.config` reads a `ModelConfig` from a Hugging Face `config.json`. To add a family, add a module to
`jax_simpo.hf.families` and the switches it needs here, with a default that leaves the other families as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True)
class LinearScaling:
    """Divides all RoPE frequencies by one factor (position interpolation, arXiv 2306.15595)."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Divides low RoPE frequencies by `factor`, keeps high ones, and blends those between (Llama 3.1)."""

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
    """Sizes and switches of a decoder. Two models with equal configurations have the same shapes and computations."""

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
    initializer_range: float
    query_pre_attn_scalar: int  # attention scores are divided by its root; usually head_dim
    layer_windows: tuple[int | None, ...]  # per layer: positions that attention sees; None is all
    activation: Activation = "silu"  # in the feed-forward part
    qkv_bias: bool = False
    output_bias: bool = False  # in attention's output projection
    mlp_bias: bool = False  # on gate, up and down
    qk_norm: bool = False  # norm over each head of queries and keys
    post_norms: bool = False  # norm attention's and feed-forward's outputs before adding them
    norm_offset: bool = False  # norms multiply by 1 + scale, in float32
    scale_embeddings: bool = False  # multiply by the root of hidden_size
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The distinct sliding windows of the layers, in positions; None is attention without a window."""
        return tuple(dict.fromkeys(self.layer_windows))

    @property
    def layer_types(self) -> list[str]:
        """The kind of attention of each layer, as Hugging Face configurations name it."""
        return ["sliding_attention" if window else "full_attention" for window in self.layer_windows]
