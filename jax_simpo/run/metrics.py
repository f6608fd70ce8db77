"""`metrics.jsonl`: the records of a run, one JSON object a line."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping, Sequence
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from jax_simpo.errors import CheckpointError, ConfigError, TrainingError
from jax_simpo.run import files
from jax_simpo.run.manifest import write_file
from jax_simpo.run.sums import Sum, new_digest


class MetricsLog:
    """Appends one JSON object per logged step; a resumed run first drops the records that it will write again.

    Args:
        output: the output directory.
        before: the sum of the records up to the step that the run goes on from, as its seal has it; what follows is
            dropped. None starts afresh.
        write: False turns the log off: of several processes one writes.

    Raises:
        CheckpointError: the records are not those of `before`.
    """

    def __init__(self, output: Path, *, before: Sum | None = None, write: bool = True) -> None:
        self._path, self._size, self._digest = output / files.METRICS, 0, new_digest()
        self._file: FileIO | None = None
        if not write:
            return
        if before is None or check_records(output, before) or not self._path.exists():
            write_file(output, files.METRICS, "")
        else:
            os.truncate(self._path, before.bytes)
            self._digest.update(self._path.read_bytes())
            self._size = before.bytes
        self._file = self._path.open("ab", buffering=0)

    def synced(self) -> Sum:
        """Brings the records to the disk, and returns their sum."""
        if self._file is not None:
            os.fsync(self._file.fileno())
        return Sum(self._size, self._digest.hexdigest())

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes a record at once, so that a killed run loses none.

        Raises:
            TrainingError: the file cannot be written, or is no longer the one that this run writes.
        """
        if self._file is None:
            return
        self._check_own(self._file.fileno())
        line = (json.dumps(record) + "\n").encode()
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise TrainingError(
                f"{self._path} cannot be written: {error.strerror}. Make room, or mend what is wrong, and start the "
                "same command again to go on from the newest checkpoint"
            ) from error
        self._digest.update(line)
        self._size += len(line)

    def _check_own(self, descriptor: int) -> None:
        opened = os.fstat(descriptor)
        try:
            own = os.path.samestat(opened, os.stat(self._path)) and opened.st_size == self._size
        except OSError:
            own = False
        if not own:
            raise TrainingError(
                f"{self._path} was removed, moved or changed while this run was writing to it. Start the same command "
                "again to go on from the newest checkpoint"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


def check_records(output: Path, before: Sum, *, needed: bool = False) -> str:
    """Makes sure that the records of the steps before are those that the run wrote.

    Args:
        output: the output directory.
        before: the sum of the records up to the step that the run goes on from.
        needed: the run must know its evaluations, because it chooses its best model.

    Returns:
        A warning for the user if there are no records; empty if there are.

    Raises:
        CheckpointError: the records are others, or are missing although the run needs them.
    """
    path = output / files.METRICS
    if not before.bytes or (path.exists() and Sum.of_file(path, first=before.bytes) == before):
        return ""
    if path.exists():
        raise CheckpointError(
            f"{path}: its first {before.bytes:,} bytes are not the records that the run wrote before it saved the step "
            "to go on from. Put a good copy back, or remove the file to go on without them"
        )
    if needed:
        raise CheckpointError(
            f"{path} is missing, and without its evaluations the run cannot choose its best model. Put a copy back, "
            "or set `load_best_model_at_end: false` and no `early_stopping_patience`"
        )
    return f"warning: {path} is missing: the records of the steps before are lost"


def read_metrics(output: Path) -> list[dict[str, Any]]:
    """The records of a run so far; a last line that a killed run left half written is dropped.

    Raises:
        CheckpointError: a line is no record.
    """
    path = output / files.METRICS
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    return [parse_record(line, path, number) for number, line in enumerate(lines, start=1) if line.endswith("\n")]


def parse_record(line: str, path: Path, number: int) -> dict[str, Any]:
    """Reads a line of the file, by its number from 1.

    Raises:
        CheckpointError: it is no record.
    """
    try:
        record = dict(json.loads(line))
        record_step(record)
        return record
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(
            f"{path}, line {number}: is no record of a run, so the file is damaged. Put a good copy back"
        ) from error


def record_step(record: Mapping[str, Any]) -> int:
    """The step of a training or evaluation record."""
    return record["step"] if "step" in record else record["eval_step"]


NOT_FINITE_ADVICE = "Lower `learning_rate`, raise `warmup_ratio`, or try `dtype: float32`"


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


ANSWERS = "eval_answers/"
"""What the keys of figures of the answers to a run's prompts begin with."""


def answer_figures(figures: Mapping[str, float]) -> dict[str, float]:
    """Names the figures of answers: `eval_answers/length` and so on."""
    return {f"{ANSWERS}{name}": value for name, value in figures.items()}


def evaluation_line(step: int, figures: Mapping[str, float], splits: Sequence[str]) -> str:
    """Describes an evaluation in one line: loss, accuracy and margin over all pairs, and the accuracy of each split.

    Where the evaluation answered prompts, their figures follow.

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
    if (length := figures.get(f"{ANSWERS}length")) is not None:
        ended, repetition = (figures[f"{ANSWERS}{name}"] for name in ("ended", "repetition"))
        line += f"; answers: {length:.1f} tokens, {ended:.0%} ended, {repetition:.1%} repeated"
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


def share_interval(share: float, count: int) -> tuple[float, float]:
    """Returns the 95 % confidence interval of a share that was found among `count` independent cases.

    It is Wilson's (1927), which holds for few cases too and for shares of 0 and 1.
    """
    z2 = 1.959964**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = math.sqrt(z2 * share * (1 - share) / count + (z2 / (2 * count)) ** 2) / (1 + z2 / count)
    return max(0.0, middle - half), min(1.0, middle + half)
