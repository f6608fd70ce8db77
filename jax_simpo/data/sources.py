"""Reads preference pairs from the hub, files, folders and saved datasets, and mixes them.

Nothing is shuffled here: the step plan does that.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jax_simpo.data import synthetic
from jax_simpo.data.conversations import read_row
from jax_simpo.data.detection import Layout, Reading
from jax_simpo.data.messages import BadRow
from jax_simpo.data.readers import (
    COLUMNS,
    FILE_TYPES,
    Source,
    file_type,
    from_rows,
    read_file,
    read_hub,
    read_saved,
    stem,
)
from jax_simpo.data.selection import HELD_OUT, Selection, choose_rows, held_out_count, hold_out, plain_text
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
    `layouts` says how each source was read.
    """

    name: str
    table: pa.Table
    parts: tuple[tuple[str, int], ...] = ()
    weight_column: str | None = None
    layouts: tuple[Layout, ...] = ()

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


def load_split(dataset_mixer: Mapping[str, float], split: str, selection: Selection | None = None) -> RawSplit:
    """Loads a split of every source with all its rows, in mixer order; the mixer's fractions are for training only.

    `max_samples` does not cut it, nor are rows held out of it: a split that is asked for by name is taken whole.

    Raises:
        DataError: the mixer is wrong, or a source cannot be read or has no such split.
    """
    whole = replace(selection or Selection(), max_samples=None)
    raw = _load(dict.fromkeys(_checked(dataset_mixer, whole), 1.0), [split], whole)
    return replace(raw, name=split, parts=())


def load_train(
    dataset_mixer: Mapping[str, float],
    splits: Sequence[str],
    selection: Selection | None = None,
    *,
    weight_column: str | None = None,
) -> RawSplit:
    """Loads the training pairs: `int(fraction * rows)` rows of every train split of every source, and not those that
    `test_size` holds out.

    Args:
        dataset_mixer: the sources, and the fraction to take of each.
        splits: the names of the splits.
        selection: which rows are taken, and how they are read.
        weight_column: the column of the pairs' weights; None if they have none.

    Raises:
        DataError: as `load_split`, or a fraction leaves a source without a pair, or a source lacks the weights.
    """
    selection = selection or Selection()
    raw = _load(_checked(dataset_mixer, selection), splits, selection, weight_column)
    return raw if selection.test_size is None else divide(raw, selection)[0]


def load_named(
    dataset_mixer: Mapping[str, float], split: str, train_splits: Sequence[str], selection: Selection
) -> RawSplit:
    """Loads a split by its name: `load_split`, or for `held_out` the pairs that `test_size` keeps from training.

    Raises:
        DataError: as `load_train`.
    """
    if split != HELD_OUT or selection.test_size is None:
        return load_split(dataset_mixer, split, selection)
    raw = _load(_checked(dataset_mixer, selection), train_splits, selection)
    return divide(raw, selection)[1]


def load_eval(
    dataset_mixer: Mapping[str, float], splits: Sequence[str], selection: Selection | None = None
) -> RawSplit:
    """Loads the evaluation pairs: all rows of every evaluation split of every source, at most `max_samples` of each.

    Raises:
        DataError: as `load_split`.
    """
    selection = selection or Selection()
    return _load(dict.fromkeys(_checked(dataset_mixer, selection), 1.0), splits, selection)


def from_memory(
    name: str, pairs: Any, weight_column: str | None = None, selection: Selection | None = None
) -> RawSplit:
    """The split of pairs that are in memory already.

    Args:
        name: names the pairs in messages.
        pairs: an iterable of dicts in any form that a row of a file may have, or a `datasets.Dataset`.
        weight_column: the key of the pairs' weights; None if they have none.
        selection: how their columns are read; all rows are taken.

    Raises:
        DataError: there are no pairs, or they are in no known format, or lack the weights.
    """
    if isinstance(pairs, str | Path | Mapping) or not isinstance(pairs, Iterable):
        raise DataError(
            f"{name}: {type(pairs).__name__} is no list of pairs; give a list of dicts with `chosen` and `rejected`, "
            "or a `datasets.Dataset`. Files are named in `dataset_mixer`"
        )
    source = from_rows(name, pairs, (selection or Selection()).reading(name, weight_column))
    return RawSplit(name, source.table, weight_column=weight_column, layouts=(source.layout,))


def _load(
    dataset_mixer: Mapping[str, float], splits: Sequence[str], selection: Selection, weights: str | None = None
) -> RawSplit:
    """Loads some splits of every source, each cut to the source's fraction and to `max_samples`."""
    if not splits:
        raise DataError("dataset_splits names no train split: add one, such as `train`")
    tables, parts, layouts = [], [], []
    configs = _source_configs(dataset_mixer, selection.dataset_configs)
    # A source has one fraction, which applies to each of its splits.
    for (source, fraction), config in zip(dataset_mixer.items(), configs, strict=True):
        reading = selection.reading(source, weights)
        read = [_read_source(source, split, config, reading) for split in splits]
        counts = [int(fraction * table.num_rows) for table, _ in read]
        most = selection.max_samples
        taken = counts if most is None else [min(count, most) for count in counts]
        cut = [choose_rows(table, count, selection.shuffle_seed) for (table, _), count in zip(read, taken, strict=True)]
        if fraction > 0 and not any(table.num_rows for table in cut):
            rows = " + ".join(str(table.num_rows) for table, _ in read)
            raise DataError(
                f"dataset_mixer: {source}: the fraction {fraction} of its {rows} rows is not one pair: raise it, or "
                "remove the source"
            )
        tables += cut
        parts += [(split, table.num_rows) for split, table in zip(splits, cut, strict=True)]
        for (_, of_split), count, kept in zip(read, counts, taken, strict=True):
            layouts += _layouts_with_cut(of_split, count - kept)
    table = pa.concat_tables(tables).unify_dictionaries()
    if table.num_rows == 0:
        raise DataError(f"dataset_mixer: the fractions leave no training pairs ({dict(dataset_mixer)}): raise them")
    return RawSplit("+".join(splits), table, tuple(parts), weights, tuple(layouts))


def _layouts_with_cut(layouts: Sequence[Layout], left_out: int) -> list[Layout]:
    """Notes in the first layout of a split how many of its rows `max_samples` left out."""
    first, *others = layouts
    rows = sum(layout.rows for layout in layouts)
    return [replace(first, left_out=left_out, rows=rows) if left_out else first, *others]


def divide(raw: RawSplit, selection: Selection) -> tuple[RawSplit, RawSplit]:
    """Divides the rows of a split into those to train on and those that `test_size` holds out, by whole prompts.

    Raises:
        DataError: one of the two would be empty.
    """
    assert selection.test_size is not None
    rows, test_size = len(raw), selection.test_size
    held_out = hold_out(_prompt_keys(raw), held_out_count(test_size, rows), selection.shuffle_seed)
    if not held_out.any() or held_out.all():
        raise DataError(
            f"`test_size` {test_size:g} holds {int(held_out.sum())} of the {rows} rows of {raw.name} out, counted by "
            "whole prompts: give a number that leaves rows on both sides"
        )
    ends = np.cumsum([count for _, count in raw.parts], dtype=int)
    parts = tuple(
        (name, int((~held_out[end - count : end]).sum())) for (name, count), end in zip(raw.parts, ends, strict=True)
    )
    trained, evaluated = (raw.table.filter(pa.array(kept)) for kept in (~held_out, held_out))
    # Evaluation counts every pair once.
    return replace(raw, table=trained, parts=parts), RawSplit(HELD_OUT, evaluated, layouts=raw.layouts)


def _prompt_keys(raw: RawSplit) -> list[str]:
    """Returns for each row a text that is the same for rows of the same prompt; a bad row has one of its own."""
    keys = []
    for start in range(0, len(raw), 1000):
        for number, row in enumerate(decode_rows(raw.table.slice(start, 1000)), start):
            try:
                keys.append(json.dumps(plain_text(json.loads(read_row(row).key)), sort_keys=True))
            except BadRow:
                keys.append(f"bad row {number}")
    return keys


def _checked(dataset_mixer: Mapping[str, float], selection: Selection) -> Mapping[str, float]:
    """Returns the mixer, which is right: its sources are there, too."""
    _check_mixer(dataset_mixer)
    check_present(dataset_mixer)
    selection.check_names(dataset_mixer)
    return dataset_mixer


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


def _read_source(source: str, split: str, config: str | None, reading: Reading) -> tuple[pa.Table, tuple[Layout, ...]]:
    """Returns the rows of a split of a source, and how each of its files was read."""
    path = Path(source).expanduser()
    if source.startswith(BUILTIN):
        read = [_read_usual_builtin(source, split) if reading == Reading() else _read_builtin(source, split, reading)]
    elif path.is_dir():
        read = _read_folder(source, path, split, reading)
    elif path.exists():
        if file_type(path) is None:
            raise DataError(f"{source}: cannot read {path.suffix or 'a file without extension'}; use {_file_types()}")
        _check_split(source, split, ["train"], "a single data file is the split `train`; put test pairs beside it")
        read = [read_file(source, path, reading)]
    elif missing := _missing(source):
        raise DataError(missing)
    else:
        read = [read_hub(source, split, config, reading)]
    table = pa.concat_tables([one.table for one in read])
    if table.num_rows == 0:
        raise DataError(f"{source}: the split {split!r} has no rows")
    return table, _joined_layouts(f"{source}/{split}", [one.layout for one in read])


def _read_builtin(source: str, split: str, reading: Reading) -> Source:
    rows = synthetic.make_rows(source.removeprefix(BUILTIN), split)
    return from_rows(f"{source}/{split}", rows, reading)


@cache
def _read_usual_builtin(source: str, split: str) -> Source:
    """Reads a built-in split once for all runs of a process, such as those of a notebook."""
    return _read_builtin(source, split, Reading())


def check_present(dataset_mixer: Iterable[str]) -> None:
    """Makes sure that the sources that can only be files or folders here are there. The hub is not asked.

    Raises:
        DataError: with every source that is missing, a line each.
    """
    if missing := list(filter(None, map(_missing, dataset_mixer))):
        raise DataError("\n".join(missing))


def _missing(source: str) -> str:
    """Says that a source is missing; an empty text for one that is there, is built in, or may be on the hub."""
    path = Path(source).expanduser()
    if source.startswith(BUILTIN) or path.exists() or not _is_local(source, path):
        return ""
    text = f"{source}: no such file or folder{_suggest_neighbour(path)}"
    if "/" in source:
        return text
    return f"{text}{'' if text.endswith('?') else '.'} A data set on the hub is `owner/name`"


def _joined_layouts(label: str, layouts: Sequence[Layout]) -> tuple[Layout, ...]:
    """Joins the layouts of the files of a split to one if they are alike, as those of shards are."""
    first = layouts[0]
    if len(layouts) == 1 or any(replace(one, label=first.label, rows=first.rows) != first for one in layouts):
        return tuple(layouts)
    return (replace(first, label=label, rows=sum(one.rows for one in layouts)),)


def _is_local(source: str, path: Path) -> bool:
    """Returns True for a name that can only be meant as a file or folder here.

    An id on the hub is `owner/name`. Where there is a folder `owner` here, a folder in it is meant: the hub would be
    asked for half a minute where there is no network.
    """
    is_path = source.startswith(("/", ".", "~")) or source.endswith("/") or source.count("/") != 1
    return is_path or file_type(path) is not None or path.parent.is_dir()


def _read_folder(source: str, folder: Path, split: str, reading: Reading) -> list[Source]:
    if (folder / "dataset_dict.json").exists():
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        _check_split(source, split, splits)
        return [read_saved(f"{source}/{split}", folder / split, reading)]
    if _is_saved_dataset(folder):
        _check_split(source, split, ["train"], "a saved dataset without splits is the split `train`")
        return [read_saved(source, folder, reading)]
    files = _folder_files(source, folder)
    saved = {child.name: child for child in sorted(folder.iterdir()) if child.is_dir() and _is_saved_dataset(child)}
    if not files and not saved:
        raise DataError(f"{source}: the folder holds neither {_file_types()} files nor a dataset of `save_to_disk`")
    _check_split(source, split, [*saved, *files], "a folder's splits are its file names without the extension")
    if split in saved:
        return [read_saved(f"{source}/{split}", saved[split], reading)]
    named = [(str(Path(source) / file.relative_to(folder)), file) for file in files[split]]
    read = [read_file(label, file, reading) for label, file in named]
    first = read[0].layout
    for other in (one.layout for one in read[1:]):
        if other.formats != first.formats:
            raise DataError(
                f"{source}: the split {split!r} is in two formats: {first.line}; {other.line}. Name one with "
                "`dataset_format`"
            )
    return read


def _folder_files(source: str, folder: Path) -> dict[str, list[Path]]:
    """Maps each split to its files. A hub repository on disk keeps them in `data/`, perhaps in shards."""
    files: dict[str, list[Path]] = {}
    metadata = ("dataset_info.json", "dataset_infos.json", "state.json")
    for place in (folder, folder / "data"):
        if files or not place.is_dir():
            continue
        for file in sorted(place.iterdir()):
            readable = file_type(file) is not None and file.is_file()
            if readable and not file.name.startswith(".") and file.name not in metadata:
                shard = SHARD.fullmatch(stem(file))
                files.setdefault(shard[1] if shard else stem(file), []).append(file)
    for split, members in files.items():
        if len(members) > 1 and not all(SHARD.fullmatch(stem(file)) for file in members):
            names = ", ".join(file.name for file in members)
            raise DataError(f"{source}: the split {split!r} is in several files ({names}): keep one")
    return files


def _is_saved_dataset(folder: Path) -> bool:
    return (folder / "state.json").exists() and (folder / "dataset_info.json").exists()


def _check_split(source: str, split: str, available: Sequence[str], why: str = "") -> None:
    if split not in available:
        raise DataError(f"{source}: no split {split!r}; there is {', '.join(available)}" + (f" ({why})" if why else ""))


def _file_types() -> str:
    return ", ".join(FILE_TYPES[:-1]) + " (also with .gz) or " + FILE_TYPES[-1]


def _suggest_neighbour(path: Path) -> str:
    if not path.parent.is_dir():
        return f" ({path.parent} does not exist either)"
    near = difflib.get_close_matches(path.name, [child.name for child in path.parent.iterdir()], n=1)
    return f"; did you mean {near[0]}?" if near else f" in {path.parent.resolve()}"
