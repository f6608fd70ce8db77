"""Counts the floating-point operations of a step from the lengths of its groups.

Useful operations are those that the tokens of the layout need: in the forward pass two per parameter and token, and
four per visible query-key pair, head and feature; in the backward pass twice as many. Padding, the masked parts of
blocks and recomputation do not count. (XLA's own count is too low: it counts the body of a loop once, and the layers,
the head and attention are loops.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jax_simpo.data.groups import GroupLengths
from jax_simpo.models.config import ModelConfig

_FORWARD_AND_BACKWARD = 3


@dataclass(frozen=True)
class Work:
    """The quantities that the operations of some groups follow from.

    Attributes:
        tokens: input tokens.
        visible: visible query-key pairs.
        predictors: hidden states that predict a target.
    """

    tokens: int
    visible: int
    predictors: int


def work_of(lengths: GroupLengths, prefix_sharing: bool) -> Work:
    """Returns the work of these groups, laid out with or without prefix sharing."""
    if prefix_sharing:
        counts = lengths.tree_tokens, lengths.tree_visible, lengths.tree_predictors
    else:
        inputs = lengths.inputs.astype(np.int64)
        counts = inputs, inputs * (inputs + 1) // 2, lengths.targets
    return Work(*(int(count.sum(dtype=np.int64)) for count in counts))


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
