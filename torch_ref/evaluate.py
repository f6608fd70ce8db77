"""Scores pairs with a model without training it, and computes the metrics of an evaluation from the scores."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from jax_simpo.data.loader import PairSource
from jax_simpo.data.packing import StepPlan
from jax_simpo.data.tokenize import PairDataset
from jax_simpo.run.metrics import check_split_names, evaluation_figures
from torch_ref.batches import Batch, rank_steps
from torch_ref.distributed import Ranks
from torch_ref.losses import Objective, response_sums

PAIRS_PER_PLAN = 512  # pairs whose rows are packed together; only the fill depends on it

Forward = Callable[[Batch], Tensor]  # gives the log-probability of every target of a batch


@dataclass(frozen=True)
class PairScores:
    """Log-probs of P pairs in file order: sums over the response tokens, and their number."""

    chosen_sum: Float[np.ndarray, " P"]
    chosen_length: Int[np.ndarray, " P"]
    rejected_sum: Float[np.ndarray, " P"]
    rejected_length: Int[np.ndarray, " P"]

    @property
    def chosen_logps(self) -> Float[np.ndarray, " P"]:
        """Mean log-prob of the chosen responses, float32."""
        return (self.chosen_sum / self.chosen_length).astype(np.float32)

    @property
    def rejected_logps(self) -> Float[np.ndarray, " P"]:
        """Mean log-prob of the rejected responses, float32."""
        return (self.rejected_sum / self.rejected_length).astype(np.float32)

    def of_pairs(self, indices: Int[np.ndarray, " Q"]) -> PairScores:
        """The scores of some of the pairs."""
        return PairScores(*(column[indices] for column in vars(self).values()))

    def losses(self, objective: Objective) -> Float[np.ndarray, " P"]:
        """The preference loss of each pair, float32."""
        chosen, rejected = (torch.from_numpy(x) for x in (self.chosen_logps, self.rejected_logps))
        return objective.losses(chosen, rejected).numpy()


@torch.no_grad()
def score_pairs(forward: Forward, plan: StepPlan, source: PairSource, ranks: Ranks) -> PairScores:
    """Computes the log-probs of every pair of a split; the ranks share the work, and all get all scores.

    Args:
        forward: `Policy.forward`, or an engine's `logps`.
        plan: the step plan of the split, in file order (`seed=None`).
        source: the pairs of the split.
        ranks: the ranks of the run.
    """
    sums = np.zeros((2, len(plan.lengths)))
    for step in rank_steps(plan, source, range(plan.steps_per_epoch), ranks.rank, ranks.world):
        for batch in step.micro_batches:
            on_device = batch.to(ranks.device)
            logps = response_sums(forward(on_device), on_device.target_response, len(batch.response_length)).cpu()
            pairs = step.pairs[batch.pairs.numpy()]
            sums[0, pairs] = logps[batch.chosen].numpy()
            sums[1, pairs] = logps[batch.rejected].numpy()
    sums = ranks.sum(sums).astype(np.float32)
    return PairScores(sums[0], plan.lengths.chosen_targets, sums[1], plan.lengths.rejected_targets)


def pair_records(scores: PairScores, objective: Objective) -> Iterator[dict[str, Any]]:
    """Yields one object per pair, in file order, with the keys that `score` writes."""
    losses, beta = scores.losses(objective), objective.beta
    for i, (chosen, rejected) in enumerate(zip(scores.chosen_logps, scores.rejected_logps, strict=True)):
        yield {
            "chosen_logp_sum": float(scores.chosen_sum[i]),
            "chosen_length": int(scores.chosen_length[i]),
            "chosen_logp": float(chosen),
            "rejected_logp_sum": float(scores.rejected_sum[i]),
            "rejected_length": int(scores.rejected_length[i]),
            "rejected_logp": float(rejected),
            "reward_chosen": float(beta * chosen),
            "reward_rejected": float(beta * rejected),
            "margin": float(beta * (chosen - rejected)),
            "loss": float(losses[i]),
        }


def evaluation_metrics(scores: PairScores, objective: Objective) -> dict[str, float]:
    """Computes means over all pairs, under the names of the training metrics."""
    chosen, rejected = scores.chosen_logps.astype(np.float64), scores.rejected_logps.astype(np.float64)
    metrics = {
        "loss": scores.losses(objective).mean(dtype=np.float64),
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
        plan: the step plan of the pairs, in file order.
        source: the pairs of all evaluation splits.
        objective: the objective whose loss and rewards are reported.
        ranks: the ranks of the run.

    Raises:
        ConfigError: a split's name would give two metrics the same key.
    """

    plan: StepPlan
    source: PairDataset
    objective: Objective
    ranks: Ranks

    def __post_init__(self) -> None:
        check_split_names(list(self.source.splits), self.objective.metrics)

    def run(self, forward: Forward) -> dict[str, float]:
        """Computes the metrics, with the keys of an evaluation record, and `eval_runtime` in seconds."""
        started = time.perf_counter()
        scores = score_pairs(forward, self.plan, self.source, self.ranks)
        metrics = split_metrics(scores, self.objective, self.source.splits)
        return {**metrics, "eval_runtime": time.perf_counter() - started}
