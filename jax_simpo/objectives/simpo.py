"""Objectives on mean log-probs, without a reference: SimPO, and AlphaPO and SimPER, which came after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_simpo.objectives.base import Objective, Responses, logistic_losses

LossType = Literal["sigmoid", "hinge"]


def difference_losses(z: Float[Array, "*P"], loss_type: LossType, label_smoothing: float) -> Float[Array, "*P"]:
    """Computes the logistic loss of a difference of rewards, with label smoothing, or the hinge loss `relu(1 - z)`.

    Raises:
        ValueError: `loss_type` is neither "sigmoid" nor "hinge".
    """
    if loss_type == "hinge":
        return jax.nn.relu(1.0 - z)
    if loss_type == "sigmoid":
        return logistic_losses(z, label_smoothing)
    raise ValueError(f"loss_type {loss_type!r} is neither 'sigmoid' nor 'hinge'")


@dataclass(frozen=True, kw_only=True)
class SimPO(Objective):
    """SimPO, as `simpo_loss` of princeton-nlp/SimPO computes it, the code behind the published numbers.

    Meng, Xia and Chen, "SimPO: Simple Preference Optimization with a Reference-Free Reward" (2024),
    arXiv 2405.14734, equation 6.

    With `z = mean_w - mean_l - gamma_beta_ratio` and the label smoothing `s`, the sigmoid loss is
    `-(1-s) logsigmoid(beta z) - s logsigmoid(-beta z)`. The hinge loss is `relu(1 - beta z)` and has no smoothing. The
    target margin gamma of the paper is `beta * gamma_beta_ratio`: beta multiplies the ratio once.

    Attributes:
        gamma_beta_ratio: the target margin gamma, divided by beta.
        loss_type: `sigmoid`, the paper's, or `hinge`.
        label_smoothing: the share of preferences taken to be wrong.
    """

    gamma_beta_ratio: float
    loss_type: LossType = "sigmoid"
    label_smoothing: float = 0.0

    def difference(self, chosen: Responses, rejected: Responses) -> Float[Array, "*P"]:
        return self.beta * (chosen.mean - rejected.mean - self.gamma_beta_ratio)

    def losses(self, chosen: Responses, rejected: Responses) -> Float[Array, "*P"]:
        return difference_losses(self.difference(chosen, rejected), self.loss_type, self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class AlphaPO(Objective):
    """AlphaPO: SimPO with the reward `beta (1 - p**-alpha) / alpha` of the mean probability `p = exp(mean log-prob)`.

    Gupta et al., "AlphaPO: Reward Shape Matters for LLM Alignment" (2025), arXiv 2501.03884. As alpha goes to 0 the
    reward goes to SimPO's, which an alpha of 0 stands for.

    Attributes:
        gamma_beta_ratio: the target margin gamma, divided by beta.
        alpha: the shape of the reward.
        label_smoothing: the share of preferences taken to be wrong.
    """

    gamma_beta_ratio: float
    alpha: float
    label_smoothing: float = 0.0

    def score(self, response: Responses) -> Float[Array, "*P"]:
        if self.alpha == 0:
            return response.mean
        # Beyond e**80 the power, or its product with beta, would leave the range of float32.
        return -jnp.expm1(jnp.minimum(-self.alpha * response.mean, 80.0)) / self.alpha

    def difference(self, chosen: Responses, rejected: Responses) -> Float[Array, "*P"]:
        return self.beta * (self.score(chosen) - self.score(rejected) - self.gamma_beta_ratio)

    def losses(self, chosen: Responses, rejected: Responses) -> Float[Array, "*P"]:
        return logistic_losses(self.difference(chosen, rejected), self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class SimPER(Objective):
    """SimPER: raises the inverse perplexity of the chosen response and lowers that of the rejected one.

    Xiao et al., "SimPER: A Minimalist Approach to Preference Alignment without Hyperparameters" (ICLR 2025),
    arXiv 2502.00883. It has no beta.
    """

    def score(self, response: Responses) -> Float[Array, "*P"]:
        return jnp.exp(response.mean)

    def losses(self, chosen: Responses, rejected: Responses) -> Float[Array, "*P"]:
        return self.score(rejected) - self.score(chosen)
