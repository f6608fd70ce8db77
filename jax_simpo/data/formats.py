"""The formats of preference data: how each is recognised, and how a row of it becomes a row of our columns.

Data sets name the same things differently, so a format is written in *roles*, such as `prompt` or `chosen`; a role is
found in the column of that name, in one of its other names (`ALIASES`), or where the config's `dataset_columns` says.

A split is read in one format, found from its first rows (`detect`) or named by the config's `dataset_format`. A row
that does not fit it is a bad row; it is never read in another way than those around it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jax_simpo.data.messages import BadRow, parse_hh, short
from jax_simpo.errors import DataError

Row = dict[str, Any]
"""The values of a row by role; without those that are missing."""

SAMPLE = 1000
"""Rows from which a format is found."""

# Role -> the names of its column; the first that has a value counts for the whole split.
ALIASES: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "question"),
    "instruction": ("instruction",),
    "input": ("input",),
    "output": ("output",),
    "history": ("history",),
    "system": ("system", "system_prompt"),
    "conversation": ("conversations", "conversation", "messages"),
    "chosen": ("chosen", "chosen_response"),
    "rejected": ("rejected", "rejected_response"),
    "responses": ("responses", "completions", "answers"),
    "response": ("response",),
    "scores": ("scores",),
    "score": ("score",),
    "ranks": ("ranks",),
    "tools": ("tools",),
}
_PICTURES = ("images", "image", "videos", "audios")
# Columns that hold a verdict on a single answer.
_LABELS = ("label", "kto_tag")


@dataclass(frozen=True)
class Format:
    """A way in which data sets write preferences.

    Attributes:
        name: what `dataset_format` calls it.
        summary: what a row of it has, for messages.
        roles: the roles that it reads.
        needs: the roles without which no row can be of it; each of them, or those of another line.
        fits: returns True for a row of this format; no row is to fit two, unless it can be read in two ways.
        convert: makes a row of our columns (`readers.COLUMNS`) of it. Raises `BadRow`.
    """

    name: str
    summary: str
    roles: tuple[str, ...]
    needs: tuple[tuple[str, ...], ...]
    fits: Callable[[Row], bool]
    convert: Callable[[Row], Row]


@dataclass(frozen=True)
class Layout:
    """How a file, or a split of a data set, was read.

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


# ---------------------------------------------------------------------------------------------------------------
# How rows are recognised
# ---------------------------------------------------------------------------------------------------------------


def _first_turn(value: Any) -> Any:
    """Returns the role of the first turn of messages; None for anything else."""
    while isinstance(value, list) and value:  # of the first of several answers
        value = value[0]
    if not isinstance(value, dict):
        return None
    role = value.get("role", value.get("from"))
    return role[0] if isinstance(role, list) and role else role


def _is_dialogue(value: Any) -> bool:
    """Returns True for messages that begin before the answer."""
    return _first_turn(value) not in (None, "assistant", "gpt", "chatgpt", "model", "function_call")


def _is_transcript(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(map(_is_transcript, value))
    return isinstance(value, str) and parse_hh(value) is not None


def _has_pair(row: Row) -> bool:
    return "chosen" in row or "rejected" in row


def _has_prompt(row: Row) -> bool:
    prompt = row.get("prompt")
    return isinstance(prompt, list | dict) or (isinstance(prompt, str) and bool(prompt.strip()))


def _fits_hh(row: Row) -> bool:
    answers = [row[role] for role in ("chosen", "rejected") if role in row]
    in_prompt = _is_transcript(row.get("prompt")) and all(isinstance(answer, str) for answer in answers)
    return bool(answers) and (in_prompt or all(map(_is_transcript, answers)))


def _fits_dialogues(row: Row) -> bool:
    prompt_is_turns = isinstance(row.get("prompt"), list | dict)
    return _has_pair(row) and not prompt_is_turns and _is_dialogue(row.get("chosen", row.get("rejected")))


def _fits_pairs(row: Row) -> bool:
    return _has_pair(row) and _has_prompt(row) and not _fits_hh(row) and not _fits_dialogues(row)


def _fits_implicit_text(row: Row) -> bool:
    answers = [row.get("chosen"), row.get("rejected")]
    without = not any(role in row for role in ("instruction", "conversation")) and not _has_prompt(row)
    return without and all(isinstance(answer, str) for answer in answers) and not _fits_hh(row)


def _fits_alpaca(row: Row) -> bool:
    """Returns True for an instruction with two answers; with one, or with scored ones, it is none."""
    if not isinstance(row.get("instruction"), str):
        return False
    answers_alone = _has_pair(row) and not _fits_dialogues(row) and not _fits_hh(row)
    return answers_alone or isinstance(row.get("output"), list)


def _fits_conversation(row: Row) -> bool:
    """Returns True for turns that a chosen and a rejected answer follow.

    Where the turns end with an answer (as in the column `messages` of UltraFeedback), they are no prompt.
    """
    turns = row.get("conversation")
    if not isinstance(turns, list) or not turns or not _has_pair(row):
        return False
    return _is_dialogue(turns[-1:]) and not _fits_dialogues(row) and not _fits_hh(row)


def _fits_ranked(row: Row) -> bool:
    return "responses" in row


def _fits_scored(row: Row) -> bool:
    return "response" in row and not _has_pair(row) and "responses" not in row and ("score" in row or "scores" in row)


# ---------------------------------------------------------------------------------------------------------------
# How rows become rows of our columns
# ---------------------------------------------------------------------------------------------------------------


def _as_it_is(row: Row) -> Row:
    return row


def _from_hh(row: Row) -> Row:
    """Takes the blank after "Assistant:" off answers that stand alone, as it is taken off those in transcripts."""
    if not _is_transcript(row.get("prompt")):
        return row
    answers = {role: row[role] for role in ("chosen", "rejected") if isinstance(row.get(role), str)}
    return row | {role: text if _is_transcript(text) else text.strip() for role, text in answers.items()}


def _from_implicit_text(row: Row) -> Row:
    """Takes what two texts have in common as the prompt, up to the last space or line end.

    TRL's `extract_prompt` ends a prompt within a word where the answers part there; a chat model is not to be trained
    on half a word. White space where the texts part is the template's business.
    """
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise BadRow("missing value", "`chosen` and `rejected` are to be texts that begin with the prompt")
    same = next((n for n, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if same is None:
        raise BadRow("chosen = rejected", "one of the two texts is the beginning of the other, or all of it")
    while same and not chosen[same - 1].isspace():
        same -= 1
    prompt = chosen[:same].rstrip()
    if not prompt:
        raise BadRow("no prompt", "the two texts have no first words in common, and there is no column `prompt`")
    return {**row, "prompt": prompt, "chosen": chosen[same:].lstrip(), "rejected": rejected[same:].lstrip()}


def _instruction(row: Row) -> Any:
    """Joins an instruction and its input as Alpaca files mean it, an instruction alone without."""
    parts = [row[role] for role in ("instruction", "input") if role in row]
    texts = [part for part in parts if isinstance(part, str) and part]
    return "\n".join(texts) if texts or not parts else parts[0]


def _from_alpaca(row: Row) -> Row:
    prompt: Any = _instruction(row)
    if history := row.get("history"):
        rounds = history if isinstance(history, list) else [history]
        if not all(isinstance(turns, list) and len(turns) == 2 for turns in rounds):
            raise BadRow("wrong history", f"`history` is {short(history)}; expected a list of [question, answer]")
        roles = ("user", "assistant")
        past = [{"role": role, "content": text} for turns in rounds for role, text in zip(roles, turns, strict=True)]
        prompt = [*past, {"role": "user", "content": prompt}]
    if _has_pair(row):
        return {**row, "prompt": prompt}
    output = row.get("output")
    if not isinstance(output, list) or len(output) != 2:
        raise BadRow("not two answers", f"`output` is {short(output)}; expected the better answer and the worse one")
    return {**row, "prompt": prompt, "chosen": output[0], "rejected": output[1]}


def _from_conversation(row: Row) -> Row:
    if "conversation" not in row:
        raise BadRow("no prompt", "the row has no conversation that the answers follow")
    return {**row, "prompt": row["conversation"]}


def _from_ranked(row: Row) -> Row:
    return row if "prompt" in row or "instruction" not in row else {**row, "prompt": _instruction(row)}


FORMATS: tuple[Format, ...] = (
    Format(
        "pairs",
        "`prompt` (text or messages), `chosen` and `rejected`",
        ("prompt", "system", "chosen", "rejected", "tools"),
        (("chosen", "rejected"),),
        _fits_pairs,
        _as_it_is,
    ),
    Format(
        "dialogues",
        "`chosen` and `rejected`, each a whole conversation as messages",
        ("system", "chosen", "rejected", "tools"),
        (("chosen", "rejected"),),
        _fits_dialogues,
        _as_it_is,
    ),
    Format(
        "hh",
        "`chosen` and `rejected` as transcripts '\\n\\nHuman: ... \\n\\nAssistant: ...', with or without a `prompt`",
        ("prompt", "system", "chosen", "rejected"),
        (("chosen", "rejected"),),
        _fits_hh,
        _from_hh,
    ),
    Format(
        "implicit_text",
        "`chosen` and `rejected` as texts that begin with the same prompt",
        ("system", "chosen", "rejected"),
        (("chosen", "rejected"),),
        _fits_implicit_text,
        _from_implicit_text,
    ),
    Format(
        "alpaca",
        "`instruction` (and `input`, `history`, `system`) with `chosen` and `rejected`, or with a list `output` of two",
        ("instruction", "input", "history", "system", "chosen", "rejected", "output", "tools"),
        (("instruction", "chosen", "rejected"), ("instruction", "output")),
        _fits_alpaca,
        _from_alpaca,
    ),
    Format(
        "conversation",
        "`conversations` or `messages`, which `chosen` and `rejected` continue (ShareGPT, OpenAI)",
        ("conversation", "system", "chosen", "rejected", "tools"),
        (("conversation", "chosen", "rejected"),),
        _fits_conversation,
        _from_conversation,
    ),
    Format(
        "ranked",
        "`responses` with `scores` or `ranks`, or as objects with their own",
        ("prompt", "instruction", "input", "system", "responses", "scores", "ranks", "tools"),
        (("responses",),),
        _fits_ranked,
        _from_ranked,
    ),
    Format(
        "scored",
        "`response` and `score`, an answer a row, for `group_by: prompt`",
        ("prompt", "system", "response", "score", "scores", "tools"),
        (("response", "score"), ("response", "scores")),
        _fits_scored,
        _as_it_is,
    ),
)
BY_NAME = {entry.name: entry for entry in FORMATS}
ROLES = tuple(dict.fromkeys(role for entry in FORMATS for role in entry.roles))

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


# ---------------------------------------------------------------------------------------------------------------
# The reader of a split
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """What the config says of the columns of a source.

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
        row = _by_role(value, self._used)
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
    columns = _find_columns(label, rows, names, reading)
    if reading.format is not None:
        named = BY_NAME[reading.format]
        if not _has_needed(named, columns):
            raise DataError(
                f"{label}: has the columns {', '.join(names) or '(none)'}; `dataset_format: {named.name}` needs "
                f"{named.summary}. Say with `dataset_columns` which columns these are, or name another format"
            )
        return Reader([named], columns)
    fitting: Counter[tuple[str, ...]] = Counter()
    for value in rows:
        row = _by_role(value, columns)
        fitting[tuple(entry.name for entry in FORMATS if entry.fits(row))] += 1
    for several in (found for found in fitting if len(found) > 1):
        raise DataError(_ambiguous(label, several, f"{fitting[several]:,} of its first {len(rows):,} rows fit"))
    found = [entry for entry in FORMATS if (entry.name,) in fitting]
    others = [entry for entry in found if entry.name != "implicit_text"]
    found = others or found  # texts without a prompt are bad rows among others, and a format only by themselves
    found = [entry for entry in found if _has_needed(entry, columns)]
    if not found or (found[0].name == "implicit_text" and not _begin_alike(rows, columns)):
        raise DataError(_no_format(label, rows, names, columns))
    if len(found) > 1 and not _MIXABLE.issuperset(entry.name for entry in found):
        raise DataError(_ambiguous(label, [entry.name for entry in found], "its rows fit"))
    return Reader(found, columns)


def _find_columns(
    label: str, rows: Sequence[Mapping[str, Any]], names: Sequence[str], reading: Reading
) -> dict[str, str]:
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
    # Beside a pair, a column named `answers`, say, has something else in it.
    if columns.get("responses") not in (None, "responses", given.get("responses")) and not (
        {"chosen", "rejected"}.isdisjoint(columns)
    ):
        del columns["responses"]
    return columns


def _has_needed(entry: Format, columns: Mapping[str, str]) -> bool:
    return any(columns.keys() >= set(roles) for roles in entry.needs)


def _by_role(value: Mapping[str, Any], columns: Mapping[str, str]) -> Row:
    return {role: item for role, column in columns.items() if (item := value.get(column)) is not None}


def _begin_alike(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> bool:
    """Returns True if all rows that are two texts begin with the same words: by chance a few do."""
    texts = [row for value in rows if _fits_implicit_text(row := _by_role(value, columns))]
    for row in texts:
        try:
            _from_implicit_text(row)
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
        "`scores` or `ranks`, and `prompt` if the answers stand alone (docs/data-formats.md lists all formats)"
    )


def flag_fault(bad: BadRow) -> Row:
    """Makes the row of our columns that stands for a row that cannot be converted."""
    return {"fault": [bad.kind, bad.detail]}


def as_json(row: Row, column: str) -> str | None:
    """Writes a value of a row as JSON; None if it has none."""
    item = row.get(column)
    return None if item is None else json.dumps(item, default=str)
