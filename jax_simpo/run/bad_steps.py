"""`bad_steps.jsonl`: the steps that were not applied, and what they would have trained on, one JSON object a line.

A line has the keys `step`, `reason`, `left_out` (false if the run ended there), `metrics`, and `groups`: of each group
its file and row, its texts, their log-probs under the weights before the step, and its loss. A number that is not
finite is a text, "nan" or "inf".
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_simpo.data.tokenize import GroupDataset
from jax_simpo.errors import CheckpointError
from jax_simpo.run import files
from jax_simpo.run.manifest import claim, read_manifest, write_file


def describe(
    step: int,
    reason: str,
    metrics: Mapping[str, float],
    indices: Sequence[int],
    scored: Iterable[Mapping[str, Any]],
    groups: GroupDataset,
) -> dict[str, Any]:
    """Returns what the file says about a step, but for `left_out`.

    Args:
        step: the step's number, from 1.
        reason: why it was not applied.
        metrics: its metrics.
        indices: its groups, as indices into the data.
        scored: of each of these groups what `score` writes of it, under the weights before the step.
        groups: the training groups.
    """
    described = []
    for index, record in zip(indices, scored, strict=True):
        (file, row), texts = groups.origin(index), groups.texts(index)
        responses = [
            {"text": text, **figures} for text, figures in zip(texts.responses, record["responses"], strict=True)
        ]
        of_group = {"file": file, "row": row, "weight": float(groups.weights[index]), "loss": record["loss"]}
        described.append({**of_group, "prompt": texts.prompt, "responses": responses})
    return {"step": step, "reason": reason, "metrics": dict(metrics), "groups": described}


def write_bad_step(output: Path, record: Mapping[str, Any]) -> Path:
    """Adds a line to the file, and returns the file's path. A line of the same step, or of a later one, goes.

    Raises:
        CheckpointError: there is such a file that no run wrote, or it is damaged.
    """
    claim(output, files.BAD_STEPS)
    before = [other for other in read_bad_steps(output) if other["step"] < record["step"]]
    return _write(output, [*before, _as_json(record)])


def read_bad_steps(output: Path) -> list[dict[str, Any]]:
    """Returns the steps of an output directory that were not applied.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = output / files.BAD_STEPS
    if not path.is_file() or files.BAD_STEPS not in read_manifest(output):
        return []
    try:
        records = [dict(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
        if not all(type(record["step"]) is int and type(record["left_out"]) is bool for record in records):
            raise ValueError("`step` or `left_out` is of another kind")
        return records
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: is damaged ({error!r}). Put a good copy back, or remove the file") from error


def drop_later(output: Path, step: int) -> None:
    """Drops the lines of steps after `step`, from which a run goes on."""
    records = read_bad_steps(output)
    kept = [record for record in records if record["step"] <= step]
    if len(kept) < len(records):
        _write(output, kept)


def _write(output: Path, records: list[Any]) -> Path:
    return write_file(output, files.BAD_STEPS, "".join(json.dumps(record) + "\n" for record in records))


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _as_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_json(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
