"""Objectives on sums of log-probs, without a reference: CPO and SLiC-HF."""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jaxtyping import Array, Float

from jax_simpo.objectives.base import Objective, Responses
from jax_simpo.objectives.simpo import LossType, difference_losses


@dataclass(frozen=True, kw_only=True)
class _OnSums(Objective):
    """An objective whose reward is beta times the sum of the log-probs."""

    def score(self, response: Responses) -> Float[Array, "*P"]:
        return response.sum

    def logps(self, response: Responses) -> Float[Array, "*P"]:
        return response.sum


@dataclass(frozen=True, kw_only=True)
class CPO(_OnSums):
    """CPO: DPO with a uniform reference; its second term is `sft_weight` times the chosen responses' cross-entropy.

    Xu et al., "Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine Translation"
    (ICML 2024), arXiv 2401.08417, equation 3. The hinge form is TRL's.

    Attributes:
        loss_type: `sigmoid`, the paper's, or `hinge`.
        label_smoothing: the share of preferences taken to be wrong.
    """

    loss_type: LossType = "sigmoid"
    label_smoothing: float = 0.0

    def difference(self, chosen: Responses, rejected: Responses) -> Float[Array, "*P"]:
        return self.beta * (chosen.sum - rejected.sum)

    def losses(self, chosen: Responses, rejected: Responses) -> Float[Array, "*P"]:
        return difference_losses(self.difference(chosen, rejected), self.loss_type, self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class SLiC(_OnSums):
    """SLiC-HF's rank calibration loss `relu(delta - log pi(y_w|x) + log pi(y_l|x))`, with `sft_weight` for its lambda.

    Zhao et al., "SLiC-HF: Sequence Likelihood Calibration with Human Feedback" (2023), arXiv 2305.10425,
    with the chosen response as the target of the regularisation. It has no beta.

    Attributes:
        delta: the margin.
    """

    delta: float

    def losses(self, chosen: Responses, rejected: Responses) -> Float[Array, "*P"]:
        return jax.nn.relu(self.delta - (chosen.sum - rejected.sum))
