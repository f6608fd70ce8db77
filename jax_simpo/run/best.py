"""Which evaluation of a run is the best, and when evaluations without a better one end it. Both trainers use it.

Everything follows from the evaluation records of `metrics.jsonl`, so a resumed run decides as the whole run would have.
The evaluation before the first step does not count: no step has its model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from jax_simpo.config import TrainConfig
from jax_simpo.errors import CheckpointError, ConfigError
from jax_simpo.run.metrics import read_metrics


@dataclass(frozen=True)
class BestRule:
    """Compares the evaluations of a run by one metric.

    Attributes:
        metric: the key of the metric in an evaluation record.
        greater: the greater value is the better one.
        keep: the best step's model is the one to export.
        patience: evaluations in a row without improvement after which the run ends; None never ends it.
        threshold: by how much the metric must improve to count for `patience`.
    """

    metric: str
    greater: bool
    keep: bool = True
    patience: int | None = None
    threshold: float = 0.0

    @classmethod
    def of(cls, config: TrainConfig) -> Self | None:
        """Returns the rule of a config; None where the config asks for no comparison."""
        if not config.load_best_model_at_end and config.early_stopping_patience is None:
            return None
        name = config.metric_for_best_model
        greater = config.greater_is_better
        return cls(
            name if name.startswith("eval_") else f"eval_{name}",
            not name.endswith("loss") if greater is None else greater,
            config.load_best_model_at_end,
            config.early_stopping_patience,
            config.early_stopping_threshold,
        )

    def check(self, metrics: Sequence[str], splits: Sequence[str]) -> None:
        """Makes sure that the evaluations of a run have the metric.

        Args:
            metrics: the names of the figures of an evaluation, without `eval_`.
            splits: the names of the evaluation splits.

        Raises:
            ConfigError: they do not; it lists the metrics there are.
        """
        known = [f"eval_{name}" for name in metrics]
        if len(splits) > 1:
            known += [f"eval_{split}_{name}" for split in splits for name in metrics]
        if self.metric not in known:
            raise ConfigError(
                f"`metric_for_best_model`: the evaluations have no `{self.metric}`; they have {', '.join(known)}"
            )

    def check_saved(self, records: Sequence[Mapping[str, Any]], steps: Sequence[int], output: Path) -> None:
        """Makes sure that a resumed run can still export its best model.

        Args:
            records: the evaluation records so far, oldest first.
            steps: the steps that have a checkpoint.
            output: the output directory.

        Raises:
            CheckpointError: the best step so far has none, because the run did not keep the best model before.
        """
        best = self.best_step(records) if self.keep else None
        if best is not None and best not in steps:
            raise CheckpointError(
                f"`load_best_model_at_end`: the best evaluation of {output} by {self.metric} is that of step {best}, "
                f"which has no checkpoint; there are {list(steps)}. Set `load_best_model_at_end: false` to go on"
            )

    def best_step(self, records: Sequence[Mapping[str, Any]]) -> int | None:
        """Returns the step of the best evaluation, the first of equals; None where no evaluation counts.

        Args:
            records: evaluation records, oldest first.
        """
        counted = self._counted(records)
        if not counted:
            return None
        best = max(value for _, value in counted)
        return next(step for step, value in counted if value == best)

    def ends(self, records: Sequence[Mapping[str, Any]]) -> bool:
        """Returns True if the last `patience` evaluations have brought no improvement.

        Args:
            records: evaluation records, oldest first.
        """
        if self.patience is None:
            return False
        best, waited = -math.inf, 0
        for _, value in self._counted(records):
            waited = 0 if value > best + self.threshold else waited + 1
            best = max(best, value)
        return waited >= self.patience

    def _counted(self, records: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
        """Returns the step and the metric of each evaluation that counts, turned so that greater is better.

        A metric that is no number is worse than any other. Records without the metric are those of a run whose
        evaluation splits were others.
        """
        sign = 1.0 if self.greater else -1.0
        counted = [record for record in records if record["eval_step"] > 0 and self.metric in record]
        values = [(record["eval_step"], sign * record[self.metric]) for record in counted]
        return [(step, -math.inf if math.isnan(value) else value) for step, value in values]


def evaluations(output: Path, until: int) -> list[dict[str, Any]]:
    """Returns the evaluation records of a run, up to a step."""
    return [record for record in read_metrics(output) if record.get("eval_step", until + 1) <= until]
