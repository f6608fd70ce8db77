"""The SimPO objective, as `simpo_loss` of princeton-nlp/SimPO computes it, the code behind the published numbers.

Meng, Xia and Chen, "SimPO: Simple Preference Optimization with a Reference-Free Reward" (2024),
arXiv 2405.14734, equation 6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
from jaxtyping import Array, Float

LossType = Literal["sigmoid", "hinge"]


def simpo_losses(
    chosen_logps: Float[Array, "*P"],
    rejected_logps: Float[Array, "*P"],
    *,
    beta: float,
    gamma_beta_ratio: float,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
) -> Float[Array, "*P"]:
    """Computes the loss of each pair from the mean log-probabilities of its two responses.

    With `z = chosen - rejected - gamma_beta_ratio` and the label smoothing `s`, the sigmoid loss is
    `-(1-s) logsigmoid(beta z) - s logsigmoid(-beta z)`. The hinge loss is `relu(1 - beta z)` and has no smoothing. The
    target margin gamma of the paper is `beta * gamma_beta_ratio`: beta multiplies the ratio once.

    Raises:
        ValueError: `loss_type` is neither "sigmoid" nor "hinge".
    """
    z = beta * (chosen_logps - rejected_logps - gamma_beta_ratio)
    if loss_type == "hinge":
        return jax.nn.relu(1.0 - z)
    if loss_type == "sigmoid":
        return -(1.0 - label_smoothing) * jax.nn.log_sigmoid(z) - label_smoothing * jax.nn.log_sigmoid(-z)
    raise ValueError(f"loss_type {loss_type!r} is neither 'sigmoid' nor 'hinge'")


@dataclass(frozen=True)
class Objective:
    """The SimPO objective's settings, under the names of the original."""

    beta: float
    gamma_beta_ratio: float
    loss_type: LossType = "sigmoid"
    label_smoothing: float = 0.0
    sft_weight: float = 0.0

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of a step's metrics, as the original names them."""
        rewards = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
        return ("loss", *rewards, "logps/chosen", "logps/rejected", *(("sft_loss",) if self.sft_weight else ()))

    def losses(self, chosen_logps: Float[Array, "*P"], rejected_logps: Float[Array, "*P"]) -> Float[Array, "*P"]:
        """Computes the preference loss of each pair."""
        return simpo_losses(
            chosen_logps,
            rejected_logps,
            beta=self.beta,
            gamma_beta_ratio=self.gamma_beta_ratio,
            loss_type=self.loss_type,
            label_smoothing=self.label_smoothing,
        )
