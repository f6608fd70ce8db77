"""Reads preference pairs from files, saved datasets and the hub into tables of one schema.

The columns of answers, prompt, scores and weights become columns of JSON text. So message lists and plain strings, with
or without a `prompt`, fit one table, and other columns of the source are dropped. In every function here,
`label` is the source's name in messages, and `weights` names the column of the weights, if there is one.
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

# Our columns, and the other names that data sets give them. The names of a row's answers come first.
COLUMNS = {
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "responses": ("responses", "completions", "answers"),
    "response": ("response",),
    "prompt": ("prompt", "instruction"),
    "scores": ("scores",),
    "score": ("score",),
    "ranks": ("ranks",),
    "tools": ("tools",),
}
_NAMES = tuple(name for names in COLUMNS.values() for name in names)
FILE_TYPES = (".jsonl", ".json", ".parquet")

_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in COLUMNS),
        ("weight", pa.string()),
        ("file", pa.dictionary(pa.int32(), pa.string())),
        ("row", pa.int64()),
        ("line", pa.int64()),
    ]
)


def from_rows(label: str, rows: Iterable[Any], weights: str | None = None) -> pa.Table:
    """Makes a table of rows that are Python objects. Raises `DataError` for rows without `chosen` and `rejected`."""
    builder = _TableBuilder(label, weights)
    for row in rows:
        builder.add(row, None)
    return builder.table()


def read_file(label: str, path: Path, weights: str | None = None) -> pa.Table:
    """Reads a file by its extension. Raises `DataError` if it is empty, broken or has no pairs."""
    if path.stat().st_size == 0:
        raise DataError(f"{label}: the file is empty")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _read_parquet(label, path, weights)
    if suffix == ".json" and not _is_jsonl(path):
        return _read_json(label, path, weights)
    return _read_jsonl(label, path, weights)


def _is_jsonl(path: Path) -> bool:
    """Returns True if a file named .json holds one object per line, judged by its first line."""
    with path.open("rb") as stream:
        first = next((line for line in stream if not line.isspace()), b"").removeprefix(b"\xef\xbb\xbf")
    if not first.lstrip().startswith(b"{"):
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True


def _read_jsonl(label: str, path: Path, weights: str | None) -> pa.Table:
    """Reads one JSON object per line, line by line, so that an error names the line."""
    builder = _TableBuilder(label, weights)
    with path.open("rb") as stream:
        for line, data in enumerate(stream, start=1):
            if data.isspace():
                continue
            try:
                value = json.loads(data)
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{label}, line {line}: broken JSON ({_json_fault(error)}): each line must be one JSON object"
                ) from error
            builder.add(value, line)
    return builder.table()


def _read_json(label: str, path: Path, weights: str | None) -> pa.Table:
    """Reads one JSON list of objects."""
    data = path.read_bytes()
    if not data.strip():
        raise DataError(f"{label}: the file is empty")
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        place = label
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
            f"{label}: holds {_type_name(values)}: a .json file must be one list of objects, or one object per line"
        )
    return from_rows(label, values, weights)


def _read_parquet(label: str, path: Path, weights: str | None) -> pa.Table:
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _check_columns(label, names, weights)
            table = file.read(columns=[name for name in (*_NAMES, weights) if name in names])
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{label}: not a readable parquet file ({error})") from error
    return _from_arrow(label, [table], weights)


def read_saved(label: str, folder: Path, weights: str | None = None) -> pa.Table:
    """Reads a `Dataset` that was written with `save_to_disk`. Raises `DataError` if it cannot be loaded."""
    import datasets  # takes half a second, and runs on JSONL do not need it

    try:
        dataset = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise DataError(f"{label}: cannot load the saved dataset ({_first_line(error)}): save it again") from error
    return _from_dataset(label, dataset, weights)


def read_hub(name: str, split: str, config: str | None, weights: str | None = None) -> pa.Table:
    """Reads a split of a dataset on the hub. Raises `DataError` if the dataset or the split cannot be reached."""
    import datasets

    try:
        dataset = datasets.load_dataset(name, config, split=split)
    # datasets has different exceptions for a missing or private repository, no network and a bad name.
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
    return _from_dataset(f"{name}/{split}", dataset, weights)


def _from_dataset(label: str, dataset: Any, weights: str | None) -> pa.Table:
    _check_columns(label, dataset.column_names, weights)
    pairs = dataset.select_columns([name for name in (*_NAMES, weights) if name in dataset.column_names])
    return _from_arrow(label, pairs.with_format("arrow").iter(batch_size=1000), weights)


def _from_arrow(label: str, tables: Iterable[pa.Table], weights: str | None) -> pa.Table:
    batches = (batch for table in tables for batch in table.to_batches(max_chunksize=1000))
    return from_rows(label, (row for batch in batches for row in batch.to_pylist()), weights)


class _TableBuilder:
    """Collects rows and makes the table of a `RawSplit` from them."""

    def __init__(self, label: str, weights: str | None) -> None:
        self.label, self.weights = label, weights
        self.keys: set[str] = set()
        # By our column, its names in the source and its values.
        self.texts: dict[str, tuple[tuple[str, ...], list[str | None]]] = {n: (m, []) for n, m in COLUMNS.items()}
        self.texts["weight"] = (() if weights is None else (weights,)), []
        self.lines: list[int | None] = []

    def add(self, value: Any, line: int | None) -> None:
        if not isinstance(value, dict):
            place = f"line {line}" if line is not None else f"row {len(self.lines)}"
            raise DataError(f"{self.label}, {place}: {_type_name(value)}, not an object with `chosen` and `rejected`")
        self.keys.update(value)
        is_pair = value.get("chosen") is not None or value.get("rejected") is not None
        for column, (names, texts) in self.texts.items():
            # Beside a pair, a column named `answers`, say, is one of those that are ignored.
            names = names[:1] if column == "responses" and is_pair else names
            item = next((value[name] for name in names if value.get(name) is not None), None)
            texts.append(None if item is None else json.dumps(item, default=str))
        self.lines.append(line)

    def table(self) -> pa.Table:
        rows = len(self.lines)
        if rows == 0:
            raise DataError(f"{self.label}: there are no rows in it")
        # Some rows without a column are bad rows; a column that no row has is a mistake in the whole file.
        _check_columns(self.label, self.keys, self.weights)
        file = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([self.label]))
        arrays = [pa.array(texts, pa.string()) for _, texts in self.texts.values()]
        return pa.Table.from_arrays(
            [*arrays, file, pa.array(range(rows), pa.int64()), pa.array(self.lines, pa.int64())], schema=_SCHEMA
        )


def _check_columns(label: str, names: Iterable[str], weights: str | None) -> None:
    names = sorted(names)
    ranked = any(name in names for name in (*COLUMNS["responses"], *COLUMNS["response"]))
    missing = [name for name in ("chosen", "rejected") if name not in names]
    if missing and not ranked:
        raise DataError(
            f"{label}: has the columns {', '.join(names) or '(none)'} but not {' and '.join(missing)}: "
            "rename them; needed are `chosen` and `rejected`, or `responses` with `scores` or `ranks`, and `prompt` if "
            "the answers stand alone"
        )
    if weights is not None and weights not in names:
        raise DataError(f"{label}: has no column `{weights}`, which `weight_column` names; it has {', '.join(names)}")


def _json_fault(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)


def _type_name(value: Any) -> str:
    names = {list: "a list", str: "text", dict: "an object", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__
