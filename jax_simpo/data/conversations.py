"""Reads a raw row as a prompt and its ranked answers, in any of the accepted forms, or raises `BadRow`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jax_simpo.data.messages import BadRow, Message, check_text, check_tool_turns, parse_hh, read_turns, short
from jax_simpo.data.ranking import GroupSettings, is_number, rank_answers, read_scores

_TEXT_KEYS = ("response", "answer", "completion", "text", "content")  # of an answer that is an object
_SCORE_KEYS = ("score", "overall_score")
_PAIR = ["chosen", "rejected"]


@dataclass(frozen=True)
class Conversation:
    """The turns of the prompt, which all answers follow, and the answers, best first.

    Attributes:
        prompt: the turns of the prompt.
        answers: the turns of each answer.
        ranks: the rank of each answer, from 0; equal for tied answers.
        scores: the score of each answer; None if the row has none.
        tools: the tools that the model may call, as the chat template takes them.
        left_out: how many answers were left out, by reason.
    """

    prompt: list[Message]
    answers: tuple[list[Message], ...]
    ranks: tuple[int, ...]
    scores: tuple[float, ...] | None = None
    tools: list[Any] | None = None
    left_out: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Row:
    """A row as the data has it: its prompt and its answers, in the order of the file.

    Attributes:
        prompt: the turns of the prompt.
        answers: the turns of each answer.
        names: what each answer is called in messages.
        scores: the scores, higher is better; None without.
        ranks: the ranks, lower is better; None without.
        tools: the tools that the model may call.
    """

    prompt: list[Message]
    answers: list[list[Message]]
    names: list[str]
    scores: list[float] | None
    ranks: list[float] | None
    tools: list[Any] | None

    @property
    def is_pair(self) -> bool:
        """True for one chosen and one rejected answer."""
        return self.names == _PAIR

    @property
    def key(self) -> str:
        """A text that is the same for rows of the same prompt."""
        return json.dumps([self.prompt, self.tools], sort_keys=True)


@dataclass(frozen=True)
class Answers:
    """The values of the answers of a row, and what is known of them; see `Row`."""

    values: list[str | list[Message]]
    names: list[str]
    scores: list[float] | None = None
    ranks: list[float] | None = None


def read_row(row: Mapping[str, Any]) -> Row:
    """Reads a row in any of the accepted forms.

    The answers are `chosen` and `rejected`, each of them one answer or a list of such; or `responses` with `scores` or
    `ranks` (`read_answers`). And

    - they are message lists that begin with the prompt's turns: the answers are what follows where they part;
    - `prompt` is a message list, and they are the turns (or the text) after it;
    - `prompt` and they are text: a user turn and assistant turns;
    - they are whole dialogues in HH-RLHF's text form `\\n\\nHuman: ...\\n\\nAssistant: ...`.

    Text in `system` becomes the system turn before the prompt.

    Raises:
        BadRow: the row has none of these forms, or cannot be trained on.
    """
    if fault := row.get("fault"):
        raise BadRow(*fault)
    prompt = read_turns(row.get("prompt"), "prompt")
    answers = read_answers(row)
    if prompt == []:
        raise BadRow("no prompt", "`prompt` is an empty list: give its turns, or drop the `prompt` column")
    if isinstance(prompt, list):
        turns = [_answer_turns(value) for value in answers.values]
        for name, answer in zip(answers.names, turns, strict=True):
            if answer[: len(prompt)] == prompt:
                raise BadRow(
                    "prompt repeated",
                    f"`{name}` begins with the turns of `prompt` again: keep the answer alone, or drop the `prompt` "
                    "column",
                )
    else:
        prompt, turns = _read_without_prompt_turns(prompt, answers)
    prompt = _with_system(row.get("system"), prompt)
    read = Row(prompt, turns, answers.names, answers.scores, answers.ranks, _read_tools(row.get("tools")))
    _check_turns(read)
    return read


def read_conversation(row: Mapping[str, Any]) -> Conversation:
    """Reads a row that is a group by itself, and keeps all its answers; see `read_row`."""
    return make_conversation([read_row(row)], GroupSettings())


def make_conversation(rows: Sequence[Row], settings: GroupSettings) -> Conversation:
    """Ranks the answers of a row, or of several rows of the same prompt.

    Of several rows, those that have scores are ranked by them all. Pairs are ranked as two ties: what any row chose,
    and what any row rejected.

    Raises:
        BadRow: the answers cannot be ranked, or nothing is left to compare.
    """
    first = rows[0]
    answers = [answer for row in rows for answer in row.answers]
    have_scores = [row.scores is not None for row in rows]
    if any(have_scores) and not all(have_scores):
        raise BadRow("no scores", "some rows of the prompt have scores and some have none, so they cannot be ranked")
    if len(rows) > 1 and not have_scores[0]:
        if not all(set(row.ranks or ()) == {0.0, 1.0} for row in rows):
            raise BadRow(
                "no scores", "several rows of the prompt have `ranks`, which do not compare them: give `scores`"
            )
        sides: dict[str, float] = {}
        for row in rows:
            for answer, rank in zip(row.answers, row.ranks or (), strict=True):
                if sides.setdefault(json.dumps(answer, sort_keys=True), rank) != rank:
                    raise BadRow(
                        "chosen and rejected", "an answer is chosen in one row of the prompt and rejected in another"
                    )
    scores = [score for row in rows for score in row.scores or ()] if have_scores[0] else None
    ranks = None if scores is not None else [rank for row in rows for rank in row.ranks or ()]
    ranked = rank_answers(answers, scores, ranks, settings)
    return Conversation(
        first.prompt,
        tuple(answers[place] for place in ranked.answers),
        ranked.ranks,
        ranked.scores,
        first.tools,
        ranked.left_out,
    )


def read_answers(row: Mapping[str, Any]) -> Answers:
    """Reads the answers of a row.

    `responses` is a list of answers; `scores` (higher is better) or `ranks` (lower is better) has a number for each. Or
    each is an object with its text (`response`, `answer`, `completion` or `text`) and its `score`, `overall_score` or
    `rank`, as in the files of UltraFeedback and Nectar. `response` beside `score` is a single answer, for
    `group_by: prompt`.

    Raises:
        BadRow: there are none, or their scores or ranks are wrong.
    """
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if row.get("responses") is None and row.get("response") is None:
        if chosen is None or rejected is None:
            raise BadRow("missing value", f"the row has no `{'chosen' if chosen is None else 'rejected'}`")
        return _read_chosen_and_rejected(chosen, rejected)
    if chosen is not None or rejected is not None:
        raise BadRow("two forms", "the row has `chosen` or `rejected` beside `responses`: remove one of them")
    if row.get("responses") is None:
        return _answers([row["response"]], ["response"], row.get("score"), None)
    return _read_responses(row)


def _read_responses(row: Mapping[str, Any]) -> Answers:
    responses = row["responses"]
    if not isinstance(responses, list):
        raise BadRow("not a list", f"`responses` is {short(responses)}; expected a list of answers")
    if not responses:
        raise BadRow("one answer", "`responses` is an empty list; a preference needs two answers")
    scores, ranks = row.get("scores"), row.get("ranks")
    if responses and all(isinstance(item, dict) and "role" not in item for item in responses):
        texts = [next((item[key] for key in _TEXT_KEYS if item.get(key) is not None), None) for item in responses]
        own_scores = [next((item[key] for key in _SCORE_KEYS if item.get(key) is not None), None) for item in responses]
        own_ranks = [item.get("rank") for item in responses]
        scores = scores if scores is not None or all(x is None for x in own_scores) else own_scores
        ranks = ranks if ranks is not None or all(x is None for x in own_ranks) else own_ranks
        responses = texts
    names = [f"responses[{number}]" for number in range(len(responses))]
    values = [[item] if isinstance(item, dict) else item for item in responses]
    if scores is None and ranks is None:
        raise BadRow("no scores", "the row has `responses` but neither `scores` nor `ranks`")
    if scores is not None and ranks is not None:
        raise BadRow("two forms", "the row has `scores` beside `ranks`: remove one of them")
    return _answers(values, names, scores, ranks)


def _read_chosen_and_rejected(chosen: Any, rejected: Any) -> Answers:
    better, worse = (_several(value) for value in (chosen, rejected))
    if better is None and worse is None:
        return _answers([chosen, rejected], ["chosen", "rejected"], None, [0.0, 1.0])
    better, worse = ([value] if many is None else many for value, many in ((chosen, better), (rejected, worse)))
    names = [f"{name}[{n}]" for name, many in (("chosen", better), ("rejected", worse)) for n in range(len(many))]
    if not better or not worse:
        raise BadRow("empty response", f"`{'chosen' if not better else 'rejected'}` is an empty list")
    return _answers([*better, *worse], names, None, [0.0] * len(better) + [1.0] * len(worse))


def _several(value: Any) -> list[Any] | None:
    """Returns the answers of a value that is a list of several; None for a single answer."""
    return value if isinstance(value, list) and value and isinstance(value[0], str | list) else None


def _answers(values: Sequence[Any], names: list[str], scores: Any, ranks: Any) -> Answers:
    turns = [read_turns(value, name) for value, name in zip(values, names, strict=True)]
    read: list[str | list[Message]] = []
    for value, name in zip(turns, names, strict=True):
        if value is None:
            raise BadRow("missing value", f"`{name}` is missing")
        read.append(value)
    if isinstance(scores, int | float) and names == ["response"]:
        scores = [scores]
    return Answers(
        read,
        names,
        None if scores is None else read_scores(scores, "scores", len(read)),
        None if ranks is None else read_scores(ranks, "ranks", len(read)),
    )


def read_weight(value: Any, column: str) -> float:
    """Reads the weight of a group.

    Raises:
        BadRow: it is no number >= 0.
    """
    if not is_number(value) or value < 0:
        shown = "missing" if value is None else short(value)
        raise BadRow("wrong weight", f"`{column}` is {shown}; expected a number >= 0, of at most 3.4e38")
    return float(value)


def _with_system(system: Any, prompt: list[Message]) -> list[Message]:
    """Puts the text of the column `system` before the turns of the prompt."""
    if system is None or system == "" or not prompt:  # without a prompt the row is refused for that
        return prompt
    if not isinstance(system, str):
        raise BadRow("wrong system message", f"`system` is {short(system)}; expected text")
    check_text(system, "`system`")
    turn = {"role": "system", "content": system}
    if prompt[0]["role"] != "system":
        return [turn, *prompt]
    if prompt[0] != turn:
        raise BadRow(
            "two system messages",
            f"`system` is {short(system)}, and the conversation begins with another system message: keep one of them",
        )
    return prompt


def _read_tools(tools: Any) -> list[Any] | None:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise BadRow("wrong tools", f"`tools` is text that is no JSON ({error})") from error
    if tools is not None and not isinstance(tools, list):
        raise BadRow("wrong tools", f"`tools` is {short(tools)}; expected a list of tools")
    return tools or None


def _read_without_prompt_turns(prompt: str | None, answers: Answers) -> tuple[list[Message], list[list[Message]]]:
    """Reads a row whose prompt is text or missing."""
    values = answers.values
    if all(isinstance(value, str) for value in values):
        parsed = [parse_hh(value) for value in values if isinstance(value, str)]
        if all(parsed):
            values = [turns for turns in parsed if turns]
    text = prompt if prompt and prompt.strip() else None
    answers_alone = all(isinstance(value, str) or len(value) == 1 for value in values)
    if answers_alone and text is not None:
        return _prompt_turns(text), [_answer_turns(value) for value in values]
    dialogues = [value for value in values if not isinstance(value, str)]
    if len(dialogues) < len(values):
        raise BadRow(
            "no prompt",
            f"{_names(answers)} is plain text, there is no `prompt`, and it does not read "
            "'\\n\\nHuman: ...\\n\\nAssistant: ...': add a `prompt` column",
        )
    # A text prompt beside whole dialogues (UltraFeedback) only repeats their first user turn: the original ignores it.
    shared = _shared_turns(dialogues)
    if not shared and any(len(dialogue) > 1 for dialogue in dialogues):
        raise BadRow("prompts differ", f"the first turn is not the same in {_names(answers, 'and')}")
    return dialogues[0][:shared], [dialogue[shared:] for dialogue in dialogues]


def _shared_turns(dialogues: Sequence[list[Message]]) -> int:
    """Counts the turns before the first in which dialogues part; each keeps at least its last turn."""
    most = min(len(dialogue) for dialogue in dialogues) - 1
    first = dialogues[0]
    return next((n for n in range(most) if any(other[n] != first[n] for other in dialogues[1:])), max(most, 0))


def _names(answers: Answers, word: str = "or") -> str:
    return f"`chosen` {word} `rejected`" if answers.names == _PAIR else "an answer" if word == "or" else "all answers"


def _prompt_turns(text: str) -> list[Message]:
    turns = parse_hh(text)
    if turns and turns[-1] == {"role": "assistant", "content": ""}:  # '...\n\nAssistant:', before the answer
        return turns[:-1]
    return [{"role": "user", "content": text}]


def _answer_turns(value: str | list[Message]) -> list[Message]:
    return [{"role": "assistant", "content": value}] if isinstance(value, str) else value


def _check_turns(row: Row) -> None:
    for name, answer in zip(row.names, row.answers, strict=True):
        if not answer:
            raise BadRow("empty response", f"`{name}` has no turns")
        last = answer[-1]
        if last["role"] != "assistant":
            raise BadRow("last turn not assistant", f"`{name}` ends with a turn of the {last['role']}")
        after_answer = bool(row.prompt) and row.prompt[-1]["role"] == "assistant"
        if answer[0]["role"] != "assistant" and not after_answer:
            raise BadRow("wrong role", f"the answer in `{name}` begins with a turn of the {answer[0]['role']}")
        if not last["content"].strip() and not last.get("tool_calls"):
            raise BadRow("empty response", f"the last turn of `{name}` is blank")
    if not row.prompt:
        raise BadRow("no prompt", "there is no turn before the answer")
    for name, answer in zip(row.names, row.answers, strict=True):
        check_tool_turns([*row.prompt, *answer], f"the conversation with `{name}`")
    if row.is_pair and row.answers[0] == row.answers[1]:
        raise BadRow("chosen = rejected", "the two answers are the same, so there is nothing to prefer")
