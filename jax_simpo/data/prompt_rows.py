"""Reads the prompt of a row that a model is to answer, in every format in which training reads prompts.

A row may have answers, as preference pairs do, or none. Each row is read as training reads a data set that has this row
alone, so a file may mix formats.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jax_simpo.data import conversations
from jax_simpo.data.detection import Reader, Reading, by_role, find_columns, has_needed
from jax_simpo.data.formats import ALIASES, BY_NAME, FORMATS, Format, Row
from jax_simpo.data.messages import BadRow, Message

_ANSWER_ROLES = ("chosen", "rejected", "output", "responses", "response", "scores", "score", "ranks")
_ANSWER_COLUMNS = frozenset(name for role in _ANSWER_ROLES for name in ALIASES[role])
# Every format has answers, so a row without any is read beside two that nobody gets to see.
_STAND_INS = {"chosen": "a", "rejected": "b"}
# Role -> the format that reads a prompt from it.
_PROMPT_ROLES = {"prompt": "pairs", "instruction": "alpaca", "conversation": "conversation"}


@dataclass(frozen=True)
class PromptRow:
    """The prompt of a row.

    Attributes:
        given: the value of its column; its turns if it is made of several columns, or was found in the answers.
        turns: its turns, as training reads them.
        tools: the tools that the model may call.
        unused: the columns that have a value and are not read, but for those of answers.
        implicit: True if it is what the texts of two answers begin with.
    """

    given: Any
    turns: list[Message]
    tools: list[Any] | None
    unused: tuple[str, ...]
    implicit: bool


def read_prompt_row(value: Mapping[str, Any], names: Iterable[str] = ()) -> PromptRow:
    """Reads the prompt of a row.

    Args:
        value: the row.
        names: all columns of its file if `value` does not show them all.

    Raises:
        BadRow: there is no prompt in it, or several, or it cannot be read.
    """
    names = list(names or value)
    columns = _columns(value)
    entry = _format_with_answers(by_role(value, columns), columns)
    read = value
    if entry is None:
        read = {name: item for name, item in value.items() if name not in _ANSWER_COLUMNS} | _STAND_INS
        columns = _columns(read)
        entry = _format_without_answers(by_role(read, columns), names)
    reader = Reader([entry], columns)
    found = _read(reader.read(read))
    layout = reader.layout("", names, None, 1)
    unused = (name for name in layout.unused if name not in _ANSWER_COLUMNS and value.get(name, "") is not None)
    parts = [column for role, column in layout.columns.items() if role not in (*_ANSWER_ROLES, "tools")]
    parts = [column for column in parts if value.get(column)]
    own = {layout.columns.get(role) for role in _PROMPT_ROLES}
    given = value[parts[0]] if len(parts) == 1 and parts[0] in own else found.prompt
    return PromptRow(given, found.prompt, found.tools, tuple(unused), entry.name == "implicit_text")


def _columns(value: Mapping[str, Any]) -> dict[str, str]:
    return find_columns("", [value], sorted(value), Reading())


def _format_with_answers(row: Row, columns: Mapping[str, str]) -> Format | None:
    """Returns the format of a row with its answers, as training finds it; None if it is in none."""
    fitting = [entry for entry in FORMATS if entry.fits(row)]
    if len(fitting) > 1:
        raise _ambiguous(fitting)
    return next((entry for entry in fitting if has_needed(entry, columns)), None)


def _format_without_answers(row: Row, names: Sequence[str]) -> Format:
    """Returns the format of the prompt of a row beside the stand-ins for answers."""
    there = [BY_NAME[name] for role, name in _PROMPT_ROLES.items() if role in row]
    fitting = [entry for entry in there if entry.fits(row)] or there
    if len(fitting) > 1:
        raise _ambiguous(fitting)
    if not fitting:
        known = ", ".join(f"`{name}`" for role in _PROMPT_ROLES for name in ALIASES[role])
        has = f"the columns {', '.join(names)}, and" if names else "no columns:"
        raise BadRow("no prompt", f"the row has {has} none of {known} with a value")
    return fitting[0]


def _ambiguous(entries: Sequence[Format]) -> BadRow:
    choices = "; ".join(f"`{entry.name}`: {entry.summary}" for entry in entries)
    return BadRow("several prompts", f"the row fits {len(entries)} formats ({choices}): keep the columns of one")


def _read(row: Row) -> conversations.Row:
    """Reads a row of our columns. Answers that cannot be read do not matter where the prompt stands by itself."""
    try:
        return conversations.read_row(row)
    except BadRow:
        prompt = row.get("prompt")
        if prompt is None:
            raise
        if not prompt or (isinstance(prompt, str) and not prompt.strip()):
            raise BadRow("no prompt", "the prompt is empty") from None
        return conversations.read_row({name: row.get(name) for name in ("prompt", "system", "tools")} | _STAND_INS)
