"""Writes answers in context: what the chat template writes after the prompt, in a conversation with the answer.

Where the prompt ends is found in what the template itself writes. In order of preference that is

- the prompt with the template's generation prompt, which is what the model is given when it is asked: the assistant's
  header (`<|im_start|>assistant\\n`) then belongs to the prompt, and is not trained;
- the prompt alone, if the answer does not begin with that header (that of DeepSeek-R1 opens a thought);
- the prompt without the EOS that some templates (Phi-3's) write after every conversation, or without blanks at its end.

An answer ends with its EOS: a line end that the template writes after it is not trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal

from jax_simpo.data.messages import BadRow, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ChatRendering = Literal["auto", "in_context", "original"]
Spans = tuple[tuple[int, int], ...]

_MARK = "\ufdd0"  # stands for an answer. It is no character, so no text holds it
_SEARCHED = 1000  # characters before an answer in which the end of its prompt is looked for


@dataclass(frozen=True)
class Written:
    """A prompt and its answers as the chat template writes them, and the scored characters of each answer."""

    prompt: str
    answers: tuple[str, ...]
    scored: tuple[Spans, ...]


def write(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: list[Any] | None = None,
    *,
    header: bool = False,
    chat_template: str | None = None,
) -> str:
    """Writes a conversation with a chat template.

    Args:
        tokenizer: the tokenizer, whose template it is.
        messages: the turns.
        tools: the tools that the model may call.
        header: adds the template's generation prompt, which is what an answer begins with.
        chat_template: another template than the tokenizer's.
    """
    # Templates add text to `bos_token`, which would be undefined for a tokenizer without one.
    extra: dict[str, Any] = {"bos_token": ""} if tokenizer.bos_token is None else {}
    if tools:
        extra["tools"] = tools
    if chat_template is not None:
        extra["chat_template"] = chat_template
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=header, **extra)
    return str(text)


def write_in_context(
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[Message],
    answers: Sequence[list[Message]],
    tools: list[Any] | None = None,
    *,
    every_turn: bool = False,
) -> Written:
    """Writes the answers to a prompt in context.

    Args:
        tokenizer: the tokenizer, with its template.
        prompt: the turns of the prompt.
        answers: the turns of each answer.
        tools: the tools that the model may call.
        every_turn: every turn of the assistant in an answer is scored, not the last one alone.

    Raises:
        BadRow: it cannot be told where in the text a prompt or a turn ends.
    """
    wholes = [write(tokenizer, [*prompt, *answer], tools) for answer in answers]
    asked = all(answer[0]["role"] == "assistant" for answer in answers)
    starts = _ways_to_end(tokenizer, prompt, tools, header=asked)
    before = next((start for start in starts if start and all(map(_begins(start), wholes))), None)
    if before is None:
        return _write_apart(tokenizer, prompt, answers, wholes, tools)
    texts, scored = [], []
    for answer, whole in zip(answers, wholes, strict=True):
        text, shift = whole[len(before) :], len(before)
        spans = []
        for number, turn in enumerate(answer):
            last = number == len(answer) - 1
            if turn["role"] != "assistant" or not (every_turn or last):
                continue
            turns = [*prompt, *answer[:number]]
            start = _end_of(tokenizer, turns, whole, tools, header=True, last=last) - shift if number else 0
            stop = len(text)
            if not last:
                stop = _end_of(tokenizer, [*turns, turn], whole, tools, header=False, last=False) - shift
            spans.append((start, start + _end_of_answer(text[start:stop], before, tokenizer)))
        texts.append(text[: spans[-1][1]])
        scored.append(tuple(spans))
    return Written(once(before, tokenizer.bos_token), tuple(texts), tuple(scored))


def strip_bos(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Takes away the BOS that begins a text."""
    return text.removeprefix(tokenizer.bos_token) if tokenizer.bos_token else text


def once(text: str, bos: str | None) -> str:
    """Takes away every BOS that begins a text but the last."""
    while bos and text.startswith(bos + bos):
        text = text.removeprefix(bos)
    return text


def _begins(start: str) -> Any:
    return lambda whole: whole.startswith(start)


def _ways_to_end(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], tools: list[Any] | None, *, header: bool
) -> Iterator[str]:
    """Yields the texts that a conversation which goes on after these turns may begin with.

    `header`: the assistant's turn follows, so the first is the text with which the model is asked.
    """
    if header:
        yield write(tokenizer, turns, tools, header=True)
    alone = write(tokenizer, turns, tools)
    yield alone
    if tokenizer.eos_token:
        yield alone.removesuffix(tokenizer.eos_token)
    yield alone.rstrip()


def _end_of(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Message],
    whole: str,
    tools: list[Any] | None,
    *,
    header: bool,
    last: bool,
) -> int:
    """Returns where these turns end in the text of a conversation; `last`: one turn follows."""
    for start in _ways_to_end(tokenizer, turns, tools, header=header):
        if start and whole.startswith(start):
            return len(start)
    if turns[-1]["role"] == "assistant" and tokenizer.eos_token:  # the first template of Llama 3 goes on with a header
        head, eos, _ = write(tokenizer, turns, tools).rpartition(tokenizer.eos_token)
        if eos and whole.startswith(head + eos):
            return len(head + eos)
    if last and whole.startswith(start := _before_answer(tokenizer, turns, tools)):
        return len(start)
    raise BadRow(
        "refused by the chat template",
        f"it writes the first {len(turns)} turns otherwise where others follow, so that nobody knows which tokens are "
        "the assistant's: set `train_on: last_turn`, or another `chat_template`",
    )


def _before_answer(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], tools: list[Any] | None) -> str:
    """Returns what stands before the content of an answer that follows these turns."""
    text = write(tokenizer, [*turns, {"role": "assistant", "content": _MARK}], tools)
    if text.count(_MARK) != 1:
        raise BadRow("refused by the chat template", "it does not write the content of an answer once")
    return text.partition(_MARK)[0]


def _write_apart(
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[Message],
    answers: Sequence[list[Message]],
    wholes: list[str],
    tools: list[Any] | None,
) -> Written:
    """Writes answers for a template that writes the prompt otherwise before an answer than when the model is asked.

    Mistral's of the third version writes the system prompt before the last turn if that is the user's, so a
    conversation with an answer has none. The prompt is the one that the model is asked with.
    """
    asked = write(tokenizer, prompt, tools, header=True)
    before = _before_answer(tokenizer, prompt, tools)
    # The prompt ends where the text before the answer has most characters in common with the end of what is asked.
    ends = range(max(len(before) - _SEARCHED, 0), len(before) + 1)
    end = max(ends, key=lambda place: _common_end(before[:place], asked))
    # What they have in common holds the last turn; otherwise it may be a few characters in the middle of the prompt.
    own = asked[len(asked) - _common_end(before[:end], asked) :]
    known = not before or prompt[-1]["content"].strip() in own
    if not known or not all(map(_begins(before), wholes)) or any(len(answer) > 1 for answer in answers):
        raise BadRow(
            "refused by the chat template",
            "it writes the prompt otherwise where an answer follows, so that nobody knows where the answer begins: set "
            "another `chat_template`",
        )
    texts = [whole[end:] for whole in wholes]
    texts = [text[: _end_of_answer(text, asked, tokenizer)] for text in texts]
    return Written(once(asked, tokenizer.bos_token), tuple(texts), tuple(((0, len(text)),) for text in texts))


def _common_end(a: str, b: str) -> int:
    return sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(reversed(a), reversed(b), strict=False)))


def _end_of_answer(text: str, before: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns where the EOS of an answer ends, unless the template writes more after it than blanks.

    Some templates end every conversation with the header of an answer, so also where `before`, the prompt, ends with
    that.
    """
    eos = tokenizer.eos_token
    head, found, tail = text.rpartition(eos) if eos else ("", "", "")
    ends = found and (not tail.strip() or before.rstrip().endswith(tail.strip()))
    return len(head + found) if ends else len(text)
