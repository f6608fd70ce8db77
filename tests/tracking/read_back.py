"""Reads back what a tracker holds of a run, with the tracker's own reader where it has one."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Points = list[tuple[str, int, float]]
"""Name, step and value of every number that a tracker has."""


def tensorboard(output: Path, run: str) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output / run), size_guidance={"scalars": 0}).Reload()
    return [(tag, e.step, e.value) for tag in events.Tags()["scalars"] for e in events.Scalars(tag)]


def wandb(output: Path, run: str) -> Points:
    points: Points = []
    for record in wandb_records(output, run):
        items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        step = items.pop("step", None)
        if step is not None:
            points += [(name, step, value) for name, value in items.items() if not name.startswith("_")]
    return points


def wandb_records(output: Path, run: str) -> Iterator[Any]:
    """Yields the records of the files that `wandb sync` would send, in the order they were written."""
    from wandb.proto.wandb_internal_pb2 import Record

    for file in sorted(output.parent.glob(f"wandb/offline-run-*-{run}/run-{run}.wandb")):
        yield from map(Record.FromString, _leveldb_log(file.read_bytes()))


def _leveldb_log(data: bytes) -> Iterator[bytes]:
    """Yields the records of a log in LevelDB's format: blocks of 32 KiB, and records cut where a block ends."""
    assert data[:4] == b":W&B"
    place, parts = 7, []
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        parts.append(data[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []


def trackio(output: Path, run: str) -> Points:
    from trackio.sqlite_storage import SQLiteStorage

    return [
        (name, row["step"], value)
        for row in SQLiteStorage.get_logs("jax-simpo", run)
        for name, value in row.items()
        if name not in ("step", "timestamp") and isinstance(value, int | float)
    ]


def mlflow(output: Path, run: str) -> Points:
    from mlflow import MlflowClient

    client = MlflowClient()
    return [
        (name, metric.step, metric.value)
        for name in client.get_run(run).data.metrics
        for metric in client.get_metric_history(run, name)
    ]


READERS: dict[str, Callable[[Path, str], Points]] = {
    "tensorboard": tensorboard,
    "wandb": wandb,
    "trackio": trackio,
    "mlflow": mlflow,
}
