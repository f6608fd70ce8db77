"""Scores pairs with a model without training it, and computes the metrics of an evaluation from the scores."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from jax_simpo.data.loader import PairSource, step_batches
from jax_simpo.data.packing import StepPlan
from jax_simpo.data.tokenize import PairDataset
from jax_simpo.models.transformer import Params
from jax_simpo.objectives import Objective, Responses
from jax_simpo.ops.responses import ResponseLogps
from jax_simpo.run.metrics import check_split_names, evaluation_figures
from jax_simpo.sharding import local_rows, put_rows

# Pairs whose rows are packed together. Only the fill depends on it: scoring has no optimizer step to respect.
PAIRS_PER_PLAN = 512

ScoreFunction = Callable[[Params, Any], ResponseLogps]


@dataclass(frozen=True)
class PairScores:
    """Log-probs of P pairs in file order: sums over the response tokens (float32), and their number.

    `chosen_reference` and `rejected_reference` are the same sums under the reference, zeros for an objective without.
    `prompt_sum` and `prompt_length` are those of the chosen responses' prompts, zeros for an objective that does not
    read them.
    """

    chosen_sum: Float[np.ndarray, " P"]
    chosen_length: Int[np.ndarray, " P"]
    rejected_sum: Float[np.ndarray, " P"]
    rejected_length: Int[np.ndarray, " P"]
    chosen_reference: Float[np.ndarray, " P"]
    rejected_reference: Float[np.ndarray, " P"]
    prompt_sum: Float[np.ndarray, " P"]
    prompt_length: Int[np.ndarray, " P"]

    @classmethod
    def of(
        cls,
        sums: Float[np.ndarray, "P 3"],
        lengths: Int[np.ndarray, "P 3"],
        reference: Float[np.ndarray, "P 2"] | None = None,
    ) -> PairScores:
        """Makes the scores from arrays whose columns are the chosen and rejected responses and the chosen's prompts."""
        reference = np.zeros((len(sums), 2), np.float32) if reference is None else reference
        (chosen, rejected, prompt), (chosen_length, rejected_length, prompt_length) = sums.T, lengths.T
        of_chosen, of_rejected = reference.T
        return cls(chosen, chosen_length, rejected, rejected_length, of_chosen, of_rejected, prompt, prompt_length)

    @property
    def chosen_logps(self) -> Float[np.ndarray, " P"]:
        """Mean log-prob of the chosen response."""
        return self.chosen_sum / self.chosen_length

    @property
    def rejected_logps(self) -> Float[np.ndarray, " P"]:
        """Mean log-prob of the rejected response."""
        return self.rejected_sum / self.rejected_length

    @property
    def responses(self) -> tuple[Responses, Responses]:
        """The chosen and the rejected responses, as an objective reads them."""
        return (
            _responses(self.chosen_sum, self.chosen_length, self.chosen_reference),
            _responses(self.rejected_sum, self.rejected_length, self.rejected_reference),
        )

    def of_pairs(self, indices: Int[np.ndarray, " Q"]) -> PairScores:
        """The scores of some of the pairs."""
        return PairScores(*(column[indices] for column in vars(self).values()))


def _responses(*columns: np.ndarray) -> Responses:
    return Responses(*(jnp.asarray(column, jnp.float32) for column in columns))


def score_pairs(
    score: ScoreFunction,
    params: Params,
    plan: StepPlan,
    source: PairSource,
    mesh: Mesh,
    reference: Float[np.ndarray, "P 2"] | None = None,
) -> PairScores:
    """Computes the log-probs of every pair of a split.

    Args:
        score: from `jax_simpo.training.step.make_score_function`.
        params: the model's parameters on the mesh.
        plan: the step plan of the split, in file order (`seed=None`).
        source: the pairs of the split.
        mesh: the mesh of the parameters, set by `jax.set_mesh`.
        reference: the sums of the pairs' responses under the reference, for an objective that needs one.
    """
    steps = score_steps(score, params, plan, source, mesh, range(plan.steps_per_epoch))
    pairs, sums, lengths = (np.concatenate(parts) for parts in zip(*steps, strict=True))
    order = np.argsort(pairs)
    return PairScores.of(sums[order], lengths[order], reference)


def score_steps(
    score: ScoreFunction, params: Params, plan: StepPlan, source: PairSource, mesh: Mesh, steps: range
) -> Iterator[tuple[Int[np.ndarray, " P"], Float[np.ndarray, "P 3"], Int[np.ndarray, "P 3"]]]:
    """Yields per step of the plan its pairs, and the sums of log-probs and the lengths that `PairScores.of` takes.

    The arguments are those of `score_pairs`, and the steps to compute.
    """
    size = plan.rows_per_micro_batch
    own = local_rows(mesh, size).tolist()
    with closing(step_batches(plan, source, steps, rows=own)) as batches:
        for step in batches:
            sums, lengths = np.zeros((len(step.pairs), 3), np.float32), np.zeros((len(step.pairs), 3), np.int64)
            scored = [score(params, put_rows(rows.arrays(), mesh, size)) for rows in step.micro_batches]
            for slots, logps in zip(step.slots, scored, strict=True):
                filled = slots.pair >= 0
                place = slots.pair[filled], slots.rank[filled]
                found = jax.device_get(logps)
                sums[place], lengths[place] = found.sum[filled], found.length[filled]
                if found.prompt_sum is not None:
                    chosen = filled & (slots.rank == 0)
                    of_prompt = slots.pair[chosen], 2
                    sums[of_prompt], lengths[of_prompt] = found.prompt_sum[chosen], found.prompt_length[chosen]
            yield step.pairs, sums, lengths


def pair_records(scores: PairScores, objective: Objective) -> Iterator[dict[str, Any]]:
    """Yields one object per pair, in file order, with the keys that `score` writes."""
    losses = np.asarray(objective.losses(*scores.responses))
    rewards = [objective.beta * np.asarray(objective.score(r), np.float64) for r in scores.responses]
    columns = {
        "chosen_logp_sum": scores.chosen_sum,
        "chosen_length": scores.chosen_length,
        "chosen_logp": scores.chosen_logps,
        "rejected_logp_sum": scores.rejected_sum,
        "rejected_length": scores.rejected_length,
        "rejected_logp": scores.rejected_logps,
    }
    if objective.needs_reference:
        columns["chosen_reference_logp_sum"] = scores.chosen_reference
        columns["rejected_reference_logp_sum"] = scores.rejected_reference
    columns |= {
        "reward_chosen": rewards[0],
        "reward_rejected": rewards[1],
        "margin": rewards[0] - rewards[1],
        "loss": losses,
    }
    for values in zip(*(column.tolist() for column in columns.values()), strict=True):
        yield dict(zip(columns, values, strict=True))


def evaluation_metrics(scores: PairScores, objective: Objective) -> dict[str, float]:
    """Computes means over all pairs, under the names of the training metrics."""
    responses = scores.responses
    chosen, rejected = (np.asarray(objective.score(r), np.float64) for r in responses)
    chosen_logps, rejected_logps = (np.asarray(objective.logps(r), np.float64) for r in responses)
    metrics = {
        "loss": np.asarray(objective.losses(*responses)).mean(dtype=np.float64),
        "rewards/chosen": objective.beta * chosen.mean(),
        "rewards/rejected": objective.beta * rejected.mean(),
        "rewards/accuracies": (chosen > rejected).mean(),
        "rewards/margins": objective.beta * (chosen - rejected).mean(),
        "logps/chosen": chosen_logps.mean(),
        "logps/rejected": rejected_logps.mean(),
    }
    if objective.sft_weight:
        target_sum = scores.chosen_sum.sum(dtype=np.float64) + scores.prompt_sum.sum(dtype=np.float64)
        metrics["sft_loss"] = -target_sum / (scores.chosen_length.sum() + scores.prompt_length.sum())
        metrics["loss"] += objective.sft_weight * metrics["sft_loss"]
    return {name: float(value) for name, value in metrics.items()}


def split_metrics(
    scores: PairScores, objective: Objective, splits: Mapping[str, Int[np.ndarray, " _"]]
) -> dict[str, float]:
    """Computes the metrics over all pairs (`eval_loss`, ...) and, of several splits, of each (`eval_SPLIT_loss`, ...).

    Args:
        scores: the scores of the pairs of all splits.
        objective: the objective whose loss and rewards are reported.
        splits: the indices of each split's pairs (`PairDataset.splits`).

    Raises:
        ConfigError: a split's name would give two metrics the same key.
    """
    by_split = {
        split: {**evaluation_metrics(scores.of_pairs(indices), objective), "pairs": len(indices)}
        for split, indices in splits.items()
    }
    overall = {**evaluation_metrics(scores, objective), "pairs": len(scores.chosen_sum)}
    return evaluation_figures(overall, by_split)


@dataclass(frozen=True)
class Evaluation:
    """Evaluates the pairs of the evaluation splits during a run.

    Attributes:
        score: from `jax_simpo.training.step.make_score_function`.
        plan: the step plan of the pairs, in file order.
        source: the pairs of all evaluation splits.
        objective: the objective whose loss and rewards are reported.
        mesh: the mesh of the parameters.
        reference: the sums of the pairs' responses under the reference, for an objective that needs one.

    Raises:
        ConfigError: a split's name would give two metrics the same key.
    """

    score: ScoreFunction
    plan: StepPlan
    source: PairDataset
    objective: Objective
    mesh: Mesh
    reference: Float[np.ndarray, "P 2"] | None = None

    def __post_init__(self) -> None:
        check_split_names(list(self.source.splits), self.objective.metrics)

    def run(self, params: Params) -> dict[str, float]:
        """Computes the metrics, with the keys of an evaluation record, and `eval_runtime` in seconds."""
        started = time.perf_counter()
        scores = score_pairs(self.score, params, self.plan, self.source, self.mesh, self.reference)
        metrics = split_metrics(scores, self.objective, self.source.splits)
        return {**metrics, "eval_runtime": time.perf_counter() - started}
