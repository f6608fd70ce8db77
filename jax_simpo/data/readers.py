"""Reads preference pairs from files, saved datasets and the hub into tables of one schema.

Rows of any format (`formats`) become rows of our columns, and these become columns of JSON text. So message lists and
plain strings, with or without a prompt, fit one table. In every function here, `label` is the source's name in
messages, and `reading` is what the config says of its columns.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from jax_simpo.data import detection
from jax_simpo.data.detection import Layout, Reader, Reading
from jax_simpo.data.messages import BadRow
from jax_simpo.errors import DataError

# The columns that every row becomes. `fault` is what is wrong with a row that cannot be one.
COLUMNS = (
    "chosen",
    "rejected",
    "responses",
    "response",
    "prompt",
    "system",
    "scores",
    "score",
    "ranks",
    "tools",
    "fault",
)
_TEXT_TYPES = (".jsonl", ".json", ".csv")
FILE_TYPES = (*_TEXT_TYPES, ".parquet")
_COMPRESSED = ".gz"

_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in COLUMNS),
        ("weight", pa.string()),
        ("file", pa.dictionary(pa.int32(), pa.string())),
        ("row", pa.int64()),
        ("line", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Source:
    """The rows of a file, or of a split of a data set.

    Attributes:
        table: the rows, with the columns of `COLUMNS`, their weight, and where each is from.
        layout: how they were read.
    """

    table: pa.Table
    layout: Layout


def file_type(path: Path) -> str | None:
    """Returns the extension of a data file, such as `.jsonl` also for `.jsonl.gz`; None for other files."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [_COMPRESSED]:
        return suffixes[-2] if suffixes[-2:-1] and suffixes[-2] in _TEXT_TYPES else None
    return suffixes[-1] if suffixes and suffixes[-1] in FILE_TYPES else None


def stem(path: Path) -> str:
    """Returns the name of a data file without its extension."""
    name = path.name[: -len(_COMPRESSED)] if path.suffix.lower() == _COMPRESSED else path.name
    return Path(name).stem


class RawRow(NamedTuple):
    """A row as a file has it.

    Attributes:
        value: an object, unless the file is at fault.
        line: its line, from 1; None where the file has no lines.
        names: the columns of the file where `value` does not show them all, otherwise empty.
    """

    value: Any
    line: int | None = None
    names: Sequence[str] = ()


def from_rows(label: str, rows: Iterable[Any], reading: Reading | None = None) -> Source:
    """Reads rows that are Python objects. Raises `DataError` for rows that are in no format, or in several."""
    return _build(label, map(RawRow, rows), reading or Reading())


def read_file(label: str, path: Path, reading: Reading | None = None) -> Source:
    """Reads a file by its extension. Raises `DataError` if it is empty, broken or has no pairs."""
    reading = reading or Reading()
    if path.stat().st_size == 0:
        raise DataError(f"{label}: the file is empty")
    return _build(label, raw_rows(label, path, reading), reading)


def raw_rows(label: str, path: Path, reading: Reading | None = None) -> Iterator[RawRow]:
    """Yields the rows of a file, read by its extension, as they are; lines of JSON if the extension is none of ours.

    Of a parquet file only the columns that may be read are read.

    Raises:
        DataError: the file is broken.
        OSError: it cannot be read.
    """
    reading = reading or Reading()
    suffix = file_type(path)
    if suffix == ".parquet":
        yield from _parquet_rows(label, path, reading)
        return
    with _unpacked(label, path):
        if suffix == ".csv":
            yield from _csv_rows(label, path, reading)
        elif suffix == ".json" and not _is_jsonl(path):
            yield from _json_rows(label, path)
        else:
            yield from _jsonl_rows(label, path)


def _open(path: Path) -> IO[bytes]:
    """Opens a file, compressed or not."""
    return gzip.open(path, "rb") if path.suffix.lower() == _COMPRESSED else path.open("rb")  # type: ignore[return-value]


@contextmanager
def _unpacked(label: str, path: Path) -> Iterator[None]:
    """Words the errors of a compressed file that is none, or is cut off."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{label}: not a whole gzip file ({error}): copy it again") from error


def _is_jsonl(path: Path) -> bool:
    """Returns True if a file named .json holds one object per line, judged by its first line."""
    with _open(path) as stream:
        first = next((line for line in stream if not line.isspace()), b"").removeprefix(b"\xef\xbb\xbf")
    if not first.lstrip().startswith(b"{"):
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True


def _jsonl_rows(label: str, path: Path) -> Iterator[RawRow]:
    """Yields the value of each line of JSON; blank lines are none."""
    with _open(path) as stream:
        for line, data in enumerate(stream, start=1):
            if data.isspace():
                continue
            try:
                value = json.loads(data)
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{label}, line {line}: broken JSON ({_json_fault(error)}): each line must be one JSON object"
                ) from error
            yield RawRow(value, line)


def _json_rows(label: str, path: Path) -> Iterator[RawRow]:
    """Yields the objects of one JSON list."""
    with _open(path) as stream:
        data = stream.read()
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
    yield from map(RawRow, values)


# Columns of CSV files whose cells are JSON, since text cannot be meant; in others text may begin with a bracket.
_JSON_CELLS = (
    *("conversations", "conversation", "messages", "history"),
    *("responses", "completions", "answers", "scores", "score", "ranks"),
)


def _csv_rows(label: str, path: Path, reading: Reading) -> Iterator[RawRow]:
    """Yields the rows of a table with a line of column names; cells may be quoted and hold line ends."""
    columns = reading.columns or {}
    json_cells = {columns.get(name, name) for name in _JSON_CELLS} | {reading.weights}
    with _open(path) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # it refuses cells above 128 KB otherwise
        lines = csv.reader(text, strict=True)
        try:
            names = next(lines, [])
            if len(set(names)) < len(names) or not all(names):
                raise DataError(
                    f"{label}, line 1: the first line must name every column once; it is {', '.join(names)}"
                )
            end = lines.line_num
            for cells in lines:
                line, end = end + 1, lines.line_num
                if not cells:
                    continue
                if len(cells) != len(names):
                    raise DataError(
                        f"{label}, line {line}: {len(cells)} cells for {len(names)} columns: put quotes around cells "
                        "with commas"
                    )
                row = {name: _read_cell(cell, name in json_cells) for name, cell in zip(names, cells, strict=True)}
                yield RawRow(row, line)
        except UnicodeDecodeError as error:  # raised when a block of several lines is read, so its line is not known
            raise DataError(
                f"{label}: the byte {error.object[error.start]:02x} after line {lines.line_num} is not UTF-8 text: "
                "save the table as UTF-8 (a spreadsheet offers it as `CSV UTF-8`)"
            ) from error
        except csv.Error as error:
            raise DataError(f"{label}, line {lines.line_num}: not a readable CSV file ({error})") from error


def _read_cell(cell: str, as_json: bool) -> Any:
    """Reads a cell: JSON where text cannot be meant, a message list where it is one, else text; None if it is empty."""
    if not cell:
        return None
    if as_json or cell.startswith(('[{"', '{"role"', '{"from"')):
        try:
            value = json.loads(cell)
        except (ValueError, RecursionError):
            return cell
        turns = value if isinstance(value, list) else [value]
        if as_json or all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in turns):
            return value
    return cell


def _parquet_rows(label: str, path: Path, reading: Reading) -> Iterator[RawRow]:
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            table = file.read(columns=[name for name in reading.names if name in names])
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{label}: not a readable parquet file ({error})") from error
    yield from _arrow_rows([table], names, reading)


def read_saved(label: str, folder: Path, reading: Reading | None = None) -> Source:
    """Reads a `Dataset` that was written with `save_to_disk`. Raises `DataError` if it cannot be loaded."""
    import datasets  # takes half a second, and runs on JSONL do not need it

    try:
        dataset = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise DataError(f"{label}: cannot load the saved dataset ({_first_line(error)}): save it again") from error
    return _from_dataset(label, dataset, reading or Reading())


def read_hub(name: str, split: str, config: str | None, reading: Reading | None = None) -> Source:
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
    return _from_dataset(f"{name}/{split}", dataset, reading or Reading())


def _from_dataset(label: str, dataset: Any, reading: Reading) -> Source:
    names = dataset.column_names
    pairs = dataset.select_columns([name for name in reading.names if name in names])
    tables = pairs.with_format("arrow").iter(batch_size=1000)
    return _build(label, _arrow_rows(tables, names, reading), reading)


def _arrow_rows(tables: Iterable[pa.Table], names: list[str], reading: Reading) -> Iterator[RawRow]:
    """Yields the rows of Arrow tables that hold those of the columns `names` which may be read."""
    if set(reading.names).isdisjoint(names):  # a table without columns has no rows either
        yield RawRow({}, None, names)  # of which the reader of rows says what is missing
        return
    for table in tables:
        for batch in table.to_batches(max_chunksize=1000):
            for row in batch.to_pylist():
                yield RawRow(row, None, names)


def _build(label: str, rows: Iterable[RawRow], reading: Reading) -> Source:
    builder = _TableBuilder(label, reading)
    for row in rows:
        builder.add(row)
    return builder.source()


class _TableBuilder:
    """Collects rows: finds their format from the first ones, and makes rows of our columns of all."""

    def __init__(self, label: str, reading: Reading) -> None:
        self.label, self.reading = label, reading
        self.names: dict[str, None] = {}  # the columns there are, in their order
        self.first: list[dict[str, Any]] = []  # rows that wait for the format
        self.reader: Reader | None = None
        self.texts: dict[str, list[str | None]] = {name: [] for name in (*COLUMNS, "weight")}
        self.lines: list[int | None] = []

    def add(self, row: RawRow) -> None:
        value, line, names = row
        if not isinstance(value, dict):
            place = f"line {line}" if line is not None else f"row {len(self.lines)}"
            raise DataError(f"{self.label}, {place}: {_type_name(value)}, not an object with `chosen` and `rejected`")
        self.names.update(dict.fromkeys(names or value))
        self.lines.append(line)
        if self.reader is not None:
            self._convert(self.reader, value)
            return
        self.first.append(value)
        if len(self.first) == detection.SAMPLE:
            self._begin()

    def _begin(self) -> Reader:
        reader = self.reader = detection.detect(self.label, self.first, self.names, self.reading)
        for value in self.first:
            self._convert(reader, value)
        self.first = []
        return reader

    def _convert(self, reader: Reader, value: dict[str, Any]) -> None:
        try:
            row = reader.read(value)
        except BadRow as bad:
            row = detection.flag_fault(bad)
        if self.reading.weights is not None:
            row = {**row, "weight": value.get(self.reading.weights)}
        for column, texts in self.texts.items():
            texts.append(detection.as_json(row, column))

    def source(self) -> Source:
        rows, weights = len(self.lines), self.reading.weights
        if rows == 0:
            raise DataError(f"{self.label}: there are no rows in it")
        reader = self.reader or self._begin()
        names = list(self.names)
        if weights is not None and weights not in names:
            raise DataError(
                f"{self.label}: has no column `{weights}`, which `weight_column` names; it has "
                f"{', '.join(sorted(names))}"
            )
        file = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([self.label]))
        arrays = [pa.array(texts, pa.string()) for texts in self.texts.values()]
        table = pa.Table.from_arrays(
            [*arrays, file, pa.array(range(rows), pa.int64()), pa.array(self.lines, pa.int64())], schema=_SCHEMA
        )
        return Source(table, reader.layout(self.label, names, weights, rows))


def _json_fault(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)


def _type_name(value: Any) -> str:
    names = {list: "a list", str: "text", dict: "an object", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__
