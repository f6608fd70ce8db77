"""Scores groups with a model without training it, and computes the metrics of an evaluation from the scores."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from jax_simpo.data.groups import GroupLengths
from jax_simpo.data.loader import GroupSource, Known
from jax_simpo.data.packing import StepPlan
from jax_simpo.data.tokenize import GroupDataset
from jax_simpo.run.metrics import check_split_names, evaluation_figures
from torch_ref.batches import Batch, rank_steps
from torch_ref.comparisons import Comparisons, rankings_of
from torch_ref.distributed import Ranks
from torch_ref.engine import round_parameters
from torch_ref.losses import group_figures, group_losses, response_sums
from torch_ref.model import DTYPES
from torch_ref.objectives import Objective, Responses
from torch_ref.setup import Setup
from torch_ref.zero3 import Zero3Model, deepspeed_settings, partitioned_forward

GROUPS_PER_PLAN = 512  # groups whose rows are packed together; only the fill depends on it

Forward = Callable[[Batch], Tensor]  # gives the log-probability of every target of a batch


@contextmanager
def open_model(setup: Setup, deepspeed_file: Path | None = None) -> Iterator[Forward]:
    """Loads a model for scoring, as training starts from it, and frees its memory at the end.

    It is partitioned if a launcher started this process.
    """
    if setup.ranks.launched:
        partition = Zero3Model(deepspeed_settings(setup.config, deepspeed_file))
        policy = setup.load_policy(trained=False)
        forward = partitioned_forward(policy, partition)
    elif setup.start_name is None:
        # Random weights depend on the dtype in which they are drawn. Training draws them in float32, and rounds.
        forward = policy = setup.load_policy(torch.float32, trained=False)
        round_parameters(policy, DTYPES[setup.config.dtype])
    else:
        forward = policy = setup.load_policy(trained=False)
    try:
        yield forward
    finally:
        policy.free()


@dataclass(frozen=True)
class GroupScores:
    """Log-probs of G groups with R responses in file order, all on the host.

    Attributes:
        lengths: the token counts and ranks of the groups.
        responses: all responses, group after group, float32; with sums under the reference if there is one.
        prompt_sum: the sum of the log-probs of the prompt of each group's best response, float32; 0 where prompts have
            no targets.
        prompt_length: the number of these targets, int64.
        scores: the score of each response, float32, where the objective weighs comparisons by them.
    """

    lengths: GroupLengths
    responses: Responses
    prompt_sum: Float[Tensor, " G"]
    prompt_length: Int[Tensor, " G"]
    scores: Float[np.ndarray, " R"] | None = None

    def of_groups(self, indices: Int[np.ndarray, " H"]) -> GroupScores:
        """Returns the scores of some of the groups."""
        own, at = self.lengths.responses_of(indices), torch.from_numpy(indices)
        return GroupScores(
            self.lengths.of_groups(indices),
            self.responses.at(torch.from_numpy(own)),
            self.prompt_sum[at],
            self.prompt_length[at],
            None if self.scores is None else self.scores[own],
        )

    def comparisons(self, objective: Objective) -> Comparisons:
        """Lists the comparisons of the groups."""
        return objective.comparisons(rankings_of(self.lengths), self.scores)


def score_groups(
    forward: Forward,
    plan: StepPlan,
    source: GroupSource,
    ranks: Ranks,
    known: Known | None = None,
) -> GroupScores:
    """Computes the log-probs of every response of a split; the ranks share the work, and all get all scores.

    Args:
        forward: `Policy.forward`, or an engine's `logps`.
        plan: the step plan of the split, in file order (`seed=None`).
        source: the groups of the split.
        ranks: the ranks of the run.
        known: the responses' sums under the reference and their scores, where the objective needs them.
    """
    steps = score_steps(forward, plan, source, ranks)
    sums, prompt_sums = (np.concatenate(parts) for parts in zip(*steps, strict=True))
    return _scores(plan, plan.lengths, sums, prompt_sums, known or Known())


def score_step(
    forward: Forward, plan: StepPlan, source: GroupSource, ranks: Ranks, step: int, known: Known | None = None
) -> GroupScores:
    """Computes the log-probs of every response of one step, from 0, in the order of the step's groups.

    The other arguments are those of `score_groups`.
    """
    [(sums, prompt_sums)] = score_steps(forward, plan, source, ranks, range(step, step + 1))
    groups = plan.groups(step)
    own = (known or Known()).of(groups, plan.lengths.responses_of(groups))
    return _scores(plan, plan.lengths.of_groups(groups), sums, prompt_sums, own)


def _scores(
    plan: StepPlan,
    lengths: GroupLengths,
    sums: Float[np.ndarray, " R"],
    prompt_sums: Float[np.ndarray, " G"],
    known: Known,
) -> GroupScores:
    """Joins the sums of groups with what else is known of them."""
    reference = None if known.reference is None else torch.from_numpy(known.reference)
    prompt_length = (lengths.best_targets(prompt=True) - lengths.best_targets()) * plan.prompt_targets
    responses = Responses(torch.from_numpy(sums), _integers(lengths.targets), reference)
    return GroupScores(lengths, responses, torch.from_numpy(prompt_sums), _integers(prompt_length), known.scores)


def _integers(values: Int[np.ndarray, " P"]) -> Int[Tensor, " P"]:
    return torch.from_numpy(values.astype(np.int64))


@torch.no_grad()
def score_steps(
    forward: Forward, plan: StepPlan, source: GroupSource, ranks: Ranks, steps: range | None = None
) -> Iterator[tuple[Float[np.ndarray, " R"], Float[np.ndarray, " G"]]]:
    """Yields per step of the plan the sums of log-probs of its responses, and of its best responses' prompts, float32.

    The arguments are those of `score_groups`, and the steps to compute; None computes all.
    """
    steps = range(plan.steps_per_epoch) if steps is None else steps
    with closing(rank_steps(plan, source, steps, ranks.rank, ranks.world)) as shares:
        for step in shares:
            responses, groups = len(step.lengths.ranks), len(step.groups)
            sums = np.zeros(responses + groups)  # of the step's responses, and after them of its prompts
            for batch in step.micro_batches:
                on_device = batch.to(ranks.device)
                own = batch.groups.numpy()
                places = np.concatenate([step.lengths.responses_of(own), responses + own])
                logps = forward(on_device)
                sums[places] = response_sums(logps, on_device.target_response, len(places)).cpu().numpy()
            of_responses, of_prompts = np.split(ranks.sum(sums).astype(np.float32), [responses])
            yield of_responses, of_prompts


def group_records(scores: GroupScores, objective: Objective) -> Iterator[dict[str, Any]]:
    """Yields one object per group, in file order, with the keys that `score` writes.

    A pair also has the values of its two responses under names with `chosen` and `rejected`.
    """
    responses, compared = scores.responses, scores.comparisons(objective)
    columns = {"logp_sum": responses.sum, "length": responses.length, "logp": responses.mean}
    if responses.reference_sum is not None:
        columns["reference_logp_sum"] = responses.reference_sum
    columns["reward"] = objective.beta * objective.score(responses).double()
    columns["rank"] = _integers(scores.lengths.ranks)
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
    records = [dict(zip(columns, of_response, strict=True)) for of_response in values]
    losses = group_losses(objective, responses, compared).tolist()
    margins = group_figures(objective, responses, compared)["rewards/margins"].tolist()
    starts = scores.lengths.starts.tolist()
    for start, size, margin, loss in zip(starts, scores.lengths.sizes.tolist(), margins, losses, strict=True):
        own = records[start : start + size]
        if size == 2:  # the difference of the two rewards, to the last digit
            margin = own[0]["reward"] - own[1]["reward"]
        yield {**(_as_pair(*own) if size == 2 else {}), "margin": margin, "loss": loss, "responses": own}


def _as_pair(chosen: Mapping[str, Any], rejected: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of a pair's two responses in one object."""
    sides = {"chosen": chosen, "rejected": rejected}
    logps = {
        f"{side}_{key}": value
        for side, response in sides.items()
        for key, value in response.items()
        if key not in ("reward", "rank")
    }
    return {**logps, **{f"reward_{side}": response["reward"] for side, response in sides.items()}}


def evaluation_metrics(scores: GroupScores, objective: Objective) -> dict[str, float]:
    """Computes means over all groups, or over all comparisons, under the names of the training metrics."""
    responses, compared = scores.responses, scores.comparisons(objective)
    figures = {
        "loss": group_losses(objective, responses, compared).double(),
        **group_figures(objective, responses, compared),
    }
    if objective.mean_over == "pairs":
        figures = {name: compared.count * figure for name, figure in figures.items()}
    denominator = objective.denominator(rankings_of(scores.lengths))
    metrics = {name: figure.sum() / denominator for name, figure in figures.items()}
    if objective.sft_weight:
        target_sum = (responses.sum[compared.first].double() + scores.prompt_sum.double()).sum()
        metrics["sft_loss"] = -target_sum / (responses.length[compared.first] + scores.prompt_length).sum()
        metrics["loss"] = metrics["loss"] + objective.sft_weight * metrics["sft_loss"]
    return {name: float(value) for name, value in metrics.items()}


def split_metrics(
    scores: GroupScores, objective: Objective, splits: Mapping[str, Int[np.ndarray, " _"]]
) -> dict[str, float]:
    """Computes the metrics over all groups (`eval_loss`, ...) and, of several splits, of each (`eval_SPLIT_loss`, ...).

    Args:
        scores: the scores of the groups of all splits.
        objective: the objective whose loss and rewards are reported.
        splits: the indices of each split's groups (`GroupDataset.splits`).
    """
    by_split = {
        split: {**evaluation_metrics(scores.of_groups(indices), objective), "pairs": len(indices)}
        for split, indices in splits.items()
    }
    overall = {**evaluation_metrics(scores, objective), "pairs": len(scores.lengths)}
    return evaluation_figures(overall, by_split)


@dataclass(frozen=True)
class Evaluation:
    """Evaluates the groups of the evaluation splits during a run.

    Attributes:
        plan: the step plan of the groups, in file order.
        source: the groups of all evaluation splits.
        objective: the objective whose loss and rewards are reported.
        ranks: the ranks of the run.
        known: the responses' sums under the reference and their scores, where the objective needs them.

    Raises:
        ConfigError: a split's name would give two metrics the same key.
    """

    plan: StepPlan
    source: GroupDataset
    objective: Objective
    ranks: Ranks
    known: Known = field(default_factory=Known)

    def __post_init__(self) -> None:
        check_split_names(list(self.source.splits), self.objective.metrics)

    def run(self, forward: Forward) -> dict[str, float]:
        """Computes the metrics, with the keys of an evaluation record, and `eval_runtime` in seconds."""
        started = time.perf_counter()
        scores = score_groups(forward, self.plan, self.source, self.ranks, self.known)
        metrics = split_metrics(scores, self.objective, self.source.splits)
        return {**metrics, "eval_runtime": time.perf_counter() - started}
