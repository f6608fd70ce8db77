"""Computes the largest speed-up that prefix sharing can reach, and the useful operations of a layer's parts."""

from __future__ import annotations

from jax_simpo.models.config import ModelConfig


def linear_ideal(prefix: float, response: float) -> float:
    """Returns the speed-up of sharing where cost is linear in tokens: 2(p+c) / (p+2c)."""
    return 2 * (prefix + response) / (prefix + 2 * response)


def attention_ideal(prefix: float, response: float) -> float:
    """Returns the speed-up of sharing for causal attention alone: 2(p+c)² / (p²+4pc+2c²)."""
    return 2 * (prefix + response) ** 2 / (prefix**2 + 4 * prefix * response + 2 * response**2)


def attention_layer_ideal(config: ModelConfig, prefix: int, response: int) -> float:
    """Returns the speed-up of sharing for a layer's attention with its projections: the ratio of the operations."""
    projections = 2.0 * config.hidden_size * (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    scores = 4.0 * config.num_heads * config.head_dim
    length, prefix_scores = prefix + response, prefix * (prefix + 1) // 2
    separate_scores = length * (length + 1)  # of the two causal sequences of a pair
    separate = projections * 2 * length + scores * separate_scores
    return separate / (projections * (length + response) + scores * (separate_scores - prefix_scores))


def part_flops(config: ModelConfig, part: str, prefix: int, response: int, shared: bool) -> float:
    """Returns the useful floating-point operations of a part of a layer for one pair, forward and backward.

    Args:
        config: the model.
        part: `mlp`, `attention` or `attention layer`, which is attention with its projections.
        prefix: tokens of the prompt.
        response: tokens of each response.
        shared: the prompt is computed once.
    """
    length = prefix + response
    tokens = length + response if shared else 2 * length
    visible = length * (length + 1) - (prefix * (prefix + 1) // 2 if shared else 0)
    scores = 4.0 * config.num_heads * config.head_dim * visible
    if part == "mlp":
        return 3 * 6.0 * config.hidden_size * config.intermediate_size * tokens
    if part == "attention":
        return 3 * scores
    projections = 2.0 * config.hidden_size * (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    return 3 * (scores + projections * tokens)
