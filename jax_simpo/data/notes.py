"""Collects what the user should know of a tokenised split: bad rows, text that was cut, how answers are rendered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, NamedTuple

SpecialTokensInMessages = Literal["text", "tokens"]

_SHOWN_ROWS = 5  # rows of one kind that are named beside the first


@dataclass(frozen=True)
class Skipped:
    """A row that cannot be used: its number in the raw split, and the `kind` and `detail` of its `BadRow`."""

    index: int
    kind: str
    detail: str

    @property
    def reason(self) -> str:
        return f"{self.kind}: {self.detail}"


class SpecialText(NamedTuple):
    """The messages of a split that hold the text of a special token.

    Attributes:
        messages: how many they are.
        row: the row of the first.
        token: the token that it spells.
        read_as: "text" if they are read as they stand, "tokens" if what they spell becomes that token.
    """

    messages: int
    row: int
    token: str
    read_as: SpecialTokensInMessages


@dataclass
class Cuts:
    """Counts what `max_length` has cut.

    Attributes:
        groups: groups of which anything was cut.
        prompts: groups of which a prompt was cut.
        responses: responses that lost tokens, and with them their EOS.
        all_responses: responses of all groups.
        longest: tokens of the longest prompt with its response, before cutting.
        row: the row it is in.
        max_length: the limit.
    """

    groups: int = 0
    prompts: int = 0
    responses: int = 0
    all_responses: int = 0
    longest: int = 0
    row: int = 0
    max_length: int = 0

    def add(self, other: Cuts) -> None:
        """Adds what was cut of other groups, which come later."""
        if other.longest > self.longest:
            self.longest, self.row, self.max_length = other.longest, other.row, other.max_length
        for name in ("groups", "prompts", "responses", "all_responses"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass
class Notes:
    """Collects what the user should know of the rows of a split.

    Attributes:
        skipped: the rows that cannot be used.
        left_out: how many responses were left out of groups, by reason.
        special_text: the messages that hold the text of a special token; None if there are none.
        cuts: what `max_length` has cut.
        in_context: groups that were rendered in context although the others were rendered as in the original.
        shortened: responses in which the chat template left out a part of what the answer says.
        rendering: how answers are rendered, a sentence each; empty where there is nothing to say.
    """

    skipped: list[Skipped] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    special_text: SpecialText | None = None
    cuts: Cuts = field(default_factory=Cuts)
    in_context: int = 0
    shortened: int = 0
    rendering: list[str] = field(default_factory=list)

    def add(self, other: Notes) -> None:
        """Adds the notes on other rows, which come later."""
        self.skipped += other.skipped
        self.left_out.update(other.left_out)
        if other.special_text is not None:
            first = self.special_text or other.special_text._replace(messages=0)
            self.special_text = first._replace(messages=first.messages + other.special_text.messages)
        self.cuts.add(other.cuts)
        self.in_context += other.in_context
        self.shortened += other.shortened
        self.rendering += other.rendering

    def to_json(self) -> dict[str, Any]:
        """Returns the notes as JSON has them."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {**values, "skipped": [asdict(row) for row in self.skipped], "cuts": asdict(self.cuts)}

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> Notes:
        """Makes notes of what `to_json` has returned."""
        special = values["special_text"]
        return cls(
            [Skipped(**row) for row in values["skipped"]],
            Counter(values["left_out"]),
            None if special is None else SpecialText(*special),
            Cuts(**values["cuts"]),
            values["in_context"],
            values["shortened"],
            list(values["rendering"]),
        )


def rows_by_kind(
    skipped: list[Skipped], place: Callable[[int], str], origin: Callable[[int], tuple[str, int]]
) -> list[str]:
    """Lists skipped rows, a line for each kind: the first of its rows in full, and the numbers of some others.

    Args:
        skipped: the rows.
        place: names the place of a row.
        origin: gives the file of a row and its number there.
    """
    kinds: dict[str, list[Skipped]] = {}
    for row in skipped:
        kinds.setdefault(row.kind, []).append(row)
    lines = []
    for first, *others in kinds.values():
        line = f"  {place(first.index)}: {first.reason}"
        if others:
            near = [row for row in others[:_SHOWN_ROWS] if origin(row.index)[0] == origin(first.index)[0]]
            named = ", ".join(str(origin(row.index)[1]) for row in near)
            more = f"{len(others) - len(near):,} more" if len(others) > len(near) else ""
            rows = " and ".join(filter(None, [f"row{'s' * (len(near) > 1)} {named}" if near else "", more]))
            line += f" ({len(others) + 1:,} of this kind, also {rows})"
        lines.append(line)
    return lines


# --- in sentences


def special_summary(notes: Notes, place: Callable[[int], str]) -> str:
    """Counts the messages that hold the text of a special token, in one line; empty if there are none."""
    if notes.special_text is None:
        return ""
    count, row, token, read_as = notes.special_text
    hold = "1 message holds" if count == 1 else f"{count:,} messages hold"
    key = "special_tokens_in_messages"
    meaning = {
        "text": f"it is read as ordinary text (`{key}: tokens` would make it that token)",
        "tokens": f"it becomes that token (`{key}: text` would read it as it stands)",
    }
    return f"{hold} the text of a special token, such as {token} in {place(row)}; {meaning[read_as]}"


def cuts_summary(cuts: Cuts, noun: str, total: int, place: Callable[[int], str]) -> str:
    """Says how much `max_length` has cut, and with which value it cuts nothing, in one line; empty if nothing was cut.

    Args:
        cuts: what was cut.
        noun: what groups are called: "pairs" or "groups".
        total: the number of groups.
        place: names the place of a row.
    """
    if not cuts.groups:
        return ""
    what = [f"the prompts of {cuts.prompts:,}"] if cuts.prompts else []
    if cuts.responses:
        what.append(f"{cuts.responses:,} of {cuts.all_responses:,} responses, which lose their end and its EOS")
    return (
        f"`max_length: {cuts.max_length}` cuts {cuts.groups:,} of {total:,} {noun}: {' and '.join(what)}; the longest "
        f"prompt with its response has {cuts.longest:,} tokens ({place(cuts.row)}), and `max_length: {cuts.longest}` "
        "would cut nothing"
    )


def rendering_summary(notes: Notes, noun: str) -> str:
    """Says how answers were rendered where not as in the original, in one line; otherwise empty."""
    sentences = list(notes.rendering)
    if notes.in_context:
        some = f"1 {noun[:-1]} is" if notes.in_context == 1 else f"{notes.in_context:,} {noun} are"
        sentences.append(
            f"{some} rendered in context, unlike the others, because the chat template writes the answers otherwise by "
            "themselves than after their prompts"
        )
    if notes.shortened:
        sentences.append(
            f"the chat template leaves out a part of {notes.shortened:,} answers, such as their thoughts, which is not "
            "trained; `inspect` shows what is"
        )
    return "; ".join(sentences)
