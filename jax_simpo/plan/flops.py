"""Counts the floating-point operations of a step from the lengths of its pairs.

Useful operations are those that the tokens of the layout need: in the forward pass two per parameter and token, and
four per visible query-key pair, head and feature; in the backward pass twice as many. Padding, the masked parts of
blocks and recomputation do not count. (XLA's own count is too low: it counts the body of a loop once, and the layers,
the head and attention are loops.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jax_simpo.data.pairs import PairLengths
from jax_simpo.models.config import ModelConfig

_FORWARD_AND_BACKWARD = 3


@dataclass(frozen=True)
class Work:
    """The quantities that the operations of some pairs follow from.

    Attributes:
        tokens: input tokens.
        visible: visible query-key pairs.
        predictors: hidden states that predict a target.
    """

    tokens: int
    visible: int
    predictors: int


def work_of(lengths: PairLengths, prefix_sharing: bool) -> Work:
    """Returns the work of these pairs, laid out with or without prefix sharing."""
    chosen, rejected = lengths.chosen_inputs.astype(np.int64), lengths.rejected_inputs.astype(np.int64)
    shared = lengths.shared_inputs.astype(np.int64) if prefix_sharing else np.zeros_like(chosen)
    triangle = lambda n: n * (n + 1) // 2  # noqa: E731
    visible = triangle(chosen) + triangle(rejected) - triangle(shared)
    # The predictors of a response begin with its last prompt token. Those within the shared prefix count once.
    first = np.maximum(chosen - lengths.chosen_targets, rejected - lengths.rejected_targets)
    predictors = lengths.targets() - np.maximum(shared - first, 0)
    return Work(int((chosen + rejected - shared).sum()), int(visible.sum()), int(predictors.sum()))


def layer_parameters(config: ModelConfig) -> int:
    """Returns the number of parameters in a layer's matrix products."""
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    return config.hidden_size * (heads + 3 * config.intermediate_size)


def useful_flops(config: ModelConfig, work: Work) -> float:
    """Returns the useful operations of a forward and backward pass; only predictors of targets reach the head."""
    forward = config.num_layers * 2.0 * layer_parameters(config) * work.tokens
    forward += config.num_layers * 4.0 * config.num_heads * config.head_dim * work.visible
    forward += 2.0 * config.vocab_size * config.hidden_size * work.predictors
    return _FORWARD_AND_BACKWARD * forward
