"""Finds the format of a split, and reads its rows in it.

A split is read in one format, found from its first rows or named by the config's `dataset_format`. A row that does not
fit it is a bad row; it is never read in another way than those around it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jax_simpo.data.formats import (
    ALIASES,
    BY_NAME,
    FORMATS,
    ROLES,
    Format,
    Row,
    fits_implicit_text,
    from_implicit_text,
)
from jax_simpo.data.messages import BadRow
from jax_simpo.errors import DataError
from jax_simpo.pages import page_url

SAMPLE = 1000
"""Rows from which a format is found."""

_PICTURES = ("images", "image", "videos", "audios")
# Columns that hold a verdict on a single answer.
_LABELS = ("label", "kto_tag")
# Rows of these formats say themselves what they are, so they may be mixed in one file.
_MIXABLE = frozenset({"pairs", "dialogues", "hh", "ranked", "scored"})
# What other programs call formats -> what to name here.
_ELSEWHERE = {
    "sharegpt": "`conversation`, or `dialogues` where `chosen` and `rejected` are whole conversations",
    "openai": "`conversation`, or `dialogues` where `chosen` and `rejected` are whole conversations",
    "chat_template": "`conversation`, or `dialogues` where `chosen` and `rejected` are whole conversations",
    "trl": "`pairs`, or without a prompt `dialogues` or `implicit_text`",
    "ultrafeedback": "`dialogues` for its binarized form, `ranked` for the one with `completions`",
    "nectar": "`ranked`",
}


@dataclass(frozen=True)
class Layout:
    """Describes how a file, or a split of a data set, was read.

    Attributes:
        label: the file or data set, as shown to users.
        formats: the names of the formats of its rows.
        columns: role -> the column that it was read from.
        unused: the columns that were not read.
        rows: the number of its rows.
        left_out: how many rows `max_samples` left out.
    """

    label: str
    formats: tuple[str, ...]
    columns: Mapping[str, str]
    unused: tuple[str, ...]
    rows: int = 0
    left_out: int = 0

    @property
    def line(self) -> str:
        """Says in a line what was read as what, and what was not read."""
        roles = (role if role == column else f"{role} from {column}" for role, column in self.columns.items())
        unused = f"; columns not used: {', '.join(self.unused)}" if self.unused else ""
        cut = f"; {self.left_out:,} of {self.rows:,} rows left out (`max_samples`)" if self.left_out else ""
        return f"{self.label}: read as {' and '.join(self.formats)} ({', '.join(roles)}){unused}{cut}"


@dataclass(frozen=True)
class Reading:
    """Holds what the config says of the columns of a source.

    Attributes:
        format: the name of the format; None finds it.
        columns: role -> column, for roles that have another name in the source.
        weights: the column of the weights; None if there is none.
    """

    format: str | None = None
    columns: Mapping[str, str] | None = None
    weights: str | None = None

    def __post_init__(self) -> None:
        if self.format is not None and self.format not in BY_NAME:
            known = _ELSEWHERE.get(self.format.lower())
            advice = f"here that is {known}" if known else f"expected one of {', '.join(BY_NAME)}"
            raise DataError(f"`dataset_format` {self.format}: {advice}")
        for role in self.columns or ():
            if role not in ROLES:
                raise DataError(f"`dataset_columns` {role}: expected one of {', '.join(ROLES)}")

    @property
    def names(self) -> tuple[str, ...]:
        """The columns of a source that may be read."""
        aliases = [name for names in ALIASES.values() for name in names]
        own = [*(self.columns or {}).values(), *([] if self.weights is None else [self.weights])]
        return tuple(dict.fromkeys([*aliases, *_PICTURES, *_LABELS, *own]))


class Reader:
    """Reads the rows of one split in its format.

    Attributes:
        formats: the formats of its rows, one unless they may be mixed.
        columns: role -> the column it is read from, of all roles that have one.
    """

    def __init__(self, formats: Sequence[Format], columns: Mapping[str, str]) -> None:
        self.formats = tuple(formats)
        self.columns = dict(columns)
        read = {role for entry in self.formats for role in entry.roles}
        if "chosen" in self.columns:
            read.discard("output")
        if "prompt" in self.columns and "prompt" in read:
            read -= {"instruction", "input"}
        self._used = {role: column for role, column in self.columns.items() if role in read}

    def read(self, value: Mapping[str, Any]) -> Row:
        """Makes a row of our columns. Raises `BadRow`."""
        for name in _PICTURES:
            if value.get(name):
                raise BadRow("not text", f"the row has `{name}`; only text can be trained on")
        row = by_role(value, self._used)
        # Formats that may be mixed convert nothing that another one of them reads.
        for entry in self.formats:
            row = entry.convert(row)
        return row

    def layout(self, label: str, names: Iterable[str], weights: str | None, rows: int) -> Layout:
        """Says how the split was read, once the names of all its columns are known."""
        order = [role for role in ROLES if role in self._used and self._used[role] in names]
        columns = {role: self._used[role] for role in order}
        if weights is not None:
            columns["weight"] = weights
        unused = tuple(sorted(set(names) - set(columns.values())))
        return Layout(label, tuple(entry.name for entry in self.formats), columns, unused, rows)


def detect(label: str, rows: Sequence[Mapping[str, Any]], names: Iterable[str], reading: Reading) -> Reader:
    """Finds the format of a split from its first rows, and the column of each role.

    Args:
        label: the split, for messages.
        rows: its first rows.
        names: the names of all its columns.
        reading: what the config says of them.

    Raises:
        DataError: no format fits, or several do, or a column that the config names is missing.
    """
    names = sorted(names)
    columns = find_columns(label, rows, names, reading)
    if reading.format is not None:
        named = BY_NAME[reading.format]
        if not has_needed(named, columns):
            raise DataError(
                f"{label}: has the columns {', '.join(names) or '(none)'}; `dataset_format: {named.name}` needs "
                f"{named.summary}. Say with `dataset_columns` which columns these are, or name another format"
            )
        return Reader([named], columns)
    fitting: Counter[tuple[str, ...]] = Counter()
    for value in rows:
        row = by_role(value, columns)
        fitting[tuple(entry.name for entry in FORMATS if entry.fits(row))] += 1
    for several in (found for found in fitting if len(found) > 1):
        raise DataError(_ambiguous(label, several, f"{fitting[several]:,} of its first {len(rows):,} rows fit"))
    found = [entry for entry in FORMATS if (entry.name,) in fitting]
    others = [entry for entry in found if entry.name != "implicit_text"]
    found = others or found  # texts without a prompt are bad rows among others, and a format only by themselves
    found = [entry for entry in found if has_needed(entry, columns)]
    if not found or (found[0].name == "implicit_text" and not _begin_alike(rows, columns)):
        raise DataError(_no_format(label, rows, names, columns))
    if len(found) > 1 and not _MIXABLE.issuperset(entry.name for entry in found):
        raise DataError(_ambiguous(label, [entry.name for entry in found], "its rows fit"))
    return Reader(found, columns)


def find_columns(
    label: str, rows: Sequence[Mapping[str, Any]], names: Sequence[str], reading: Reading
) -> dict[str, str]:
    """Finds the column of each role. Arguments: those of `detect`.

    Raises:
        DataError: a column that the config names is missing.
    """
    given = dict(reading.columns or {})
    if missing := [column for column in given.values() if column not in names]:
        raise DataError(
            f"{label}: has no column {', '.join(missing)}, which `dataset_columns` names; it has {', '.join(names)}"
        )
    taken = set(given.values())
    columns = {}
    for role, aliases in ALIASES.items():
        there = [name for name in aliases if name in names and name not in taken]
        first = next((name for name in there if any(row.get(name) is not None for row in rows)), None)
        name = given.get(role, first)
        if name is not None:
            columns[role] = name
    for role, other in (("chosen", "rejected"), ("rejected", "chosen")):
        # Without a value in any of the rows these are bad rows, and no rows of another kind.
        named = next((name for name in ALIASES[role] if name in names and name not in taken), None)
        if other in columns and role not in columns and named is not None:
            columns[role] = named
    # Beside a pair, a column named `answers`, say, has something else in it.
    if columns.get("responses") not in (None, "responses", given.get("responses")) and not (
        {"chosen", "rejected"}.isdisjoint(columns)
    ):
        del columns["responses"]
    return columns


def has_needed(entry: Format, columns: Mapping[str, str]) -> bool:
    """Returns True if there are columns without which no row can be of a format."""
    return any(columns.keys() >= set(roles) for roles in entry.needs)


def by_role(value: Mapping[str, Any], columns: Mapping[str, str]) -> Row:
    """Returns the values of a row by role, without those that are missing."""
    return {role: item for role, column in columns.items() if (item := value.get(column)) is not None}


def _begin_alike(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> bool:
    """Returns True if all rows that are two texts begin with the same words: by chance a few do."""
    texts = [row for value in rows if fits_implicit_text(row := by_role(value, columns))]
    for row in texts:
        try:
            from_implicit_text(row)
        except BadRow as bad:
            if bad.kind == "no prompt":
                return False
    return True


def _ambiguous(label: str, names: Sequence[str], why: str) -> str:
    choices = "; ".join(f"`{name}`: {BY_NAME[name].summary}" for name in names)
    return (
        f"{label}: {why} {len(names)} formats ({choices}). Name the one that is meant, such as "
        f"`dataset_format: {names[0]}`, or say with `dataset_columns` which columns are which"
    )


def _no_format(label: str, rows: Sequence[Mapping[str, Any]], names: Sequence[str], columns: Mapping[str, str]) -> str:
    """Says why rows are in no format, as exactly as their columns allow."""
    there = f"{label}: has the columns {', '.join(names) or '(none)'}"
    if rows and not any(by_role(row, columns) for row in rows) and not {"chosen", "rejected"}.isdisjoint(names):
        return f"{there}, without a value in its first {len(rows):,} rows"
    has_label = any(isinstance(row.get(name), bool | int | str) for row in rows for name in _LABELS)
    if "chosen" in columns and "rejected" in columns:
        return (
            f"{there}, of which none is known to hold the prompt, and the texts in `chosen` and `rejected` do not "
            "begin with one. Say which it is, such as `dataset_columns: {prompt: COLUMN}`"
        )
    alone = "completion" in names or not {"response", "conversation", "output"}.isdisjoint(columns)
    if has_label and alone:
        return (
            f"{there}: answers that are labelled one by one (unpaired rows, as for KTO). A preference needs two "
            "answers to the same prompt: write rows with `prompt`, `chosen` and `rejected`, or, where a prompt has "
            "several answers, `prompt`, `response` and a `score` (1 or 0), and set `group_by: prompt`"
        )
    if alone and {"chosen", "rejected"}.isdisjoint(columns):
        return (
            f"{there}: one answer to each prompt, as for supervised fine-tuning, and none that is worse. A preference "
            "needs `chosen` and `rejected`, or `responses` with `scores` or `ranks`"
        )
    missing = " and ".join(role for role in ("chosen", "rejected") if role not in columns)
    return (
        f"{there} but not {missing}: rename them, or say which they are with `dataset_columns`, such as "
        f"`dataset_columns: {{{missing.split()[0]}: COLUMN}}`. Needed are `chosen` and `rejected`, or `responses` with "
        f"`scores` or `ranks`, and `prompt` if the answers stand alone (all formats: {page_url('data-formats')})"
    )


def flag_fault(bad: BadRow) -> Row:
    """Makes the row of our columns that stands for a row that cannot be converted."""
    return {"fault": [bad.kind, bad.detail]}


def as_json(row: Row, column: str) -> str | None:
    """Writes a value of a row as JSON; None if it has none."""
    item = row.get(column)
    return None if item is None else json.dumps(item, default=str)
