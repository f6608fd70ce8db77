"""`metrics.jsonl`: the records of a run, one JSON object a line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from jax_simpo.errors import ConfigError, TrainingError
from jax_simpo.run import files
from jax_simpo.run.manifest import write_file


class MetricsLog:
    """Appends one JSON object per logged step; a resumed run first drops the records that it will write again.

    Args:
        output: the output directory.
        first_step: steps done before; records of later steps are dropped.
        write: False turns the log off: of several processes one writes.
    """

    def __init__(self, output: Path, *, first_step: int, write: bool = True) -> None:
        self._file: TextIO | None = None
        if not write:
            return
        records = read_metrics(output) if first_step else []
        kept = [json.dumps(record) + "\n" for record in records if record_step(record) <= first_step]
        self._file = write_file(output, files.METRICS, "".join(kept)).open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes a record at once, so that a killed run loses none."""
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


def read_metrics(output: Path) -> list[dict[str, Any]]:
    """The records of a run so far; a last line that a killed run left half written is dropped."""
    path = output / files.METRICS
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def record_step(record: Mapping[str, Any]) -> int:
    """The step of a training or evaluation record."""
    return record["step"] if "step" in record else record["eval_step"]


def check_finite(step: int, loss: float, gradient_norm: float, saved_steps: Callable[[], Sequence[int]]) -> None:
    """Stops a run whose loss or gradient is no longer finite.

    Args:
        step: optimizer steps done.
        loss: the loss of the last step.
        gradient_norm: the norm of its gradient.
        saved_steps: lists the steps that have a checkpoint; called only for the error text.

    Raises:
        TrainingError: one of the two is infinite or no number.
    """
    if not math.isfinite(loss) or not math.isfinite(gradient_norm):
        raise TrainingError(
            f"step {step}: the loss is {loss}, the gradient norm {gradient_norm}. The newest checkpoint is of step "
            f"{max(saved_steps(), default=0)}. Lower `learning_rate`, raise `warmup_ratio`, or try `dtype: float32`"
        )


# --- the keys of an evaluation


def evaluation_figures(overall: Mapping[str, float], by_split: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Names the figures of an evaluation: `eval_loss` over all pairs and, of several splits, `eval_SPLIT_loss` of each.

    Args:
        overall: figures over all pairs, such as `loss` and `rewards/accuracies`.
        by_split: the figures of each split. A single split is the same as all pairs and adds nothing.

    Raises:
        ConfigError: two figures would have the same key.
    """
    check_split_names(list(by_split), list(overall))
    figures = {f"eval_{name}": value for name, value in overall.items()}
    if len(by_split) > 1:
        for split, values in by_split.items():
            figures |= {f"eval_{split}_{name}": value for name, value in values.items()}
    return figures


def evaluation_line(step: int, figures: Mapping[str, float], splits: Sequence[str]) -> str:
    """Describes an evaluation in one line: loss, accuracy and margin over all pairs, and the accuracy of each split.

    Args:
        step: optimizer steps done.
        figures: as `evaluation_figures` names them.
        splits: names of the evaluated splits.
    """
    line = (
        f"evaluation at step {step}: loss {figures['eval_loss']:.4f}, accuracy "
        f"{figures['eval_rewards/accuracies']:.3f}, margin {figures['eval_rewards/margins']:.3f}"
    )
    if len(splits) > 1:
        accuracies = [f"{split} {figures[f'eval_{split}_rewards/accuracies']:.3f}" for split in splits]
        line += f" (accuracy by split: {', '.join(accuracies)})"
    return line


def check_split_names(splits: Sequence[str], names: Sequence[str]) -> None:
    """Makes sure that no two figures of an evaluation have the same key.

    Args:
        splits: the evaluation splits.
        names: names of the figures.

    Raises:
        ConfigError: two have; with a split called `sft`, `eval_sft_loss` would mean two things.
    """
    if len(splits) < 2:
        return
    keys = [f"eval_{name}" for name in names]
    for split in splits:
        own = [f"eval_{split}_{name}" for name in names]
        if doubled := sorted(set(keys) & set(own)):
            raise ConfigError(
                f"`dataset_splits`: the metric `{doubled[0]}` of the split `{split}` would have the name of another "
                "metric. Rename the split"
            )
        keys += own
