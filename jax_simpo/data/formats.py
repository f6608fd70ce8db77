"""The formats of preference data: how each is recognised, and how a row of it becomes a row of our columns.

Data sets name the same things differently, so a format is written in *roles*, such as `prompt` or `chosen`; a role is
found in the column of that name, in one of its other names (`ALIASES`), or where the config's `dataset_columns` says.

Which format a split has says `detection`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jax_simpo.data.messages import BadRow, parse_hh, short

Row = dict[str, Any]
"""The values of a row by role; without those that are missing."""

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
    """Returns True for HH's text, or a list of such texts."""
    texts = value if isinstance(value, list) else [value]
    return bool(texts) and all(isinstance(text, str) and parse_hh(text) is not None for text in texts)


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


def fits_implicit_text(row: Row) -> bool:
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


def from_implicit_text(row: Row) -> Row:
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
        fits_implicit_text,
        from_implicit_text,
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
