"""Reads preference pairs from the hub, files, folders and saved datasets, and mixes them.

Nothing is shuffled here: the step plan does that.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from jax_simpo.data import synthetic
from jax_simpo.data.readers import COLUMNS, FILE_TYPES, from_rows, read_file, read_hub, read_saved
from jax_simpo.errors import DataError

BUILTIN = "builtin:"
SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")  # train-00000-of-00002.parquet, as in a downloaded hub repository


@dataclass(frozen=True)
class RawSplit:
    """The pairs of one split as the sources give them, in file order, with the origin of each.

    `table` has the columns of `readers.COLUMNS` and `weight` (JSON text, null where absent), `file` (as shown to
    users), `row` (from 0 within the file or hub split) and `line` (from 1, null where the source has no lines). Where
    several splits were read as one, `parts` gives the name and the number of rows of each, in the order of the table.
    `weight_column` is the name that the column of the weights has in the sources; None if the pairs have none.
    """

    name: str
    table: pa.Table
    parts: tuple[tuple[str, int], ...] = ()
    weight_column: str | None = None

    def __len__(self) -> int:
        return self.table.num_rows

    def row(self, index: int) -> dict[str, Any]:
        """Returns a pair as Python values: message lists or strings, None where the source has no value."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a split of {len(self)}")
        (row,) = decode_rows(self.table.slice(index, 1))
        return row

    def origin(self, index: int) -> tuple[str, int]:
        """Returns the file and the row (from 0) of a pair."""
        return self.table["file"][index].as_py(), self.table["row"][index].as_py()

    def place(self, index: int) -> str:
        """Names a pair for messages by file, row (from 0) and, in JSONL, line (from 1)."""
        file, row = self.origin(index)
        line = self.table["line"][index].as_py()
        return f"{file}, row {row}" + (f" (line {line})" if line is not None else "")

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the pairs' content. It does not change when a file is moved or renamed."""
        digest = hashlib.blake2b(digest_size=20)
        for column in (*COLUMNS, *(() if self.weight_column is None else ("weight",))):
            for text in self.table[column].to_pylist():
                data = b"" if text is None else text.encode()
                digest.update(b"%d:" % (-1 if text is None else len(data)) + data)
        return digest.hexdigest()


def decode_rows(table: pa.Table) -> list[dict[str, Any]]:
    """Converts rows of a `RawSplit.table` to Python values."""
    names = (*COLUMNS, "weight")
    columns = [[None if t is None else json.loads(t) for t in table[name].to_pylist()] for name in names]
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


# ---------------------------------------------------------------------------------------------------------------
# Mixing
# ---------------------------------------------------------------------------------------------------------------


def load_split(
    dataset_mixer: Mapping[str, float], split: str, *, dataset_configs: Sequence[str | None] | None = None
) -> RawSplit:
    """Loads a split of every source with all its rows, in mixer order; the mixer's fractions are for training only.

    Raises:
        DataError: the mixer is wrong, or a source cannot be read or has no such split.
    """
    _check_mixer(dataset_mixer)
    configs = _source_configs(dataset_mixer, dataset_configs)
    tables = [_read_source(source, split, config) for source, config in zip(dataset_mixer, configs, strict=True)]
    return RawSplit(split, pa.concat_tables(tables).unify_dictionaries())


def load_train(
    dataset_mixer: Mapping[str, float],
    splits: Sequence[str],
    *,
    dataset_configs: Sequence[str | None] | None = None,
    weight_column: str | None = None,
) -> RawSplit:
    """Loads the training pairs: the first `int(fraction * rows)` rows of every train split of every source.

    Args:
        dataset_mixer: the sources, and the fraction to take of each.
        splits: the names of the splits.
        dataset_configs: the configuration of each source that is a data set on the hub.
        weight_column: the column of the pairs' weights; None if they have none.

    Raises:
        DataError: as `load_split`, or a fraction leaves a source without a pair, or a source lacks the weights.
    """
    _check_mixer(dataset_mixer)
    if not splits:
        raise DataError("dataset_splits names no train split: add one, such as `train`")
    tables, parts = [], []
    configs = _source_configs(dataset_mixer, dataset_configs)
    # A source has one fraction, which applies to each of its splits.
    for (source, fraction), config in zip(dataset_mixer.items(), configs, strict=True):
        splits_of_source = [_read_source(source, split, config, weight_column) for split in splits]
        cut = [table.slice(0, int(fraction * table.num_rows)) for table in splits_of_source]
        if fraction > 0 and not any(table.num_rows for table in cut):
            rows = " + ".join(str(table.num_rows) for table in splits_of_source)
            raise DataError(
                f"dataset_mixer: {source}: the fraction {fraction} of its {rows} rows is not one pair: raise it, or "
                "remove the source"
            )
        tables += cut
        parts += [(split, table.num_rows) for split, table in zip(splits, cut, strict=True)]
    table = pa.concat_tables(tables).unify_dictionaries()
    if table.num_rows == 0:
        raise DataError(f"dataset_mixer: the fractions leave no training pairs ({dict(dataset_mixer)}): raise them")
    return RawSplit("+".join(splits), table, tuple(parts), weight_column)


def load_eval(
    dataset_mixer: Mapping[str, float], splits: Sequence[str], *, dataset_configs: Sequence[str | None] | None = None
) -> RawSplit:
    """Loads the evaluation pairs: all rows of every evaluation split of every source.

    Raises:
        DataError: as `load_split`.
    """
    return load_train(dict.fromkeys(dataset_mixer, 1.0), splits, dataset_configs=dataset_configs)


def from_memory(name: str, pairs: Any, weight_column: str | None = None) -> RawSplit:
    """The split of pairs that are in memory already.

    Args:
        name: names the pairs in messages.
        pairs: an iterable of dicts in any form that a row of a file may have, or a `datasets.Dataset`.
        weight_column: the key of the pairs' weights; None if they have none.

    Raises:
        DataError: there are no pairs, or they lack `chosen` or `rejected`, or the weights.
    """
    if isinstance(pairs, str | Path | Mapping) or not isinstance(pairs, Iterable):
        raise DataError(
            f"{name}: {type(pairs).__name__} is no list of pairs; give a list of dicts with `chosen` and `rejected`, "
            "or a `datasets.Dataset`. Files are named in `dataset_mixer`"
        )
    return RawSplit(name, from_rows(name, pairs, weight_column), weight_column=weight_column)


def _check_mixer(dataset_mixer: Mapping[str, float]) -> None:
    if not dataset_mixer:
        raise DataError("dataset_mixer is empty: name at least one dataset, such as `my_pairs.jsonl: 1.0`")
    for source, fraction in dataset_mixer.items():
        number = isinstance(fraction, (int, float)) and not isinstance(fraction, bool)
        if not number or not 0 <= fraction <= 1:
            raise DataError(f"dataset_mixer: the fraction of {source!r} is {fraction!r}: give a number from 0 to 1")


def _source_configs(dataset_mixer: Mapping[str, float], configs: Sequence[str | None] | None) -> Sequence[str | None]:
    if not configs:
        return [None] * len(dataset_mixer)
    if len(configs) != len(dataset_mixer):
        raise DataError(
            f"dataset_configs has {len(configs)} names for {len(dataset_mixer)} datasets: give one each, null for none"
        )
    return configs


# ---------------------------------------------------------------------------------------------------------------
# From the name of a source to its table
# ---------------------------------------------------------------------------------------------------------------


def _read_source(source: str, split: str, config: str | None, weights: str | None = None) -> pa.Table:
    path = Path(source).expanduser()
    if source.startswith(BUILTIN):
        table = from_rows(f"{source}/{split}", synthetic.make_rows(source.removeprefix(BUILTIN), split), weights)
    elif path.is_dir():
        table = _read_folder(source, path, split, weights)
    elif path.exists():
        if path.suffix.lower() not in FILE_TYPES:
            raise DataError(f"{source}: cannot read {path.suffix or 'a file without extension'}; use {_file_types()}")
        _check_split(source, split, ["train"], "a single data file is the split `train`; put test pairs beside it")
        table = read_file(source, path, weights)
    elif path.suffix.lower() in FILE_TYPES or source.startswith(("/", ".", "~")) or source.count("/") > 1:
        # Not a hub id, which has at most one slash.
        raise DataError(f"{source}: no such file or folder{_suggest_neighbour(path)}")
    else:
        table = read_hub(source, split, config, weights)
    if table.num_rows == 0:
        raise DataError(f"{source}: the split {split!r} has no rows")
    return table


def _read_folder(source: str, folder: Path, split: str, weights: str | None) -> pa.Table:
    if (folder / "dataset_dict.json").exists():
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        _check_split(source, split, splits)
        return read_saved(f"{source}/{split}", folder / split, weights)
    if _is_saved_dataset(folder):
        _check_split(source, split, ["train"], "a saved dataset without splits is the split `train`")
        return read_saved(source, folder, weights)
    files = _folder_files(source, folder)
    saved = {child.name: child for child in sorted(folder.iterdir()) if child.is_dir() and _is_saved_dataset(child)}
    if not files and not saved:
        raise DataError(f"{source}: the folder holds neither {_file_types()} files nor a dataset of `save_to_disk`")
    _check_split(source, split, [*saved, *files], "a folder's splits are its file names without the extension")
    if split in saved:
        return read_saved(f"{source}/{split}", saved[split], weights)
    named = [(str(Path(source) / file.relative_to(folder)), file) for file in files[split]]
    return pa.concat_tables([read_file(label, file, weights) for label, file in named])


def _folder_files(source: str, folder: Path) -> dict[str, list[Path]]:
    """Maps each split to its files. A hub repository on disk keeps them in `data/`, perhaps in shards."""
    files: dict[str, list[Path]] = {}
    metadata = ("dataset_info.json", "dataset_infos.json", "state.json")
    for place in (folder, folder / "data"):
        if files or not place.is_dir():
            continue
        for file in sorted(place.iterdir()):
            readable = file.suffix.lower() in FILE_TYPES and file.is_file()
            if readable and not file.name.startswith(".") and file.name not in metadata:
                shard = SHARD.fullmatch(file.stem)
                files.setdefault(shard[1] if shard else file.stem, []).append(file)
    for split, members in files.items():
        if len(members) > 1 and not all(SHARD.fullmatch(file.stem) for file in members):
            names = ", ".join(file.name for file in members)
            raise DataError(f"{source}: the split {split!r} is in several files ({names}): keep one")
    return files


def _is_saved_dataset(folder: Path) -> bool:
    return (folder / "state.json").exists() and (folder / "dataset_info.json").exists()


def _check_split(source: str, split: str, available: Sequence[str], why: str = "") -> None:
    if split not in available:
        raise DataError(f"{source}: no split {split!r}; there is {', '.join(available)}" + (f" ({why})" if why else ""))


def _file_types() -> str:
    return ", ".join(FILE_TYPES[:-1]) + " or " + FILE_TYPES[-1]


def _suggest_neighbour(path: Path) -> str:
    if not path.parent.is_dir():
        return f" ({path.parent} does not exist either)"
    near = difflib.get_close_matches(path.name, [child.name for child in path.parent.iterdir()], n=1)
    return f"; did you mean {near[0]}?" if near else f" in {path.parent.resolve()}"
