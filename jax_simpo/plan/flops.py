"""What a step has to compute, counted from the lengths of its pairs.

Useful floating-point operations are those the layout's own tokens need: two per parameter and token in a forward pass,
four per visible query-key pair, head and feature, twice as many again in the backward pass. Padding, blocks that are
computed to be thrown away and recomputation count as nothing. (XLA's own count is of no use here: it takes the body of
a loop once, and layers, the head and attention are loops.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jax_simpo.data.pairs import PairLengths
from jax_simpo.models.config import ModelConfig

_FORWARD_AND_BACKWARD = 3


@dataclass(frozen=True)
class Work:
    """What some pairs ask of a model: input tokens, visible query-key pairs, hidden states that predict a target."""

    tokens: int
    visible: int
    predictors: int


def work_of(lengths: PairLengths, prefix_sharing: bool) -> Work:
    """The work of these pairs, laid out with their prefix shared or not."""
    chosen, rejected = lengths.chosen_inputs.astype(np.int64), lengths.rejected_inputs.astype(np.int64)
    shared = lengths.shared_inputs.astype(np.int64) if prefix_sharing else np.zeros_like(chosen)
    triangle = lambda n: n * (n + 1) // 2  # noqa: E731
    visible = triangle(chosen) + triangle(rejected) - triangle(shared)
    # A response's targets are predicted from its last prompt token on; what lies within the prefix serves both.
    first = np.maximum(chosen - lengths.chosen_targets, rejected - lengths.rejected_targets)
    predictors = lengths.targets() - np.maximum(shared - first, 0)
    return Work(int((chosen + rejected - shared).sum()), int(visible.sum()), int(predictors.sum()))


def layer_parameters(config: ModelConfig) -> int:
    """Parameters of a layer's matrix products."""
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    return config.hidden_size * (heads + 3 * config.intermediate_size)


def useful_flops(config: ModelConfig, work: Work) -> float:
    """Floating-point operations of forward and backward. The head is computed for states that predict a target."""
    forward = config.num_layers * 2.0 * layer_parameters(config) * work.tokens
    forward += config.num_layers * 4.0 * config.num_heads * config.head_dim * work.visible
    forward += 2.0 * config.vocab_size * config.hidden_size * work.predictors
    return _FORWARD_AND_BACKWARD * forward
