"""Computes the losses and figures of groups, and the shares of micro-batches and ranks in a step's loss and metrics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from torch_ref.comparisons import Comparisons
from torch_ref.objectives import Objective, Responses, bradley_terry


def response_sums(logps: Float[Tensor, " N"], response: Int[Tensor, " N"], responses: int) -> Float[Tensor, " S"]:
    """Adds up the log-probabilities of each response's tokens. A response without tokens gets zero."""
    return logps.new_zeros(responses).index_add(0, response, logps)


def group_losses(objective: Objective, responses: Responses, compared: Comparisons) -> Float[Tensor, " G"]:
    """Returns the preference loss of each group, float32.

    It is the weighted mean of the losses of its comparisons. Plackett-Luce alone is no mean, and has no weights.

    Args:
        objective: the objective.
        responses: the S responses of the groups.
        compared: their comparisons, from `Objective.comparisons`.
    """
    chosen, rejected = responses.at(compared.better), responses.at(compared.worse)
    if objective.group_loss == "plackett_luce":
        return objective.weights[objective.first] * _plackett_luce(objective.margins(chosen, rejected), compared)
    return compared.total(compared.share * objective.losses(chosen, rejected))


def _plackett_luce(margins: Float[Tensor, " C"], compared: Comparisons) -> Float[Tensor, " G"]:
    """Returns the negative log-likelihood of each group's ranking (Plackett 1975, Luce 1959).

    Response i comes before all that are worse with the probability `exp(r_i) / (exp(r_i) + sum of exp(r_j))`, which is
    `sigmoid(-log(sum of exp(r_j - r_i)))`. The product of these is the probability of the ranking; a margin may stand
    in the place of `r_i - r_j`. Rafailov et al. 2023, arXiv 2305.18290, appendix A.3, have it with DPO's rewards.
    """
    if not compared.rivals:
        return compared.total(margins)
    of_better = list(torch.split(-margins, compared.rivals))
    log_odds = -torch.logsumexp(pad_sequence(of_better, batch_first=True, padding_value=-torch.inf), dim=1)
    last = torch.tensor(compared.rivals, device=margins.device).cumsum(0) - 1
    return compared.total(bradley_terry(log_odds), compared.group[last])


@torch.no_grad()
def group_figures(objective: Objective, responses: Responses, compared: Comparisons) -> dict[str, Float[Tensor, " G"]]:
    """Returns what is logged of each group beside its loss, float64, by the names of the metrics and in their order.

    Each is the plain mean over the group's comparisons, whatever their weights. `rewards/chosen` and `logps/chosen` are
    those of the better responses, `rewards/rejected` and `logps/rejected` those of the worse ones.
    """
    rewards, logps = objective.score(responses).double(), objective.logps(responses).double()
    chosen, rejected = rewards[compared.better], rewards[compared.worse]
    return {
        "rewards/chosen": objective.beta * compared.mean(chosen),
        "rewards/rejected": objective.beta * compared.mean(rejected),
        "rewards/accuracies": compared.mean((chosen > rejected).double()),
        "rewards/margins": objective.beta * compared.mean(chosen - rejected),
        "logps/chosen": compared.mean(logps[compared.better]),
        "logps/rejected": compared.mean(logps[compared.worse]),
    }


@dataclass(frozen=True)
class StepPart:
    """The contribution of some of a step's groups; the contributions of all its groups add up to the step.

    Attributes:
        loss: the contribution to the loss, float32, with its graph.
        metrics: the contributions to the metrics, float64, in the order of `Objective.metrics`, without a graph.
    """

    loss: Float[Tensor, ""]
    metrics: Float[Tensor, " M"]


def step_part(
    objective: Objective,
    responses: Responses,
    compared: Comparisons,
    *,
    prompt_sum: Float[Tensor, " G"] | None = None,
    weights: Float[Tensor, " G"] | None = None,
    denominator: int,
    step_chosen_tokens: int,
) -> StepPart:
    """Returns the contribution of these groups to a step.

    A weight multiplies what its group adds to the loss, preference loss and cross-entropy alike. Denominators stay the
    numbers of groups (or comparisons) and tokens, and the metrics of rewards and log-probabilities do not know weights.

    This is the only place that divides, by the denominators of the whole step. So the sum over parts does not depend on
    how the step is split into micro-batches and over ranks. G may be 0: then all values are zero, but the graph exists,
    so that a rank without groups takes part in every collective of the backward pass.

    Args:
        objective: the objective.
        responses: the S responses of the groups, group after group.
        compared: their comparisons, from `Objective.comparisons`.
        prompt_sum: the sum of the log-probabilities of the prompt of each group's first response, if the cross-entropy
            includes it.
        weights: the weight of each group; None gives every group the weight 1.
        denominator: `Objective.denominator` of the whole step, over all ranks and micro-batches.
        step_chosen_tokens: tokens of the cross-entropy in the whole step.
    """

    def mean(per_group: Float[Tensor, " G"]) -> Float[Tensor, ""]:
        counted = compared.count * per_group if objective.mean_over == "pairs" else per_group
        return counted.sum() / denominator

    def weighted(per_group: Float[Tensor, " G"]) -> Float[Tensor, " G"]:
        return per_group if weights is None else weights * per_group

    loss = mean(weighted(group_losses(objective, responses, compared)))
    sft = []
    if objective.sft_weight:
        target_sum = weighted(responses.sum[compared.first]).sum()
        if prompt_sum is not None:
            target_sum = target_sum + weighted(prompt_sum).sum()
        cross_entropy = -target_sum / step_chosen_tokens
        loss = loss + objective.sft_weight * cross_entropy
        sft = [cross_entropy]
    figures = [mean(figure) for figure in group_figures(objective, responses, compared).values()]
    return StepPart(loss, torch.stack([value.detach().double() for value in (loss, *figures, *sft)]))
