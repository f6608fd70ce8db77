"""Scores pairs with a model without training it, and computes the metrics of an evaluation from the scores."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
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
from torch_ref.engine import round_parameters
from torch_ref.losses import response_sums
from torch_ref.model import DTYPES
from torch_ref.objectives import Objective, Responses
from torch_ref.setup import Setup
from torch_ref.zero3 import Zero3Model, deepspeed_settings, partitioned_forward

PAIRS_PER_PLAN = 512  # pairs whose rows are packed together; only the fill depends on it

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
class PairScores:
    """Log-probs of P pairs in file order, all on the host.

    Attributes:
        chosen: the chosen responses, with sums under the reference if there is one.
        rejected: the rejected responses.
        prompt_sum: the sum of the log-probs of each chosen response's prompt; 0 where prompts have no targets.
        prompt_length: the number of these targets.
    """

    chosen: Responses
    rejected: Responses
    prompt_sum: Float[Tensor, " P"]
    prompt_length: Int[Tensor, " P"]

    def of_pairs(self, indices: Int[np.ndarray, " Q"]) -> PairScores:
        """Returns the scores of some of the pairs."""
        at = torch.from_numpy(indices)
        chosen, rejected = self.chosen.of_pairs(at), self.rejected.of_pairs(at)
        return PairScores(chosen, rejected, self.prompt_sum[at], self.prompt_length[at])


def score_pairs(
    forward: Forward,
    plan: StepPlan,
    source: PairSource,
    ranks: Ranks,
    reference: Float[np.ndarray, "P 2"] | None = None,
) -> PairScores:
    """Computes the log-probs of every pair of a split; the ranks share the work, and all get all scores.

    Args:
        forward: `Policy.forward`, or an engine's `logps`.
        plan: the step plan of the split, in file order (`seed=None`).
        source: the pairs of the split.
        ranks: the ranks of the run.
        reference: the sums of the pairs' responses under the reference, for an objective that needs one.
    """
    sums = torch.from_numpy(np.concatenate(list(score_steps(forward, plan, source, ranks))))
    both = [None, None] if reference is None else torch.from_numpy(reference).unbind(1)
    lengths = plan.lengths
    prompt_length = (lengths.chosen_inputs - lengths.chosen_targets) * plan.prompt_targets
    return PairScores(
        Responses(sums[:, 0], _integers(lengths.chosen_targets), both[0]),
        Responses(sums[:, 1], _integers(lengths.rejected_targets), both[1]),
        sums[:, 2],
        _integers(prompt_length),
    )


def _integers(values: Int[np.ndarray, " P"]) -> Int[Tensor, " P"]:
    return torch.from_numpy(values.astype(np.int64))


@torch.no_grad()
def score_steps(
    forward: Forward, plan: StepPlan, source: PairSource, ranks: Ranks, steps: range | None = None
) -> Iterator[Float[np.ndarray, "P 3"]]:
    """Yields per step of the plan the sums of log-probs of each pair, float32: chosen, rejected, the chosen's prompt.

    The arguments are those of `score_pairs`, and the steps to compute; None computes all.
    """
    steps = range(plan.steps_per_epoch) if steps is None else steps
    with closing(rank_steps(plan, source, steps, ranks.rank, ranks.world)) as shares:
        for step in shares:
            sums = np.zeros((len(step.pairs), 3))
            for batch in step.micro_batches:
                on_device = batch.to(ranks.device)
                responses = len(batch.response_length)
                logps = forward(on_device)
                of = response_sums(logps, on_device.target_response, responses + len(batch.pairs)).cpu()
                columns = [of[batch.chosen], of[batch.rejected], of[responses:]]
                sums[batch.pairs.numpy()] = torch.stack(columns, dim=1).numpy()
            yield ranks.sum(sums).astype(np.float32)


def pair_records(scores: PairScores, objective: Objective) -> Iterator[dict[str, Any]]:
    """Yields one object per pair, in file order, with the keys that `score` writes."""
    chosen, rejected = scores.chosen, scores.rejected
    rewards = [objective.beta * objective.score(responses).double() for responses in (chosen, rejected)]
    columns = {
        "chosen_logp_sum": chosen.sum,
        "chosen_length": chosen.length,
        "chosen_logp": chosen.mean,
        "rejected_logp_sum": rejected.sum,
        "rejected_length": rejected.length,
        "rejected_logp": rejected.mean,
    }
    if chosen.reference_sum is not None and rejected.reference_sum is not None:
        columns["chosen_reference_logp_sum"] = chosen.reference_sum
        columns["rejected_reference_logp_sum"] = rejected.reference_sum
    columns |= {
        "reward_chosen": rewards[0],
        "reward_rejected": rewards[1],
        "margin": rewards[0] - rewards[1],
        "loss": objective.losses(chosen, rejected),
    }
    for values in zip(*(column.tolist() for column in columns.values()), strict=True):
        yield dict(zip(columns, values, strict=True))


def evaluation_metrics(scores: PairScores, objective: Objective) -> dict[str, float]:
    """Computes means over all pairs, under the names of the training metrics."""
    chosen, rejected = scores.chosen, scores.rejected
    better, worse = objective.score(chosen).double(), objective.score(rejected).double()
    metrics = {
        "loss": objective.losses(chosen, rejected).double().mean(),
        "rewards/chosen": objective.beta * better.mean(),
        "rewards/rejected": objective.beta * worse.mean(),
        "rewards/accuracies": (better > worse).double().mean(),
        "rewards/margins": objective.beta * (better - worse).mean(),
        "logps/chosen": objective.logps(chosen).double().mean(),
        "logps/rejected": objective.logps(rejected).double().mean(),
    }
    if objective.sft_weight:
        target_sum = (chosen.sum.double() + scores.prompt_sum.double()).sum()
        metrics["sft_loss"] = -target_sum / (chosen.length + scores.prompt_length).sum()
        metrics["loss"] = metrics["loss"] + objective.sft_weight * metrics["sft_loss"]
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
    overall = {**evaluation_metrics(scores, objective), "pairs": len(scores.chosen.sum)}
    return evaluation_figures(overall, by_split)


@dataclass(frozen=True)
class Evaluation:
    """Evaluates the pairs of the evaluation splits during a run.

    Attributes:
        plan: the step plan of the pairs, in file order.
        source: the pairs of all evaluation splits.
        objective: the objective whose loss and rewards are reported.
        ranks: the ranks of the run.
        reference: the sums of the pairs' responses under the reference, for an objective that needs one.

    Raises:
        ConfigError: a split's name would give two metrics the same key.
    """

    plan: StepPlan
    source: PairDataset
    objective: Objective
    ranks: Ranks
    reference: Float[np.ndarray, "P 2"] | None = None

    def __post_init__(self) -> None:
        check_split_names(list(self.source.splits), self.objective.metrics)

    def run(self, forward: Forward) -> dict[str, float]:
        """Computes the metrics, with the keys of an evaluation record, and `eval_runtime` in seconds."""
        started = time.perf_counter()
        scores = score_pairs(forward, self.plan, self.source, self.ranks, self.reference)
        metrics = split_metrics(scores, self.objective, self.source.splits)
        return {**metrics, "eval_runtime": time.perf_counter() - started}
