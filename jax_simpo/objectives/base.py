"""The interface of an objective: what it is given of every pair, and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

GroupLoss = Literal["all_pairs", "best_vs_rest", "best_vs_worst", "plackett_luce", "tpo_l"]
CompareWeights = Literal["equal", "score_gap", "rank"]


class Responses(NamedTuple):
    """One response of each of P pairs, float32 [P]: what an objective may know of it.

    Attributes:
        sum: the sum of the log-probs of its tokens under the model that is trained.
        length: the number of these tokens, EOS included.
        reference_sum: the same sum under the frozen reference; zeros for an objective that needs none.
    """

    sum: Float[Array, "*P"]
    length: Float[Array, "*P"]
    reference_sum: Float[Array, "*P"]

    @property
    def mean(self) -> Float[Array, "*P"]:
        """The mean log-prob of a token. Empty slots, of length 0, give 0 and not 0/0, in values and gradients."""
        return self.sum / jnp.maximum(self.length, 1.0)

    @property
    def ratio(self) -> Float[Array, "*P"]:
        """The log-ratio `log pi(y|x) - log pi_ref(y|x)`."""
        return self.sum - self.reference_sum

    @property
    def mean_ratio(self) -> Float[Array, "*P"]:
        """The log-ratio divided by the number of tokens."""
        return self.ratio / jnp.maximum(self.length, 1.0)


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """Defines what a run minimises: the mean of `losses` over the pairs of a step, plus the weighted cross-entropy.

    An objective of your own derives from this class, is a frozen dataclass, and defines `losses`.

    Attributes:
        beta: the scale of the rewards. Objectives that have no such factor leave it at 1.
        sft_weight: the weight of the cross-entropy of the chosen responses, which is added to the loss.
        sft_over: the tokens that the cross-entropy is the mean over: those of the chosen responses, or of their prompts
            too.
        group_loss: which responses of a group are compared, and how (docs/groups.md). Of a pair there is one way.
        compare_weights: the weights of a group's comparisons.
        mean_over: the step's loss is the mean over its groups, or over its comparisons.
        needs_reference: True if `losses` reads `reference_sum`.
    """

    beta: float = 1.0
    sft_weight: float = 0.0
    sft_over: Literal["response", "prompt_and_response"] = "response"
    group_loss: GroupLoss = "all_pairs"
    compare_weights: CompareWeights = "equal"
    mean_over: Literal["groups", "pairs"] = "groups"

    needs_reference: ClassVar[bool] = False

    @abstractmethod
    def losses(self, chosen: Responses, rejected: Responses) -> Float[Array, "*P"]:
        """Computes the preference loss of each pair, float32 [P]."""

    def difference(self, chosen: Responses, rejected: Responses) -> Float[Array, "*P"]:
        """Returns the difference of rewards whose logistic loss the objective is, for `group_loss: plackett_luce`.

        Raises:
            NotImplementedError: the objective is no logistic loss of a difference.
        """
        raise NotImplementedError(f"{type(self).__name__} is no logistic loss of a difference of rewards")

    def score(self, response: Responses) -> Float[Array, "*P"]:
        """Returns the reward divided by beta. By default that is the log-ratio, or without a reference the mean."""
        return response.ratio if self.needs_reference else response.mean

    def logps(self, response: Responses) -> Float[Array, "*P"]:
        """Returns the log-prob that is logged as `logps/*`: the sum with a reference, and the mean without one."""
        return response.sum if self.needs_reference else response.mean

    @property
    def reads_prompts(self) -> bool:
        """True if the log-probs of the tokens of prompts are needed."""
        return bool(self.sft_weight) and self.sft_over == "prompt_and_response"

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of a step's metrics."""
        rewards = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
        return ("loss", *rewards, "logps/chosen", "logps/rejected", *(("sft_loss",) if self.sft_weight else ()))


def logistic_losses(logits: Float[Array, "*P"], label_smoothing: float = 0.0) -> Float[Array, "*P"]:
    """Computes `-(1-s) logsigmoid(logits) - s logsigmoid(-logits)`, the logistic loss with the label smoothing `s`."""
    log_sigmoid = jax.nn.log_sigmoid
    return -(1.0 - label_smoothing) * log_sigmoid(logits) - label_smoothing * log_sigmoid(-logits)
