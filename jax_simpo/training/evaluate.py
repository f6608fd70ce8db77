"""Scores groups with a model without training it, and computes the metrics of an evaluation from the scores."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jax_simpo.data.groups import GroupLengths
from jax_simpo.data.loader import GroupSource, Known, step_batches
from jax_simpo.data.packing import StepPlan
from jax_simpo.models.transformer import Params
from jax_simpo.objectives import Objective, Responses
from jax_simpo.objectives.groups import GroupTerms, Ranking, group_terms
from jax_simpo.ops.responses import ResponseLogps
from jax_simpo.run.metrics import check_split_names, evaluation_figures
from jax_simpo.sharding import local_rows, put_rows

if TYPE_CHECKING:
    from jax_simpo.data.tokenize import GroupDataset

# Groups whose rows are packed together. Only the fill depends on it: scoring has no optimizer step to respect.
GROUPS_PER_PLAN = 512

_MOST_COMPARED = 1 << 24  # comparisons computed at once

ScoreFunction = Callable[[Params, Any], ResponseLogps]


@dataclass(frozen=True)
class GroupScores:
    """Log-probs of G groups with R responses in file order.

    Attributes:
        lengths: the token counts of the groups.
        sums: the sum over the scored tokens of each response, float32.
        prompt_sums: the sum over the prompt of each group's best response; zeros for an objective that does not read
            prompts.
        prompt_lengths: the number of tokens in these sums.
        known: the sums of the responses under the reference, and their scores, where the objective reads them.
    """

    lengths: GroupLengths
    sums: Float[np.ndarray, " R"]
    prompt_sums: Float[np.ndarray, " G"]
    prompt_lengths: Int[np.ndarray, " G"]
    known: Known = field(default_factory=Known)

    @property
    def responses(self) -> Responses:
        """All responses, as an objective reads them, float32 [R]."""
        reference = np.zeros_like(self.sums) if self.known.reference is None else self.known.reference
        return Responses(*(jnp.asarray(column, jnp.float32) for column in (self.sums, self.lengths.targets, reference)))

    def of_groups(self, indices: Int[np.ndarray, " H"]) -> GroupScores:
        """The scores of some of the groups."""
        responses = self.lengths.responses_of(indices)
        return GroupScores(
            self.lengths.of_groups(indices),
            self.sums[responses],
            self.prompt_sums[indices],
            self.prompt_lengths[indices],
            self.known.of(indices, responses),
        )

    def terms(self, objective: Objective) -> GroupTerms:
        """Computes the loss of each group, and the figures of its comparisons, float32 [G]."""
        found = [np.zeros(len(self.lengths), np.float32) for _ in GroupTerms._fields]
        # Groups of one size at a time: padded to the largest, a few large groups would make all the others large.
        for size in np.unique(self.lengths.sizes).tolist():
            of_size = np.flatnonzero(self.lengths.sizes == size)
            most = max(1, _MOST_COMPARED // size**2)
            for indices in np.split(of_size, range(most, len(of_size), most)):
                for all_groups, some in zip(found, self.of_groups(indices)._terms(objective, size), strict=True):
                    all_groups[indices] = some
        return GroupTerms(*map(jnp.asarray, found))

    def _terms(self, objective: Objective, size: int) -> GroupTerms:
        """Computes `terms` of groups that all have `size` responses."""
        count = len(self.lengths)
        group = np.broadcast_to(np.arange(count, dtype=np.int32)[:, None], (count, size))
        scores = None if self.known.scores is None else self.known.scores.reshape(count, size)
        ranking = Ranking(group, self.lengths.ranks.reshape(count, size), scores)
        responses = Responses(*(x.reshape(count, size) for x in self.responses))
        return GroupTerms(*(x[:, 0] for x in group_terms(objective, responses, ranking)))


def score_groups(
    score: ScoreFunction,
    params: Params,
    plan: StepPlan,
    source: GroupSource,
    mesh: Mesh,
    known: Known | None = None,
) -> GroupScores:
    """Computes the log-probs of every response of a split.

    Args:
        score: from `jax_simpo.training.step.make_score_function`.
        params: the model's parameters on the mesh.
        plan: the step plan of the split.
        source: the groups of the split.
        mesh: the mesh of the parameters, set by `jax.set_mesh`.
        known: the responses' sums under the reference and their scores, where the objective needs them.
    """
    lengths, steps = plan.lengths, range(plan.steps_per_epoch)
    sums, prompt_sums = (np.zeros(count, np.float32) for count in (len(lengths.ranks), len(lengths)))
    for step, scored in zip(steps, score_steps(score, params, plan, source, mesh, steps), strict=True):
        groups = plan.groups(step)
        sums[lengths.responses_of(groups)], prompt_sums[groups] = scored
    return GroupScores(lengths, sums, prompt_sums, _prompt_lengths(plan, lengths), known or Known())


def score_step(
    score: ScoreFunction,
    params: Params,
    plan: StepPlan,
    source: GroupSource,
    mesh: Mesh,
    step: int,
    known: Known | None = None,
) -> GroupScores:
    """Computes the log-probs of every response of one step of the plan. The arguments are those of `score_groups`."""
    groups = plan.groups(step)
    lengths = plan.lengths.of_groups(groups)
    ((sums, prompt_sums),) = score_steps(score, params, plan, source, mesh, range(step, step + 1))
    known = (known or Known()).of(groups, plan.lengths.responses_of(groups))
    return GroupScores(lengths, sums, prompt_sums, _prompt_lengths(plan, lengths), known)


def _prompt_lengths(plan: StepPlan, lengths: GroupLengths) -> Int[np.ndarray, " G"]:
    """Counts the scored tokens in the prompts of groups of the plan."""
    counts: np.ndarray = (lengths.best_targets(prompt=True) - lengths.best_targets()) * plan.prompt_targets
    return counts


def score_steps(
    score: ScoreFunction, params: Params, plan: StepPlan, source: GroupSource, mesh: Mesh, steps: range
) -> Iterator[tuple[Float[np.ndarray, " R"], Float[np.ndarray, " G"]]]:
    """Yields per step of the plan the sums of log-probs of its responses, and of its best responses' prompts.

    The arguments are those of `score_groups`, and the steps to compute.
    """
    size = plan.rows_per_micro_batch
    own = local_rows(mesh, size).tolist()
    with closing(step_batches(plan, source, steps, rows=own)) as batches:
        for step in batches:
            starts = step.lengths.starts
            sums, prompt_sums = (np.zeros(n, np.float32) for n in (len(step.lengths.ranks), len(starts)))
            scored = [score(params, put_rows(rows.arrays(), mesh, size)) for rows in step.micro_batches]
            for slots, logps in zip(step.slots, scored, strict=True):
                filled = slots.group >= 0
                found = jax.device_get(logps)
                sums[starts[slots.group[filled]] + slots.place[filled]] = found.sum[filled]
                if found.prompt_sum is not None:
                    best = filled & (slots.place == 0)
                    prompt_sums[slots.group[best]] = found.prompt_sum[best]
            yield sums, prompt_sums


def group_records(scores: GroupScores, objective: Objective) -> Iterator[dict[str, Any]]:
    """Yields one object per group, in file order, with the keys that `score` writes."""
    terms, responses, lengths = scores.terms(objective), scores.responses, scores.lengths
    rewards = objective.beta * np.asarray(objective.score(responses), np.float64)
    columns = {
        "logp_sum": scores.sums,
        "length": lengths.targets,
        "logp": scores.sums / lengths.targets,
        **({"reference_logp_sum": np.asarray(responses.reference_sum)} if objective.needs_reference else {}),
        "reward": rewards,
        "rank": lengths.ranks,
    }
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
    records = [dict(zip(columns, of_response, strict=True)) for of_response in values]
    for group, (start, size) in enumerate(zip(lengths.starts.tolist(), lengths.sizes.tolist(), strict=True)):
        own = records[start : start + size]
        if size == 2:
            margin = own[0]["reward"] - own[1]["reward"]
        else:
            margin = objective.beta * float(terms.margin[group])
        yield {
            **(_as_pair(own) if size == 2 else {}),
            "margin": margin,
            "loss": float(terms.loss[group]),
            "responses": own,
        }


def _as_pair(responses: list[dict[str, Any]]) -> dict[str, Any]:
    names = ("chosen", "rejected")
    keys = [key for key in responses[0] if key not in ("reward", "rank")]
    logps = {f"{name}_{key}": own[key] for name, own in zip(names, responses, strict=True) for key in keys}
    return {**logps, **{f"reward_{name}": own["reward"] for name, own in zip(names, responses, strict=True)}}


def evaluation_metrics(scores: GroupScores, objective: Objective) -> dict[str, float]:
    """Computes means over all groups, or all comparisons, under the names of the training metrics."""
    terms = scores.terms(objective)
    counts = np.asarray(terms.comparisons) if objective.mean_over == "pairs" else np.ones(len(scores.lengths))

    def mean(per_group: Array) -> float:
        return float(np.average(np.asarray(per_group, np.float64), weights=counts))

    metrics = {
        "loss": mean(terms.loss),
        "rewards/chosen": objective.beta * mean(terms.chosen),
        "rewards/rejected": objective.beta * mean(terms.rejected),
        "rewards/accuracies": mean(terms.accuracy),
        "rewards/margins": objective.beta * mean(terms.margin),
        "logps/chosen": mean(terms.chosen_logps),
        "logps/rejected": mean(terms.rejected_logps),
    }
    if objective.sft_weight:
        lengths = scores.lengths
        target_sum = scores.sums[lengths.starts].sum(dtype=np.float64) + scores.prompt_sums.sum(dtype=np.float64)
        metrics["sft_loss"] = float(-target_sum / (lengths.best_targets().sum() + scores.prompt_lengths.sum()))
        metrics["loss"] += objective.sft_weight * metrics["sft_loss"]
    return metrics


def split_metrics(
    scores: GroupScores, objective: Objective, splits: Mapping[str, Int[np.ndarray, " _"]]
) -> dict[str, float]:
    """Computes the metrics over all groups (`eval_loss`, ...) and, of several splits, of each (`eval_SPLIT_loss`, ...).

    Args:
        scores: the scores of the groups of all splits.
        objective: the objective whose loss and rewards are reported.
        splits: the indices of each split's groups (`GroupDataset.splits`).

    Raises:
        ConfigError: a split's name would give two metrics the same key.
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
        score: from `jax_simpo.training.step.make_score_function`.
        plan: the step plan of the groups, in file order.
        source: the groups of all evaluation splits.
        objective: the objective whose loss and rewards are reported.
        mesh: the mesh of the parameters.
        known: the responses' sums under the reference and their scores, where the objective needs them.

    Raises:
        ConfigError: a split's name would give two metrics the same key.
    """

    score: ScoreFunction
    plan: StepPlan
    source: GroupDataset
    objective: Objective
    mesh: Mesh
    known: Known = field(default_factory=Known)

    def __post_init__(self) -> None:
        check_split_names(list(self.source.splits), self.objective.metrics)

    def run(self, params: Params) -> dict[str, float]:
        """Computes the metrics, with the keys of an evaluation record, and `eval_runtime` in seconds."""
        started = time.perf_counter()
        scores = score_groups(self.score, params, self.plan, self.source, self.mesh, self.known)
        metrics = split_metrics(scores, self.objective, self.source.splits)
        return {**metrics, "eval_runtime": time.perf_counter() - started}
