"""Adds up log-probabilities per response, and the shares of micro-batches and ranks in a step's loss and metrics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from torch_ref.objectives import Objective, Responses


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
    chosen: Responses,
    rejected: Responses,
    prompt_sum: Float[Tensor, " P"] | None = None,
    weights: Float[Tensor, " P"] | None = None,
    step_pairs: int,
    step_chosen_tokens: int,
) -> StepPart:
    """Returns the contribution of these pairs to a step of `step_pairs` pairs.

    A weight multiplies what its pair adds to the loss, preference loss and cross-entropy alike. Denominators stay the
    numbers of pairs and tokens, and the metrics of rewards and log-probabilities count every pair once.

    This is the only place that divides, by the denominators of the whole step. So the sum over parts does not depend on
    how the step is split into micro-batches and over ranks. P may be 0: then all values are zero, but the graph exists,
    so that a rank without pairs takes part in every collective of the backward pass.

    Args:
        objective: the objective.
        chosen: the chosen response of each pair.
        rejected: the rejected response of each pair.
        prompt_sum: the sum of the log-probabilities of each chosen response's prompt, if the cross-entropy includes it.
        weights: the weight of each pair; None gives every pair the weight 1.
        step_pairs: pairs of the whole step, over all ranks and micro-batches.
        step_chosen_tokens: tokens of the cross-entropy in the whole step.
    """

    def total(per_pair: Float[Tensor, " P"]) -> Float[Tensor, ""]:
        return per_pair.sum() if weights is None else (weights * per_pair).sum()

    loss = total(objective.losses(chosen, rejected)) / step_pairs
    sft = []
    if objective.sft_weight:
        target_sum = total(chosen.sum) if prompt_sum is None else total(chosen.sum) + total(prompt_sum)
        cross_entropy = -target_sum / step_chosen_tokens
        loss = loss + objective.sft_weight * cross_entropy
        sft = [cross_entropy]
    better, worse = objective.score(chosen), objective.score(rejected)
    metrics = [
        loss,
        objective.beta * (better.sum() / step_pairs),
        objective.beta * (worse.sum() / step_pairs),
        (better > worse).float().sum() / step_pairs,
        objective.beta * (better - worse).sum() / step_pairs,
        objective.logps(chosen).sum() / step_pairs,
        objective.logps(rejected).sum() / step_pairs,
        *sft,
    ]
    return StepPart(loss, torch.stack([m.detach() for m in metrics]))
