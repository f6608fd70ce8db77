"""Computes the SimPO objective, written from the paper.

Meng, Xia and Chen, "SimPO: Simple Preference Optimization with a Reference-Free Reward", arXiv 2405.14734. The reward
of a response `y` to a prompt `x` is its average log-probability times beta (equation 4),

    r(x, y) = beta / |y| * log pi(y | x),

and the loss of a pair is that of Bradley and Terry with a target margin gamma (equation 6),

    L = -log sigmoid(r(x, y_w) - r(x, y_l) - gamma).

The original code is configured with `gamma_beta_ratio = gamma / beta`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from jax_simpo.config import TrainConfig
from jax_simpo.errors import ConfigError


@dataclass(frozen=True)
class Objective:
    """The loss that is minimised: the preference loss plus `sft_weight` times the chosen responses' cross-entropy.

    Attributes:
        beta: the scale of the rewards.
        gamma_beta_ratio: the target margin gamma, divided by beta.
        loss_type: `sigmoid` (the paper's) or `hinge`.
        label_smoothing: the assumed share of pairs whose preference is the wrong way round.
        sft_weight: the weight of the cross-entropy.
    """

    beta: float
    gamma_beta_ratio: float
    loss_type: Literal["sigmoid", "hinge"] = "sigmoid"
    label_smoothing: float = 0.0
    sft_weight: float = 0.0

    @classmethod
    def of(cls, config: TrainConfig) -> Objective:
        """Returns the objective that a config describes.

        Raises:
            ConfigError: the config asks for another objective than SimPO.
        """
        beta, ratio, loss_type = config.beta, config.gamma_beta_ratio, config.loss_type
        if config.objective != "simpo" or beta is None or ratio is None or loss_type is None:
            raise ConfigError(
                f"`objective: {config.objective}` cannot be trained with torch_ref, which has `simpo` alone; use "
                "`jax-simpo train`"
            )
        return cls(beta, ratio, loss_type, config.label_smoothing or 0.0, config.sft_weight or 0.0)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of a step's metrics, in the order of `StepPart.metrics`."""
        names = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
        return (*names, "logps/chosen", "logps/rejected", *(("sft_loss",) if self.sft_weight else ()))

    def losses(self, chosen_logps: Float[Tensor, " P"], rejected_logps: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
        """Returns the preference loss of each pair from the average log-probabilities of its responses.

        Label smoothing `s` assumes that a share `s` of the preferences is the wrong way round. The hinge variant
        replaces `-log sigmoid(m)` by `max(0, 1 - m)` and has no smoothing.
        """
        gamma = self.beta * self.gamma_beta_ratio
        margin = self.beta * chosen_logps - self.beta * rejected_logps - gamma
        if self.loss_type == "hinge":
            return torch.clamp(1.0 - margin, min=0.0)
        s = self.label_smoothing
        return -(1.0 - s) * F.logsigmoid(margin) - s * F.logsigmoid(-margin)


def response_sums(logps: Float[Tensor, " N"], response: Int[Tensor, " N"], responses: int) -> Float[Tensor, " S"]:
    """Adds up the log-probabilities of each response's tokens. A response without tokens gets zero."""
    return logps.new_zeros(responses).index_add(0, response, logps)


@dataclass(frozen=True)
class StepPart:
    """The contribution of some of a step's pairs; the contributions of all its pairs add up to the step.

    Attributes:
        loss: the contribution to the loss, with its graph.
        metrics: the contributions to the metrics, in the order of `Objective.metrics`, without a graph.
    """

    loss: Float[Tensor, ""]
    metrics: Float[Tensor, " M"]


def step_part(
    objective: Objective,
    *,
    chosen_sum: Float[Tensor, " P"],
    rejected_sum: Float[Tensor, " P"],
    chosen_length: Int[Tensor, " P"],
    rejected_length: Int[Tensor, " P"],
    step_pairs: int,
    step_chosen_tokens: int,
) -> StepPart:
    """Returns the contribution of these pairs to a step of `step_pairs` pairs.

    This is the only place that divides, by the denominators of the whole step. So the sum over parts does not depend on
    how the step is split into micro-batches and over ranks. P may be 0: then all values are zero, but the graph exists,
    so that a rank without pairs takes part in every collective of the backward pass.

    Args:
        objective: the objective.
        chosen_sum: sum of the log-probabilities of each chosen response.
        rejected_sum: sum of the log-probabilities of each rejected response.
        chosen_length: tokens of each chosen response.
        rejected_length: tokens of each rejected response.
        step_pairs: pairs of the whole step, over all ranks and micro-batches.
        step_chosen_tokens: tokens of all chosen responses of the step.
    """
    chosen, rejected = chosen_sum / chosen_length, rejected_sum / rejected_length
    loss = objective.losses(chosen, rejected).sum() / step_pairs
    sft = []
    if objective.sft_weight:
        cross_entropy = -chosen_sum.sum() / step_chosen_tokens
        loss = loss + objective.sft_weight * cross_entropy
        sft = [cross_entropy]
    chosen_mean, rejected_mean = chosen.sum() / step_pairs, rejected.sum() / step_pairs
    metrics = [
        loss,
        objective.beta * chosen_mean,
        objective.beta * rejected_mean,
        (chosen > rejected).float().sum() / step_pairs,
        objective.beta * (chosen - rejected).sum() / step_pairs,
        chosen_mean,
        rejected_mean,
        *sft,
    ]
    return StepPart(loss, torch.stack([m.detach() for m in metrics]))
