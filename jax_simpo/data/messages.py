"""Reads the turns of a conversation from the values of a raw row, or raises `BadRow` with the reason."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]  # `role` and `content`, and where there are such `tool_calls`, `name` and `tool_call_id`
ROLES = ("system", "user", "assistant", "tool")
_TOOL_KEYS = ("tool_calls", "tool_call_id", "name")
_TEXT_PARTS = ("text", "input_text", "output_text")

# The roles in ShareGPT's messages, which are {"from", "value"}. A `function_call` is a call of a tool.
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "observation": "tool",
    "tool": "tool",
    "function_call": "assistant",
}

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


class BadRow(Exception):
    """A row that cannot be trained on. `kind` is one of a few phrases, for summaries; `detail` describes this row."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind
        self.detail = detail


def read_turns(value: Any, name: str) -> str | list[Message] | None:
    """Reads a value that is text, a message, a list of messages, or missing.

    A message is `{"role", "content"}`, or ShareGPT's `{"from", "value"}`.

    Args:
        value: the value as the data file has it.
        name: what the value is called in messages, such as `chosen`.

    Raises:
        BadRow: it is none of them, or a message is not as it should be.
    """
    if value is None or isinstance(value, str):
        check_text(value, f"`{name}`")
        return value
    if isinstance(value, dict):
        value = _listed(value, name)
    if not isinstance(value, list):
        raise BadRow("not a message list", f"`{name}` is {short(value)}, neither text nor a list of messages")
    return [_read_message(message, number, name) for number, message in enumerate(value)]


def _listed(value: dict[str, Any], name: str) -> Any:
    """Returns the list that a message by itself stands for, or messages that are stored by column."""
    for role, content in (("role", "content"), ("from", "value")):
        roles, contents = value.get(role), value.get(content)
        if isinstance(roles, list) and isinstance(contents, list):
            # Datasets on the hub store a `Sequence` of objects by column.
            if len(roles) != len(contents):
                raise BadRow("not a message list", f"`{name}` has {len(roles)} roles but {len(contents)} contents")
            return [{role: r, content: c} for r, c in zip(roles, contents, strict=True)]
        if isinstance(roles, str):
            return [value]
    return value


def _read_message(message: Any, number: int, name: str) -> Message:
    if isinstance(message, dict) and "role" not in message and "from" in message and "value" in message:
        message = _from_sharegpt(message, f"turn {number} of `{name}`")
    if not isinstance(message, dict) or "role" not in message or not ("content" in message or "tool_calls" in message):
        raise BadRow("not a message list", f"turn {number} of `{name}` is {short(message)}, not {{'role', 'content'}}")
    role = message["role"]
    if role not in ROLES:
        raise BadRow("wrong role", f"turn {number} of `{name}` has the role {role!r}, not {ROLES}")
    if role == "system" and number > 0:
        raise BadRow("wrong role", f"turn {number} of `{name}` is a system turn: only the first turn may be one")
    place = f"turn {number} of `{name}`"
    calls = message.get("tool_calls")
    if calls and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise BadRow("not a message list", f"{place} has {short(calls)} for `tool_calls`, not a list of calls")
    content = message.get("content")
    text = "" if content is None and calls else _read_content(content, place)
    # Other keys are dropped, and nulls: Arrow may add a null `tool_calls`, say, and templates would write it.
    more = {key: _without_nulls(message[key]) for key in _TOOL_KEYS if message.get(key)}
    return {"role": role, "content": text, **(more if calls or role == "tool" else {})}


def _from_sharegpt(message: dict[str, Any], place: str) -> dict[str, Any]:
    """Renames the keys and the role of a ShareGPT message; a `function_call` becomes a call of a tool."""
    role, value = message["from"], message["value"]
    if not isinstance(role, str) or role not in _SHAREGPT_ROLES:
        raise BadRow("wrong role", f"{place} is from {short(role)}, not from {', '.join(_SHAREGPT_ROLES)}")
    if role != "function_call":
        return {"role": _SHAREGPT_ROLES[role], "content": value}
    try:
        calls = json.loads(value)
    except (ValueError, TypeError, RecursionError) as error:
        raise BadRow("wrong tools", f"{place} is a `function_call` that is no JSON ({error})") from error
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise BadRow("wrong tools", f"{place} is a `function_call` without a `name`: {short(value)}")
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": c} for c in calls]}


def _read_content(content: Any, place: str) -> str:
    """Reads the content of a message: text, or a list of parts that are text."""
    if isinstance(content, list):
        texts = [_read_part(part, place) for part in content]
        content = "".join(texts)
    if not isinstance(content, str):
        raise BadRow("not a message list", f"{place} has {short(content)} for content")
    check_text(content, place)
    return content


def _read_part(part: Any, place: str) -> str:
    kind = part.get("type", "text") if isinstance(part, dict) else "text"
    if kind not in _TEXT_PARTS:
        raise BadRow("not text", f"{place} has a part of the type {kind!r}; only text can be trained on")
    text = part.get("text") if isinstance(part, dict) else part
    if not isinstance(text, str):
        raise BadRow("not a message list", f"{place} has {short(part)} for a part of its content")
    return text


def _without_nulls(value: Any) -> Any:
    """Drops the nulls that Arrow puts where objects of a column have different keys."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def check_tool_turns(turns: Sequence[Message], name: str) -> None:
    """Raises BadRow if a tool's turn follows no call of a tool."""
    for number, turn in enumerate(turns):
        before = turns[number - 1] if number else {"role": "nobody"}
        if turn["role"] == "tool" and before["role"] != "tool" and not before.get("tool_calls"):
            raise BadRow(
                "tool turn without a call",
                f"turn {number} of {name} is a tool's, and the turn before it has no `tool_calls`",
            )


def parse_hh(text: str) -> list[Message] | None:
    """Parses HH-RLHF's text form into turns; returns None for any other text."""
    head, *parts = _HH_TURN.split("\n\n" + text.lstrip())
    if head or not parts or parts[0] != "Human":
        return None
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": _HH_ROLES[speaker], "content": content.strip()} for speaker, content in turns]


def check_text(text: str | None, place: str) -> None:
    """Raises BadRow if text holds what no UTF-8 can."""
    if text is not None and not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadRow("broken text", f"{place} holds half of a Unicode surrogate pair") from error


def short(value: Any, most: int = 60) -> str:
    """Returns a value as Python writes it, cut to what fits a message."""
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."
