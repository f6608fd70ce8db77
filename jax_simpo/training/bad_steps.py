"""Describes a step that was not applied: its figures, and every group that it would have trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax_simpo.data.loader import StepBatch
from jax_simpo.data.tokenize import GroupDataset
from jax_simpo.objectives import Objective
from jax_simpo.training.evaluate import GroupScores, group_records


def describe(
    batch: StepBatch,
    reason: str,
    metrics: Mapping[str, float],
    scores: GroupScores,
    pairs: GroupDataset,
    objective: Objective,
) -> dict[str, Any]:
    """Returns what `bad_steps.jsonl` says about a step.

    Args:
        batch: the rows of the step.
        reason: why it was not applied.
        metrics: its metrics.
        scores: the scores of its groups under the weights before it.
        pairs: the training pairs.
        objective: the objective of the run.
    """
    groups = []
    for index, scored in zip(batch.groups.tolist(), group_records(scores, objective), strict=True):
        (file, row), texts = pairs.origin(index), pairs.texts(index)
        responses = [
            {"text": text, **figures} for text, figures in zip(texts.responses, scored["responses"], strict=True)
        ]
        of_group = {"file": file, "row": row, "weight": float(pairs.weights[index]), "loss": scored["loss"]}
        groups.append({**of_group, "prompt": texts.prompt, "responses": responses})
    return {"step": batch.step + 1, "reason": reason, "metrics": dict(metrics), "groups": groups}
