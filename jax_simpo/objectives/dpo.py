"""Objectives on the difference of two log-ratios to a reference: DPO and its relatives.

A log-ratio is `log pi(y|x) - log pi_ref(y|x)`, and `beta` times it is the reward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
from jaxtyping import Array, Float

from jax_simpo.objectives.base import Objective, Responses, logistic_losses
from jax_simpo.objectives.simpo import LossType, difference_losses


@dataclass(frozen=True, kw_only=True)
class DPO(Objective):
    """DPO: `-logsigmoid(beta (ratio_w - ratio_l))`.

    Rafailov et al., "Direct Preference Optimization: Your Language Model is Secretly a Reward Model" (NeurIPS 2023),
    arXiv 2305.18290, equation 7. With label smoothing it is the conservative DPO of Mitchell, "A note on DPO with
    noisy preferences" (2023).

    Attributes:
        loss_type: `sigmoid`, the paper's, or `hinge`, that of Liu et al. (2024), "Statistical Rejection Sampling
            Improves Preference Optimization", arXiv 2309.06657.
        label_smoothing: the share of preferences taken to be wrong.
    """

    loss_type: LossType = "sigmoid"
    label_smoothing: float = 0.0
    needs_reference: ClassVar[bool] = True

    def difference(self, chosen: Responses, rejected: Responses) -> Float[Array, "*P"]:
        return self.beta * (chosen.ratio - rejected.ratio)

    def losses(self, chosen: Responses, rejected: Responses) -> Float[Array, "*P"]:
        return difference_losses(self.difference(chosen, rejected), self.loss_type, self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class RobustDPO(Objective):
    """Robust DPO: an unbiased estimate of DPO's loss where a known share of the preferences is flipped.

    Chowdhury, Kini and Natarajan, "Provably Robust DPO: Aligning Language Models with Noisy Feedback" (ICML 2024),
    arXiv 2403.00409.

    Attributes:
        label_smoothing: the share of preferences that is wrong, below 0.5.
    """

    label_smoothing: float = 0.0
    needs_reference: ClassVar[bool] = True

    def losses(self, chosen: Responses, rejected: Responses) -> Float[Array, "*P"]:
        logits, s = self.beta * (chosen.ratio - rejected.ratio), self.label_smoothing
        return ((1 - s) * logistic_losses(logits) - s * logistic_losses(-logits)) / (1 - 2 * s)


@dataclass(frozen=True, kw_only=True)
class IPO(Objective):
    """IPO: `(mean ratio_w - mean ratio_l - 1 / (2 beta))**2`.

    Azar et al., "A General Theoretical Paradigm to Understand Learning from Human Preferences" (AISTATS 2024),
    arXiv 2310.12036, equation 17, where beta is called tau. The paper writes sums; its authors used ratios divided by
    the number of tokens, and so do TRL and this class. Rewards are beta times the sums.
    """

    needs_reference: ClassVar[bool] = True

    def losses(self, chosen: Responses, rejected: Responses) -> Float[Array, "*P"]:
        return (chosen.mean_ratio - rejected.mean_ratio - 1 / (2 * self.beta)) ** 2


@dataclass(frozen=True, kw_only=True)
class LengthNormalizedDPO(Objective):
    """Length-normalised DPO: `-logsigmoid(beta (mean ratio_w - mean ratio_l))`.

    Lambert et al., "Tülu 3: Pushing Frontiers in Open Language Model Post-Training" (2024), arXiv 2411.15124.
    Rewards are beta times the mean ratios.

    Attributes:
        label_smoothing: the share of preferences taken to be wrong.
    """

    label_smoothing: float = 0.0
    needs_reference: ClassVar[bool] = True

    def score(self, response: Responses) -> Float[Array, "*P"]:
        return response.mean_ratio

    def difference(self, chosen: Responses, rejected: Responses) -> Float[Array, "*P"]:
        return self.beta * (chosen.mean_ratio - rejected.mean_ratio)

    def losses(self, chosen: Responses, rejected: Responses) -> Float[Array, "*P"]:
        return logistic_losses(self.difference(chosen, rejected), self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class DPOP(Objective):
    """DPO-Positive: DPO that penalises a chosen response less likely than under the reference.

    Pal et al., "Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive" (2024), arXiv 2402.13228.

    Attributes:
        dpop_lambda: the weight of the penalty, lambda in the paper.
    """

    dpop_lambda: float
    needs_reference: ClassVar[bool] = True

    def losses(self, chosen: Responses, rejected: Responses) -> Float[Array, "*P"]:
        penalty = self.dpop_lambda * jax.nn.relu(-chosen.ratio)
        return logistic_losses(self.beta * (chosen.ratio - rejected.ratio - penalty))


@dataclass(frozen=True, kw_only=True)
class EXOPair(Objective):
    """EXO for pairs: the reverse KL divergence between the model's and the labels' distribution over both responses.

    Ji et al., "Towards Efficient Exact Optimization of Language Model Alignment" (ICML 2024), arXiv 2402.00856,
    equation 16.

    Attributes:
        label_smoothing: the probability that the labels give to the rejected response, above 0.
    """

    label_smoothing: float
    needs_reference: ClassVar[bool] = True

    def losses(self, chosen: Responses, rejected: Responses) -> Float[Array, "*P"]:
        logits, s = self.beta * (chosen.ratio - rejected.ratio), self.label_smoothing
        better = jax.nn.sigmoid(logits) * (jax.nn.log_sigmoid(logits) - math.log1p(-s))
        worse = jax.nn.sigmoid(-logits) * (jax.nn.log_sigmoid(-logits) - math.log(s))
        return better + worse
