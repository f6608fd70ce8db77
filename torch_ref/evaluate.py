"""Scores pairs with a model as it stands, and makes evaluation metrics of the scores."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from jax_simpo.data.loader import PairSource
from jax_simpo.data.packing import StepPlan
from jax_simpo.data.tokenize import PairDataset
from torch_ref.batches import Batch, rank_steps
from torch_ref.distributed import Ranks
from torch_ref.losses import Objective, response_sums

PAIRS_PER_PLAN = 512  # planned together; nothing depends on it but how well rows are filled

Forward = Callable[[Batch], Tensor]  # the log-probability of every target of a batch


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

    def losses(self, objective: Objective) -> Float[np.ndarray, " P"]:
        """The preference loss of each pair, float32."""
        chosen, rejected = (torch.from_numpy(x) for x in (self.chosen_logps, self.rejected_logps))
        return objective.losses(chosen, rejected).numpy()


@torch.no_grad()
def score_pairs(forward: Forward, plan: StepPlan, source: PairSource, ranks: Ranks) -> PairScores:
    """Computes the log-probs of every pair of a split; the ranks share the work, and all get all scores.

    Args:
        forward: `Policy.forward`, or an engine's `logps`.
        plan: a plan of the split in file order (`seed=None`).
        source: its pairs.
        ranks: who computes.
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
    """One object per pair, in file order, with the keys that `score` writes."""
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
    """Means over all pairs, under the names of the training metrics."""
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


@dataclass(frozen=True)
class Evaluation:
    """Evaluates one split whenever asked."""

    plan: StepPlan
    source: PairDataset
    objective: Objective
    ranks: Ranks

    def run(self, forward: Forward) -> dict[str, float]:
        """The split's metrics, each with the prefix `eval_`."""
        started = time.perf_counter()
        metrics = evaluation_metrics(score_pairs(forward, self.plan, self.source, self.ranks), self.objective)
        metrics |= {"pairs": len(self.plan.lengths), "runtime": time.perf_counter() - started}
        return {f"eval_{name}": value for name, value in metrics.items()}
