"""Computes the losses and rewards of the preference objectives, each written from its paper.

Throughout, `pi(y|x)` is the probability that the trained model gives to a response `y` of `|y|` tokens, and `ref(y|x)`
is that of the frozen reference. The log-ratio is `log pi(y|x) - log ref(y|x)`; `w` is the chosen response and `l` the
rejected one; `s` is the label smoothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from jax_simpo.config import TrainConfig, objective_weights
from jax_simpo.config.objectives import WITH_REFERENCE
from jax_simpo.errors import ConfigError
from torch_ref.comparisons import (
    CompareWeights,
    Comparisons,
    GroupLoss,
    Ranking,
    compared_places,
    list_comparisons,
)

_LARGEST_EXPONENT = 80.0  # e**80 times any beta stays within float32


@dataclass(frozen=True)
class Responses:
    """P responses, such as one of each of P pairs: all that an objective knows about them.

    Attributes:
        sum: the sum of its tokens' log-probabilities.
        length: the number of its tokens.
        reference_sum: the same sum under the reference; None where there is no reference.
    """

    sum: Float[Tensor, " P"]
    length: Int[Tensor, " P"]
    reference_sum: Float[Tensor, " P"] | None = None

    @property
    def mean(self) -> Float[Tensor, " P"]:
        """The average log-probability of a token."""
        return self.sum / self.length

    @property
    def ratio(self) -> Float[Tensor, " P"]:
        """The log-ratio.

        Raises:
            ValueError: there are no sums under a reference.
        """
        if self.reference_sum is None:
            raise ValueError("the objective needs the log-probabilities of a reference, and was given none")
        return self.sum - self.reference_sum

    @property
    def mean_ratio(self) -> Float[Tensor, " P"]:
        """The log-ratio per token."""
        return self.ratio / self.length

    def at(self, indices: Int[Tensor, " Q"]) -> Responses:
        """Returns the responses at some indices; one that is named twice is returned twice."""
        reference = None if self.reference_sum is None else self.reference_sum[indices]
        return Responses(self.sum[indices], self.length[indices], reference)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The numbers that objectives read, under the names of their config keys. An objective ignores those of others.

    Attributes:
        beta: the scale of the rewards.
        gamma_beta_ratio: SimPO's target margin gamma, divided by beta.
        loss_type: `sigmoid`, or `hinge`, which has no label smoothing.
        label_smoothing: the assumed share of pairs whose preference is the wrong way round.
        alpha: the shape of AlphaPO's reward.
        delta: the margin of SLiC-HF.
        dpop_lambda: the weight of DPO-Positive's penalty.
    """

    beta: float = 1.0
    gamma_beta_ratio: float = 0.0
    loss_type: Literal["sigmoid", "hinge"] = "sigmoid"
    label_smoothing: float = 0.0
    alpha: float = 0.0
    delta: float = 1.0
    dpop_lambda: float = 0.0

    @classmethod
    def of(cls, config: TrainConfig) -> Settings:
        """Returns the settings of a config; keys that are null there keep their default here."""
        values = {f.name: getattr(config, f.name) for f in fields(cls)}
        return cls(**{name: value for name, value in values.items() if value is not None})


def bradley_terry(margin: Float[Tensor, " P"], label_smoothing: float = 0.0) -> Float[Tensor, " P"]:
    """Returns the negative log-likelihood of a preference whose log-odds are `margin`, with label smoothing."""
    as_labelled, flipped = -F.logsigmoid(margin), -F.logsigmoid(-margin)
    return (1.0 - label_smoothing) * as_labelled + label_smoothing * flipped


def margin_loss(s: Settings, margin: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """Returns the loss of a margin of rewards: logistic, or with `hinge` `max(0, 1 - margin)`."""
    return F.relu(1.0 - margin) if s.loss_type == "hinge" else bradley_terry(margin, s.label_smoothing)


# --- without a reference


def simpo(s: Settings, chosen: Responses, rejected: Responses) -> Float[Tensor, " P"]:
    """SimPO, Meng, Xia and Chen 2024, arXiv 2405.14734, equation 6: `-log sigmoid(r(w) - r(l) - gamma)`.

    The reward is `r(y) = beta / |y| * log pi(y|x)` (equation 4). The original code is configured with
    `gamma_beta_ratio = gamma / beta`.
    """
    return margin_loss(s, simpo_margin(s, chosen, rejected))


def simpo_margin(s: Settings, chosen: Responses, rejected: Responses) -> Float[Tensor, " P"]:
    """Returns `r(w) - r(l) - gamma` of SimPO."""
    gamma = s.beta * s.gamma_beta_ratio
    return s.beta * chosen.mean - s.beta * rejected.mean - gamma


def alpha_reward(alpha: float, mean: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """Returns AlphaPO's reward over beta, `(1 - p**-alpha) / alpha` of the mean probability `p`; its limit at 0."""
    if alpha == 0:
        return mean
    return torch.expm1(torch.clamp(-alpha * mean, max=_LARGEST_EXPONENT)) / -alpha


def alphapo(s: Settings, chosen: Responses, rejected: Responses) -> Float[Tensor, " P"]:
    """AlphaPO, Gupta et al. 2025, arXiv 2501.03884: SimPO with the reward `beta (1 - p**-alpha) / alpha`.

    `p = pi(y|x)**(1 / |y|)` is the mean probability of a token. With alpha -> 0 the reward is SimPO's.
    """
    return bradley_terry(alphapo_margin(s, chosen, rejected), s.label_smoothing)


def alphapo_margin(s: Settings, chosen: Responses, rejected: Responses) -> Float[Tensor, " P"]:
    """Returns `r(w) - r(l) - gamma` of AlphaPO."""
    difference = alpha_reward(s.alpha, chosen.mean) - alpha_reward(s.alpha, rejected.mean)
    return s.beta * (difference - s.gamma_beta_ratio)


def simper(s: Settings, chosen: Responses, rejected: Responses) -> Float[Tensor, " P"]:
    """SimPER, Xiao et al. 2025, arXiv 2502.00883: the difference of the inverse perplexities, `-p(w) + p(l)`."""
    return -torch.exp(chosen.mean) + torch.exp(rejected.mean)


def cpo(s: Settings, chosen: Responses, rejected: Responses) -> Float[Tensor, " P"]:
    """CPO, Xu et al. 2024, arXiv 2401.08417: `-log sigmoid(beta log pi(w|x) - beta log pi(l|x))`, a DPO without `ref`.

    The likelihood term of the paper is the cross-entropy with `sft_weight`.
    """
    return margin_loss(s, cpo_margin(s, chosen, rejected))


def cpo_margin(s: Settings, chosen: Responses, rejected: Responses) -> Float[Tensor, " P"]:
    """Returns `beta log pi(w|x) - beta log pi(l|x)`."""
    return s.beta * (chosen.sum - rejected.sum)


def slic(s: Settings, chosen: Responses, rejected: Responses) -> Float[Tensor, " P"]:
    """SLiC-HF's rank calibration, Zhao et al. 2023, arXiv 2305.10425: `max(0, delta - log pi(w|x) + log pi(l|x))`."""
    return F.relu(s.delta - chosen.sum + rejected.sum)


def log_odds(mean: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """Returns `log(p / (1 - p))` of `p = exp(mean)`, accurate for p near 0 and near 1, and finite at p = 1."""
    below = torch.clamp(mean, max=-1e-30)
    # log(1 - p) by one of two formulas, since each loses its digits where the other is used. The clamp keeps the second
    # from an infinite gradient there, which `where` would turn into NaN; the first is finite everywhere.
    half = -math.log(2.0)
    near_one = torch.log(-torch.expm1(below))
    near_zero = torch.log1p(-torch.exp(torch.clamp(below, max=half)))
    return mean - torch.where(below > half, near_one, near_zero)


def orpo(s: Settings, chosen: Responses, rejected: Responses) -> Float[Tensor, " P"]:
    """ORPO, Hong, Lee and Thorne 2024, arXiv 2403.07691: `-log sigmoid` of the log of the odds ratio of `w` and `l`.

    The odds are those of the mean probability of a token. The paper's lambda is beta here, and its likelihood term is
    the cross-entropy with `sft_weight`.
    """
    return s.beta * bradley_terry(log_odds(chosen.mean) - log_odds(rejected.mean))


# --- with a reference: the two log-ratios together


def dpo(s: Settings, chosen: Responses, rejected: Responses) -> Float[Tensor, " P"]:
    """DPO, Rafailov et al. 2023, arXiv 2305.18290, equation 7: `-log sigmoid(beta (ratio(w) - ratio(l)))`.

    With label smoothing it is Mitchell's conservative DPO (2023). The hinge is that of Liu et al. 2024, arXiv
    2309.06657.
    """
    return margin_loss(s, dpo_margin(s, chosen, rejected))


def dpo_margin(s: Settings, chosen: Responses, rejected: Responses) -> Float[Tensor, " P"]:
    """Returns `beta (ratio(w) - ratio(l))`."""
    return s.beta * (chosen.ratio - rejected.ratio)


def robust(s: Settings, chosen: Responses, rejected: Responses) -> Float[Tensor, " P"]:
    """Robust DPO, Chowdhury, Kini and Natarajan 2024, arXiv 2403.00409.

    If a share `s` of the labels is flipped, `((1 - s) L(w, l) - s L(l, w)) / (1 - 2 s)` estimates DPO's loss `L` of the
    clean labels without bias.
    """
    margin, flipped = s.beta * (chosen.ratio - rejected.ratio), s.label_smoothing
    return ((1 - flipped) * bradley_terry(margin) - flipped * bradley_terry(-margin)) / (1 - 2 * flipped)


def ipo(s: Settings, chosen: Responses, rejected: Responses) -> Float[Tensor, " P"]:
    """IPO, Azar et al. 2023, arXiv 2310.12036: `(ratio(w) - ratio(l) - 1 / (2 beta))**2`, with ratios per token.

    The paper's tau is beta here. It writes sums; its authors' experiments divide by the number of tokens.
    """
    return torch.square(chosen.mean_ratio - rejected.mean_ratio - 0.5 / s.beta)


def sigmoid_norm(s: Settings, chosen: Responses, rejected: Responses) -> Float[Tensor, " P"]:
    """Length-normalised DPO, Lambert et al. 2024 (Tulu 3), arXiv 2411.15124: DPO with ratios per token."""
    return bradley_terry(sigmoid_norm_margin(s, chosen, rejected), s.label_smoothing)


def sigmoid_norm_margin(s: Settings, chosen: Responses, rejected: Responses) -> Float[Tensor, " P"]:
    """Returns `beta (ratio(w) - ratio(l))` with ratios per token."""
    return s.beta * (chosen.mean_ratio - rejected.mean_ratio)


def dpop(s: Settings, chosen: Responses, rejected: Responses) -> Float[Tensor, " P"]:
    """DPO-Positive, Pal et al. 2024, arXiv 2402.13228.

    It is DPO with `lambda max(0, log(ref(w|x) / pi(w|x)))` taken off the difference of the ratios.
    """
    penalty = F.relu(-chosen.ratio)
    return bradley_terry(s.beta * (chosen.ratio - rejected.ratio - s.dpop_lambda * penalty))


def exo_pair(s: Settings, chosen: Responses, rejected: Responses) -> Float[Tensor, " P"]:
    """EXO for pairs, Ji et al. 2024, arXiv 2402.00856: the reverse KL divergence of the model from the labels.

    Both are distributions over `w` and `l`: the model's is the softmax of beta times the ratios, the labels' is
    `(1 - s, s)`.
    """
    margin = s.beta * (chosen.ratio - rejected.ratio)
    log_model = torch.stack([F.logsigmoid(margin), F.logsigmoid(-margin)])
    log_labels = [math.log1p(-s.label_smoothing), math.log(s.label_smoothing)]
    return (log_model.exp() * (log_model - log_model.new_tensor(log_labels)[:, None])).sum(0)


def apo_zero(s: Settings, chosen: Responses, rejected: Responses) -> Float[Tensor, " P"]:
    """APO-zero, D'Oosterlinck et al. 2024, arXiv 2408.06266: `1 - sigmoid(beta ratio(w)) + sigmoid(beta ratio(l))`."""
    return torch.sigmoid(-s.beta * chosen.ratio) + torch.sigmoid(s.beta * rejected.ratio)


def apo_down(s: Settings, chosen: Responses, rejected: Responses) -> Float[Tensor, " P"]:
    """APO-down, D'Oosterlinck et al. 2024, arXiv 2408.06266: both responses get less likely, the rejected one more so.

    `sigmoid(beta ratio(w)) + 1 - sigmoid(beta (ratio(w) - ratio(l)))`.
    """
    return torch.sigmoid(s.beta * chosen.ratio) + torch.sigmoid(s.beta * (rejected.ratio - chosen.ratio))


# --- with a reference: each log-ratio alone


def nca_pair(s: Settings, chosen: Responses, rejected: Responses) -> Float[Tensor, " P"]:
    """NCA for pairs, Chen et al. 2024, arXiv 2402.05369: `w` is data, `w` and `l` are both samples of the noise."""
    as_noise = -F.logsigmoid(-s.beta * chosen.ratio) - F.logsigmoid(-s.beta * rejected.ratio)
    return -F.logsigmoid(s.beta * chosen.ratio) + as_noise / 2


def bco_pair(s: Settings, chosen: Responses, rejected: Responses) -> Float[Tensor, " P"]:
    """BCO for pairs, Jung et al. 2024, arXiv 2404.04656: a classifier of chosen and rejected whose logit is the reward.

    Without the paper's reward shift, as in TRL: it is a running mean over earlier steps.
    """
    return -F.logsigmoid(s.beta * chosen.ratio) - F.logsigmoid(-s.beta * rejected.ratio)


def sppo_hard(s: Settings, chosen: Responses, rejected: Responses) -> Float[Tensor, " P"]:
    """SPPO, Wu et al. 2024, arXiv 2405.00675, with hard preferences: `w` always wins, and `l` never.

    The squared distance of each ratio from `(P - 1/2) / beta`, where P is the probability to win.
    """
    won, lost = 0.5 / s.beta, -0.5 / s.beta
    return torch.square(chosen.ratio - won) + torch.square(rejected.ratio - lost)


OfPair = Callable[[Settings, Responses, Responses], Float[Tensor, " P"]]

LOSSES: dict[str, OfPair] = {
    function.__name__: function
    for function in (
        *(simpo, alphapo, simper, cpo, slic, orpo, dpo, robust, ipo, sigmoid_norm, dpop, exo_pair, apo_zero, apo_down),
        *(nca_pair, bco_pair, sppo_hard),
    )
}
"""The objectives by their names in configs."""

MARGINS: dict[str, OfPair] = {
    "simpo": simpo_margin,
    "alphapo": alphapo_margin,
    "cpo": cpo_margin,
    "dpo": dpo_margin,
    "sigmoid_norm": sigmoid_norm_margin,
}
"""The objectives that are the logistic loss of a margin of rewards, and that margin."""

_ON_SUMS = ("cpo", "slic")  # objectives without a reference whose reward does not depend on the length


# --- the objective of a run


@dataclass(frozen=True)
class Objective:
    """The loss that is minimised: a weighted sum of preference losses, plus `sft_weight` times the cross-entropy.

    The preference losses are those of comparisons of two responses; their weighted mean is the loss of a group.
    Rewards and log-probabilities are logged as the first of the preference objectives defines them.

    Attributes:
        weights: preference objectives and their weights.
        settings: the numbers that they read.
        sft_weight: the weight of the cross-entropy of the first response of each group, which is the chosen one of a
            pair.
        sft_over: the tokens of the cross-entropy: those of the responses, or of their prompts too.
        group_loss: which responses of a group are compared, and how, see `list_comparisons`. Of a pair there is one
            way.
        compare_weights: the weights of a group's comparisons, see `list_comparisons`.
        mean_over: `groups` if the loss of a step is the mean over its groups, `pairs` if every comparison of the step
            counts the same.

    Raises:
        ConfigError: the Plackett-Luce loss of these preference objectives is not defined.
    """

    weights: Mapping[str, float]
    settings: Settings = field(default_factory=Settings)
    sft_weight: float = 0.0
    sft_over: Literal["response", "prompt_and_response"] = "response"
    group_loss: GroupLoss = "all_pairs"
    compare_weights: CompareWeights = "equal"
    mean_over: Literal["groups", "pairs"] = "groups"

    def __post_init__(self) -> None:
        if self.group_loss != "plackett_luce":
            return
        settings = self.settings
        if len(self.weights) != 1 or self.first not in MARGINS:
            wrong = " + ".join(self.weights)
        elif settings.label_smoothing or settings.loss_type != "sigmoid":
            wrong = f"{self.first} with label smoothing or the hinge loss"
        else:
            return
        raise ConfigError(
            f"`group_loss: plackett_luce` is the logistic loss of a difference of rewards, which {wrong} is not. It "
            f"needs one of {', '.join(MARGINS)}, without `label_smoothing`"
        )

    @classmethod
    def of(cls, config: TrainConfig) -> Objective:
        """Returns the objective that a config describes.

        Raises:
            ConfigError: the objective is one of the user's own, or has no such loss of a group.
        """
        weights = objective_weights(config.objective)
        if not weights:
            raise ConfigError(
                f"`objective` {config.objective} is not one of {', '.join(LOSSES)}, and torch_ref has no others. Train "
                "it with `jax-simpo train`"
            )
        return cls(
            weights,
            Settings.of(config),
            config.sft_weight or 0.0,
            config.sft_over or "response",
            group_loss=config.group_loss,
            compare_weights=config.compare_weights,
            mean_over=config.mean_over,
        )

    @property
    def first(self) -> str:
        """The objective that defines the rewards."""
        return next(iter(self.weights))

    @property
    def beta(self) -> float:
        """The scale of the rewards."""
        return self.settings.beta

    @property
    def needs_reference(self) -> bool:
        """True if one of the objectives reads log-probabilities of a reference."""
        return not WITH_REFERENCE.keys().isdisjoint(self.weights)

    @property
    def reads_prompts(self) -> bool:
        """True if the cross-entropy includes the tokens of prompts."""
        return bool(self.sft_weight) and self.sft_over == "prompt_and_response"

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of a step's metrics, in the order of `StepPart.metrics`."""
        names = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
        return (*names, "logps/chosen", "logps/rejected", *(("sft_loss",) if self.sft_weight else ()))

    def losses(self, chosen: Responses, rejected: Responses) -> Float[Tensor, " P"]:
        """Returns the preference loss of each pair."""
        losses = [weight * LOSSES[name](self.settings, chosen, rejected) for name, weight in self.weights.items()]
        return torch.stack(losses).sum(0)

    def margins(self, chosen: Responses, rejected: Responses) -> Float[Tensor, " P"]:
        """Returns the margin of rewards of each pair, for an objective that is the logistic loss of one."""
        return MARGINS[self.first](self.settings, chosen, rejected)

    def comparisons(self, rankings: Sequence[Ranking], scores: Float[np.ndarray, " S"] | None = None) -> Comparisons:
        """Lists the comparisons of groups whose responses are numbered group after group, best first.

        Args:
            rankings: the ranking of each group.
            scores: the score of each response, for `compare_weights: score_gap`.
        """
        return list_comparisons(rankings, self.group_loss, self.compare_weights, scores)

    def denominator(self, rankings: Sequence[Ranking]) -> int:
        """Returns what the sums of a step with these groups are divided by: the groups, or their comparisons."""
        if self.mean_over == "groups":
            return len(rankings)
        return max(1, sum(len(compared_places(ranking, self.group_loss)) for ranking in rankings))

    def score(self, responses: Responses) -> Float[Tensor, " P"]:
        """Returns the reward of each response, divided by beta."""
        name = self.first
        if name == "sigmoid_norm":
            return responses.mean_ratio
        if name in WITH_REFERENCE:
            return responses.ratio
        if name in _ON_SUMS:
            return responses.sum
        if name == "alphapo":
            return alpha_reward(self.settings.alpha, responses.mean)
        return responses.mean.exp() if name == "simper" else responses.mean

    def logps(self, responses: Responses) -> Float[Tensor, " P"]:
        """Returns the log-probability of each response that is logged: sum or average, as the reward is made of."""
        return responses.sum if self.first in WITH_REFERENCE or self.first in _ON_SUMS else responses.mean
