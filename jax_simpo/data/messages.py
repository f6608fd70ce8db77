"""Reads a raw row as the turns of its prompt and of its two answers, or raises `BadRow` with the reason."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Message = dict[str, str]
ROLES = ("system", "user", "assistant")

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


class BadRow(Exception):
    """A row that cannot be trained on. `kind` is one of a few phrases, for summaries; `detail` describes this row."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind
        self.detail = detail


@dataclass(frozen=True)
class Conversation:
    """The turns of the prompt, which both answers follow, and the turns of each answer."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]


def read_conversation(row: Mapping[str, Any]) -> Conversation:
    """Reads a row in any of the accepted forms.

    - `chosen` and `rejected` are message lists that begin with the prompt's turns: the last turn is the answer;
    - `prompt` is a message list, `chosen` and `rejected` are the turns (or the text) after it;
    - `prompt`, `chosen` and `rejected` are text: a user turn and assistant turns;
    - `chosen` and `rejected` are whole dialogues in HH-RLHF's text form `\\n\\nHuman: ...\\n\\nAssistant: ...`.

    Raises:
        BadRow: the row has none of these forms, or cannot be trained on.
    """
    prompt = _read_value(row.get("prompt"), "prompt")
    chosen = _read_value(row.get("chosen"), "chosen")
    rejected = _read_value(row.get("rejected"), "rejected")
    if chosen is None or rejected is None:
        raise BadRow("missing value", f"the row has no `{'chosen' if chosen is None else 'rejected'}`")
    if prompt == []:
        raise BadRow("no prompt", "`prompt` is an empty list: give its turns, or drop the `prompt` column")
    if isinstance(prompt, list):
        turns = Conversation(prompt, _answer_turns(chosen), _answer_turns(rejected))
        if turns.chosen[: len(prompt)] == prompt:
            raise BadRow(
                "prompt repeated",
                "`chosen` begins with the turns of `prompt` again: keep the answer alone, or drop the `prompt` column",
            )
    else:
        turns = _read_without_prompt_turns(prompt, chosen, rejected)
    _check_turns(turns)
    return turns


def read_weight(value: Any, column: str) -> float:
    """Reads the weight of a pair.

    Raises:
        BadRow: it is no number >= 0.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        shown = "missing" if value is None else _short(value)
        raise BadRow("wrong weight", f"`{column}` is {shown}; expected a number >= 0")
    return float(value)


def _read_without_prompt_turns(
    prompt: str | None, chosen: str | list[Message], rejected: str | list[Message]
) -> Conversation:
    """Reads a row whose prompt is text or missing."""
    if isinstance(chosen, str) and isinstance(rejected, str):
        chosen_turns, rejected_turns = parse_hh(chosen), parse_hh(rejected)
        if chosen_turns and rejected_turns:
            chosen, rejected = chosen_turns, rejected_turns
    text = prompt if prompt and prompt.strip() else None
    answers_alone = all(isinstance(answer, str) or len(answer) == 1 for answer in (chosen, rejected))
    if answers_alone and text is not None:
        return Conversation(_prompt_turns(text), _answer_turns(chosen), _answer_turns(rejected))
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise BadRow(
            "no prompt",
            "`chosen` or `rejected` is plain text, there is no `prompt`, and it does not read "
            "'\\n\\nHuman: ...\\n\\nAssistant: ...': add a `prompt` column",
        )
    # A text prompt beside whole dialogues (UltraFeedback) only repeats their first user turn: the original ignores it.
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("prompts differ", _describe_difference(chosen[:-1], rejected[:-1]))
    return Conversation(chosen[:-1], chosen[-1:], rejected[-1:])


def parse_hh(text: str) -> list[Message] | None:
    """Parses HH-RLHF's text form into turns; returns None for any other text."""
    head, *parts = _HH_TURN.split("\n\n" + text.lstrip())
    if head or not parts or parts[0] != "Human":
        return None
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": _HH_ROLES[speaker], "content": content.strip()} for speaker, content in turns]


def _prompt_turns(text: str) -> list[Message]:
    turns = parse_hh(text)
    if turns and turns[-1] == {"role": "assistant", "content": ""}:  # '...\n\nAssistant:', before the answer
        return turns[:-1]
    return [{"role": "user", "content": text}]


def _answer_turns(value: str | list[Message]) -> list[Message]:
    return [{"role": "assistant", "content": value}] if isinstance(value, str) else value


def _read_value(value: Any, name: str) -> str | list[Message] | None:
    if value is None or isinstance(value, str):
        _check_text(value, name)
        return value
    if isinstance(value, dict) and isinstance(value.get("role"), list) and isinstance(value.get("content"), list):
        # Datasets on the hub store a `Sequence` of objects by column.
        roles, contents = value["role"], value["content"]
        if len(roles) != len(contents):
            raise BadRow("not a message list", f"`{name}` has {len(roles)} roles but {len(contents)} contents")
        value = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
    if not isinstance(value, list):
        raise BadRow("not a message list", f"`{name}` is {_short(value)}, neither text nor a list of messages")
    messages = []
    for number, message in enumerate(value):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise BadRow(
                "not a message list", f"turn {number} of `{name}` is {_short(message)}, not {{'role', 'content'}}"
            )
        if message["role"] not in ROLES:
            raise BadRow("wrong role", f"turn {number} of `{name}` has the role {message['role']!r}, not {ROLES}")
        if message["role"] == "system" and number > 0:
            raise BadRow("wrong role", f"turn {number} of `{name}` is a system turn: only the first turn may be one")
        content = message["content"]
        if not isinstance(content, str):
            raise BadRow("not a message list", f"turn {number} of `{name}` has {_short(content)} for content")
        _check_text(content, f"turn {number} of `{name}`")
        # Other keys are dropped: Arrow may add a null `tool_calls`, say, which would change what templates write.
        messages.append({"role": message["role"], "content": content})
    return messages


def _check_turns(turns: Conversation) -> None:
    for name, answer in (("chosen", turns.chosen), ("rejected", turns.rejected)):
        if not answer:
            raise BadRow("empty response", f"`{name}` has no turns")
        if answer[-1]["role"] != "assistant":
            raise BadRow("last turn not assistant", f"`{name}` ends with a turn of the {answer[-1]['role']}")
        if answer[0]["role"] != "assistant":
            raise BadRow("wrong role", f"the answer in `{name}` begins with a turn of the {answer[0]['role']}")
        if not answer[-1]["content"].strip():
            raise BadRow("empty response", f"the last turn of `{name}` is blank")
    if not turns.prompt:
        raise BadRow("no prompt", "there is no turn before the answer")
    if turns.chosen == turns.rejected:
        raise BadRow("chosen = rejected", "the two answers are the same, so there is nothing to prefer")


def _check_text(text: str | None, name: str) -> None:
    if text is not None and not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadRow("broken text", f"{name} holds half of a Unicode surrogate pair") from error


def _describe_difference(chosen: list[Message], rejected: list[Message]) -> str:
    if len(chosen) != len(rejected):
        return f"`chosen` has {len(chosen)} turns before the answer, `rejected` {len(rejected)}"
    number = next(i for i, (a, b) in enumerate(zip(chosen, rejected, strict=True)) if a != b)
    return f"turn {number} is not the same in `chosen` and `rejected`"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
