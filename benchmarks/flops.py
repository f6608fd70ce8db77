"""What sharing could gain at best."""

from __future__ import annotations

from jax_simpo.models.config import ModelConfig


def linear_ideal(prefix: float, response: float) -> float:
    """Speed-up of sharing where cost is linear in tokens: 2(p+c) / (p+2c)."""
    return 2 * (prefix + response) / (prefix + 2 * response)


def attention_ideal(prefix: float, response: float) -> float:
    """Speed-up of sharing for causal attention alone: 2(p+c)² / (p²+4pc+2c²)."""
    return 2 * (prefix + response) ** 2 / (prefix**2 + 4 * prefix * response + 2 * response**2)


def attention_layer_ideal(config: ModelConfig, prefix: int, response: int) -> float:
    """Speed-up of sharing for a layer's attention with its projections: all its operations over those that are left."""
    projections = 2.0 * config.hidden_size * (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    scores = 4.0 * config.num_heads * config.head_dim
    whole, alone = prefix + response, prefix * (prefix + 1) // 2
    both = whole * (whole + 1)
    separate = projections * 2 * whole + scores * both
    return separate / (projections * (whole + response) + scores * (both - alone))
