"""The sizes and switches of a decoder: everything its weights and its forward pass depend on.

`jax_simpo.hf.config` reads one from a Hugging Face `config.json`. A further family is a further module in
`jax_simpo.hf.families`, and the switches it needs here (a default that means "off" leaves the other families alone).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu_tanh"]


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
    initializer_range: float
    query_pre_attn_scalar: int  # scores are divided by its root; the head size, unless a family says otherwise
    layer_windows: tuple[int | None, ...]  # per layer, how many positions back attention sees; `None` is all of them
    activation: Activation = "silu"  # of the feed-forward part
    qkv_bias: bool = False
    output_bias: bool = False  # of attention
    mlp_bias: bool = False  # on gate, up and down
    qk_norm: bool = False  # each head's query and key are normed
    post_norms: bool = False  # what a block's two parts give is normed before it is added
    norm_offset: bool = False  # norms multiply by 1 + scale, in float32
    scale_embeddings: bool = False  # times the root of the width
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The distinct sliding windows of the layers' attention, in positions; `None` sees everything before it."""
        return tuple(dict.fromkeys(self.layer_windows))

    @property
    def layer_types(self) -> list[str]:
        """The layers' kinds of attention, as Hugging Face configurations name them."""
        return ["sliding_attention" if window else "full_attention" for window in self.layer_windows]
