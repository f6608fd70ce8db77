"""Reads preference pairs from files, saved datasets and the hub into tables of one form.

Every pair becomes three columns of JSON text, so that message lists and plain strings, with or without a `prompt`, sit
in one table whatever else their source carries.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jax_simpo.errors import DataError

PAIR_COLUMNS = ("prompt", "chosen", "rejected")
FILE_TYPES = (".jsonl", ".json", ".parquet")

_SCHEMA = pa.schema(
    [
        ("prompt", pa.string()),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("file", pa.dictionary(pa.int32(), pa.string())),
        ("row", pa.int64()),
        ("line", pa.int64()),
    ]
)


def from_rows(shown: str, rows: Iterable[Any]) -> pa.Table:
    """Takes rows that are already Python objects."""
    columns = _Columns(shown)
    for row in rows:
        columns.add(row, None)
    return columns.table()


def read_file(shown: str, path: Path) -> pa.Table:
    """Reads a file by its extension. `shown` is how messages name it."""
    if path.stat().st_size == 0:
        raise DataError(f"{shown}: the file is empty")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _read_parquet(shown, path)
    if suffix == ".json" and not _begins_with_an_object_in_a_line(path):
        return _read_json(shown, path)
    return _read_jsonl(shown, path)


def _begins_with_an_object_in_a_line(path: Path) -> bool:
    """Whether a file holds one object per line, which is also met under the name .json."""
    with path.open("rb") as stream:
        first = next((line for line in stream if not line.isspace()), b"").removeprefix(b"\xef\xbb\xbf")
    if not first.lstrip().startswith(b"{"):
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True


def _read_jsonl(shown: str, path: Path) -> pa.Table:
    """One JSON object per line. Read line by line, so that an error names the line."""
    columns = _Columns(shown)
    with path.open("rb") as stream:
        for line, data in enumerate(stream, start=1):
            if data.isspace():
                continue
            try:
                value = json.loads(data)
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{shown}, line {line}: broken JSON ({_json_fault(error)}): each line must be one JSON object"
                ) from error
            columns.add(value, line)
    return columns.table()


def _read_json(shown: str, path: Path) -> pa.Table:
    """One JSON list of objects."""
    data = path.read_bytes()
    if not data.strip():
        raise DataError(f"{shown}: the file is empty")
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        place = shown
        if isinstance(error, json.JSONDecodeError):
            place += f", line {error.lineno}"
        elif isinstance(error, UnicodeDecodeError):
            line = 1 + data.count(b"\n", 0, error.start)
            place += f", line {line}"
        raise DataError(
            f"{place}: broken JSON ({_json_fault(error)}): it must be one list of objects, or one object per line"
        ) from error
    if not isinstance(values, list):
        raise DataError(
            f"{shown}: holds {_kind(values)}: a .json file must be one list of objects, or one object per line"
        )
    return from_rows(shown, values)


def _read_parquet(shown: str, path: Path) -> pa.Table:
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _check_columns(shown, names)
            table = file.read(columns=[name for name in PAIR_COLUMNS if name in names])
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{shown}: not a readable parquet file ({error})") from error
    return _from_arrow(shown, [table])


def read_saved(shown: str, folder: Path) -> pa.Table:
    """Reads a `Dataset` that was written with `save_to_disk`."""
    import datasets  # half a second, and a run on JSONL never needs it

    try:
        dataset = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise DataError(f"{shown}: cannot load the saved dataset ({_first_line(error)}): save it again") from error
    return _from_dataset(shown, dataset)


def read_hub(name: str, split: str, config: str | None) -> pa.Table:
    """Reads a split of a dataset on the hub."""
    import datasets

    try:
        dataset = datasets.load_dataset(name, config, split=split)
    # A missing repository, no network, a private one, a bad name: as many exception types as ways to fail.
    except Exception as error:
        reason = _first_line(error)
        if re.search(r"\b(Unknown|Bad) split\b", reason):
            raise DataError(f"{name}: no split {split!r} on the hub: {reason}") from error
        if "Config name is missing" in reason:
            raise DataError(f"{name}: name one of its configurations in `dataset_configs`: {error}") from error
        raise DataError(
            f"{name}: neither a file or folder here nor a dataset that could be reached on the hub "
            f"({type(error).__name__}: {reason}): check the name, the network, or give a file"
        ) from error
    return _from_dataset(f"{name}/{split}", dataset)


def _from_dataset(shown: str, dataset: Any) -> pa.Table:
    _check_columns(shown, dataset.column_names)
    kept = dataset.select_columns([name for name in PAIR_COLUMNS if name in dataset.column_names])
    return _from_arrow(shown, kept.with_format("arrow").iter(batch_size=1000))


def _from_arrow(shown: str, tables: Iterable[pa.Table]) -> pa.Table:
    return from_rows(
        shown,
        (row for table in tables for batch in table.to_batches(max_chunksize=1000) for row in batch.to_pylist()),
    )


class _Columns:
    """Gathers rows into the table of a `RawSplit`."""

    def __init__(self, shown: str) -> None:
        self.shown = shown
        self.keys: set[str] = set()
        self.texts: dict[str, list[str | None]] = {name: [] for name in PAIR_COLUMNS}
        self.lines: list[int | None] = []

    def add(self, value: Any, line: int | None) -> None:
        if not isinstance(value, dict):
            place = f"line {line}" if line is not None else f"row {len(self.lines)}"
            raise DataError(f"{self.shown}, {place}: {_kind(value)}, not an object with `chosen` and `rejected`")
        self.keys.update(value)
        for name, texts in self.texts.items():
            item = value.get(name)
            texts.append(None if item is None else json.dumps(item, default=str))
        self.lines.append(line)

    def table(self) -> pa.Table:
        rows = len(self.lines)
        if rows == 0:
            raise DataError(f"{self.shown}: there are no rows in it")
        # A column that some rows lack is a matter of those rows; one that no row has is a matter of the file.
        _check_columns(self.shown, self.keys)
        file = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([self.shown]))
        arrays = [pa.array(self.texts[name], pa.string()) for name in PAIR_COLUMNS]
        return pa.Table.from_arrays(
            [*arrays, file, pa.array(range(rows), pa.int64()), pa.array(self.lines, pa.int64())], schema=_SCHEMA
        )


def _check_columns(shown: str, names: Iterable[str]) -> None:
    names = sorted(names)
    missing = [name for name in ("chosen", "rejected") if name not in names]
    if missing:
        raise DataError(
            f"{shown}: has the columns {', '.join(names) or '(none)'} but not {' and '.join(missing)}: "
            "rename them; needed are `chosen` and `rejected`, and `prompt` if the answers stand alone"
        )


def _json_fault(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)


def _kind(value: Any) -> str:
    names = {list: "a list", str: "text", dict: "an object", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__
