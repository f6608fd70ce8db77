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
from jax_simpo.objectives.simpo import Objective
from jax_simpo.ops.responses import ResponseLogps
from jax_simpo.run.metrics import check_split_names, evaluation_figures
from jax_simpo.sharding import local_rows, put_rows

# Pairs whose rows are packed together. Only the fill depends on it: scoring has no optimizer step to respect.
PAIRS_PER_PLAN = 512

ScoreFunction = Callable[[Params, Any], ResponseLogps]


@dataclass(frozen=True)
class PairScores:
    """Log-probs of P pairs in file order: sums over the response tokens (float32), and their number."""

    chosen_sum: Float[np.ndarray, " P"]
    chosen_length: Int[np.ndarray, " P"]
    rejected_sum: Float[np.ndarray, " P"]
    rejected_length: Int[np.ndarray, " P"]

    @property
    def chosen_logps(self) -> Float[np.ndarray, " P"]:
        """Mean log-prob of the chosen response."""
        return self.chosen_sum / self.chosen_length

    @property
    def rejected_logps(self) -> Float[np.ndarray, " P"]:
        """Mean log-prob of the rejected response."""
        return self.rejected_sum / self.rejected_length

    def of_pairs(self, indices: Int[np.ndarray, " Q"]) -> PairScores:
        """The scores of some of the pairs."""
        return PairScores(*(column[indices] for column in vars(self).values()))


def score_pairs(score: ScoreFunction, params: Params, plan: StepPlan, source: PairSource, mesh: Mesh) -> PairScores:
    """Computes the log-probs of every pair of a split.

    Args:
        score: from `jax_simpo.training.step.make_score_function`.
        params: the model's parameters on the mesh.
        plan: the step plan of the split, in file order (`seed=None`).
        source: the pairs of the split.
        mesh: the mesh of the parameters, set by `jax.set_mesh`.
    """
    sums = np.zeros((2, len(plan.lengths)), np.float32)
    lengths = np.zeros((2, len(plan.lengths)), np.int64)
    for pair, rank, logp_sum, length in _scored_slots(score, params, plan, source, mesh):
        sums[rank, pair] = logp_sum
        lengths[rank, pair] = length
    return PairScores(sums[0], lengths[0], sums[1], lengths[1])


def _scored_slots(
    score: ScoreFunction, params: Params, plan: StepPlan, source: PairSource, mesh: Mesh
) -> Iterator[tuple[np.ndarray, ...]]:
    """Yields per micro-batch the pair, rank, sum and length of every response slot that is filled."""
    size = plan.rows_per_micro_batch
    own = local_rows(mesh, size).tolist()
    with closing(step_batches(plan, source, range(plan.steps_per_epoch), rows=own)) as steps:
        for step in steps:
            scored = [score(params, put_rows(rows.arrays(), mesh, size)) for rows in step.micro_batches]
            for slots, logps in zip(step.slots, scored, strict=True):
                logp_sum, length = jax.device_get((logps.sum, logps.length))
                filled = slots.pair >= 0
                yield step.pairs[slots.pair[filled]], slots.rank[filled], logp_sum[filled], length[filled]


def pair_records(scores: PairScores, objective: Objective) -> Iterator[dict[str, Any]]:
    """Yields one object per pair, in file order, with the keys that `score` writes."""
    losses = np.asarray(objective.losses(jnp.asarray(scores.chosen_logps), jnp.asarray(scores.rejected_logps)))
    chosen, rejected = scores.chosen_logps, scores.rejected_logps
    for i in range(len(losses)):
        yield {
            "chosen_logp_sum": float(scores.chosen_sum[i]),
            "chosen_length": int(scores.chosen_length[i]),
            "chosen_logp": float(chosen[i]),
            "rejected_logp_sum": float(scores.rejected_sum[i]),
            "rejected_length": int(scores.rejected_length[i]),
            "rejected_logp": float(rejected[i]),
            "reward_chosen": float(objective.beta * chosen[i]),
            "reward_rejected": float(objective.beta * rejected[i]),
            "margin": float(objective.beta * (chosen[i] - rejected[i])),
            "loss": float(losses[i]),
        }


def evaluation_metrics(scores: PairScores, objective: Objective) -> dict[str, float]:
    """Computes means over all pairs, under the names of the training metrics."""
    chosen, rejected = scores.chosen_logps.astype(np.float64), scores.rejected_logps.astype(np.float64)
    losses = np.asarray(objective.losses(jnp.asarray(scores.chosen_logps), jnp.asarray(scores.rejected_logps)))
    metrics = {
        "loss": losses.mean(dtype=np.float64),
        "rewards/chosen": objective.beta * chosen.mean(),
        "rewards/rejected": objective.beta * rejected.mean(),
        "rewards/accuracies": (chosen > rejected).mean(),
        "rewards/margins": objective.beta * (chosen - rejected).mean(),
        "logps/chosen": chosen.mean(),
        "logps/rejected": rejected.mean(),
    }
    if objective.sft_weight:
        metrics["sft_loss"] = -scores.chosen_sum.sum(dtype=np.float64) / scores.chosen_length.sum()
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

    Raises:
        ConfigError: a split's name would give two metrics the same key.
    """

    score: ScoreFunction
    plan: StepPlan
    source: PairDataset
    objective: Objective
    mesh: Mesh

    def __post_init__(self) -> None:
        check_split_names(list(self.source.splits), self.objective.metrics)

    def run(self, params: Params) -> dict[str, float]:
        """Computes the metrics, with the keys of an evaluation record, and `eval_runtime` in seconds."""
        started = time.perf_counter()
        scores = score_pairs(self.score, params, self.plan, self.source, self.mesh)
        metrics = split_metrics(scores, self.objective, self.source.splits)
        return {**metrics, "eval_runtime": time.perf_counter() - started}
