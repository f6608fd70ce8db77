"""Objectives that compare the log-ratio of each response with a constant, not with that of the other response."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
from jaxtyping import Array, Float

from jax_simpo.objectives.base import Objective, Responses


@dataclass(frozen=True, kw_only=True)
class NCAPair(Objective):
    """NCA for pairs: noise-contrastive alignment, which keeps the likelihood of the chosen response from falling.

    Chen et al., "Noise Contrastive Alignment of Language Models with Explicit Rewards" (NeurIPS 2024),
    arXiv 2402.05369, for two responses.
    """

    needs_reference: ClassVar[bool] = True

    def losses(self, chosen: Responses, rejected: Responses) -> Float[Array, "*P"]:
        better, worse = self.beta * chosen.ratio, self.beta * rejected.ratio
        log_sigmoid = jax.nn.log_sigmoid
        return -log_sigmoid(better) - 0.5 * log_sigmoid(-better) - 0.5 * log_sigmoid(-worse)


@dataclass(frozen=True, kw_only=True)
class BCOPair(Objective):
    """BCO for pairs: a binary classifier of chosen and rejected responses whose logit is the reward.

    Jung et al., "Binary Classifier Optimization for Large Language Model Alignment" (2024), arXiv 2404.04656.
    The paper subtracts a reward shift, a running mean; TRL 1.16 leaves it out for pairs, and so does this
    class, because it would let a step's loss depend on the steps before.
    """

    needs_reference: ClassVar[bool] = True

    def losses(self, chosen: Responses, rejected: Responses) -> Float[Array, "*P"]:
        return -jax.nn.log_sigmoid(self.beta * chosen.ratio) - jax.nn.log_sigmoid(-self.beta * rejected.ratio)


@dataclass(frozen=True, kw_only=True)
class SPPOHard(Objective):
    """SPPO with hard probabilities: the log-ratios are drawn to `1 / (2 beta)` and `-1 / (2 beta)`.

    Wu et al., "Self-Play Preference Optimization for Language Model Alignment" (2024), arXiv 2405.00675, equation 4.7
    with P = 1 for the chosen and 0 for the rejected response.
    """

    needs_reference: ClassVar[bool] = True

    def losses(self, chosen: Responses, rejected: Responses) -> Float[Array, "*P"]:
        target = 0.5 / self.beta
        return (chosen.ratio - target) ** 2 + (rejected.ratio + target) ** 2
