"""Reads prompts that a model is to answer, and writes them as the chat template does: the prompt and the header of an
answer.

A prompt is text, or a list of messages whose last one is not the assistant's, or a row in any format in which training
reads prompts (`prompt_rows`). A row of preference pairs is one too: its prompt is answered and its answers are left
alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_simpo.data import template_limits
from jax_simpo.data.chat import TOO_MUCH, reason_of
from jax_simpo.data.conversations import Conversation
from jax_simpo.data.in_context import once, write
from jax_simpo.data.messages import BadRow, Message, short
from jax_simpo.data.notes import SpecialTokensInMessages
from jax_simpo.data.prompt_rows import PromptRow, read_prompt_row
from jax_simpo.data.readers import RawRow, raw_rows
from jax_simpo.data.rendering import choose_rendering
from jax_simpo.data.special_text import SpecialTokens, StandIns
from jax_simpo.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOWN = 10  # bad prompts that a message lists


@dataclass(frozen=True)
class Prompt:
    """A prompt as it was given, and as the model reads it.

    Attributes:
        given: the text or the messages; its turns if several columns make it up, or it was found in the answers.
        turns: its turns.
        tools: the tools that the model may call.
        ids: the tokens of the rendered turns and of the header of an answer, int.
        unused: the columns of its row that have a value and are not read, but for those of answers.
    """

    given: Any
    turns: list[Message]
    tools: list[Any] | None
    ids: list[int]
    unused: tuple[str, ...] = ()


def read_prompts(path: Path, encoder: PromptEncoder) -> list[Prompt]:
    """Reads the prompts of a file, by its extension; lines of JSON if that is none of a data file.

    Args:
        path: the file.
        encoder: makes token ids of them.

    Raises:
        DataError: the file cannot be read, is empty or broken, or a row cannot be used.
    """
    return _make(str(path), _rows_of(path), encoder)


def make_prompts(name: str, prompts: Iterable[Any], encoder: PromptEncoder) -> list[Prompt]:
    """Makes prompts of texts, lists of messages, or rows as a file has them; see `read_prompts`.

    Args:
        name: what the prompts are called in messages.
        prompts: the prompts.
        encoder: makes token ids of them.
    """
    if isinstance(prompts, str | Mapping) or not isinstance(prompts, Iterable):
        raise DataError(f"{name}: {short(prompts)} is no list of prompts; give a list of texts or of lists of messages")
    rows = (RawRow(dict(row) if isinstance(row, Mapping) else {"prompt": row}) for row in prompts)
    return _make(name, rows, encoder)


class PromptEncoder:
    """Encodes conversations that the model is to answer: their turns, and the header of the answer.

    Args:
        tokenizer: as `load_tokenizer` returns it.
        auto_insert_empty_system_msg: as in `render_group`.
        special_tokens_in_messages: "text" keeps text that spells a special token from becoming that token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        auto_insert_empty_system_msg: bool,
        special_tokens_in_messages: SpecialTokensInMessages = "text",
    ) -> None:
        self._tokenizer = tokenizer
        self._special = SpecialTokens(tokenizer) if special_tokens_in_messages == "text" else None
        self._inserts_system = choose_rendering(tokenizer, "in_context", auto_insert_empty_system_msg).takes_system

    def encode(self, turns: list[Message], tools: list[Any] | None = None) -> list[int]:
        """Returns the token ids of a conversation and of the header of the next answer.

        Raises:
            BadRow: the chat template refuses the conversation, or writes nothing.
        """
        if self._inserts_system and turns[0]["role"] != "system":
            turns = [{"role": "system", "content": ""}, *turns]
        asked, stand_ins = Conversation(turns, (), (), tools=tools), StandIns()
        if self._special is not None and self._special.found_in(asked):
            asked, stand_ins = self._special.hide(asked)
        try:
            text = template_limits.limited(lambda: write(self._tokenizer, asked.prompt, asked.tools, header=True))
            template_limits.check_written([text], asked.prompt)
        except template_limits.TooMuchError as error:
            raise BadRow(TOO_MUCH, str(error)) from error
        except Exception as error:  # a template may raise anything, `raise_exception` included
            raise BadRow("refused by the chat template", reason_of(error)) from error
        text = once(text, self._tokenizer.bos_token)
        if self._special is not None and stand_ins:
            (ids,) = self._special.encode([text], stand_ins)
        else:
            ids = [int(token) for token in self._tokenizer(text, add_special_tokens=False)["input_ids"]]
        if not ids:
            raise BadRow("no prompt", "the chat template writes nothing for the prompt")
        bos = self._tokenizer.bos_token_id
        return ids if bos is None or ids[0] == bos else [int(bos), *ids]  # as in training


def _make(name: str, rows: Iterable[RawRow], encoder: PromptEncoder) -> list[Prompt]:
    read: list[tuple[str, PromptRow | BadRow]] = []
    for number, row in enumerate(rows):
        place = f"row {number}" + ("" if row.line is None else f" (line {row.line})")
        try:
            read.append((place, read_prompt_row(row.value, row.names)))
        except BadRow as error:
            read.append((place, error))
    # As in training, where two texts that begin alike hold a prompt only if all rows of a split are such.
    implicit = not any(isinstance(found, PromptRow) and not found.implicit for _, found in read)
    prompts, bad = [], []
    with template_limits.prepared():
        for place, found in read:
            try:
                prompts.append(_make_one(found, implicit, encoder))
            except BadRow as error:
                bad.append(f"  {name}, {place}: {error}")
    if bad:
        lines = [*bad[:_SHOWN], *([f"  and {len(bad) - _SHOWN} more"] if len(bad) > _SHOWN else [])]
        first = f"{len(bad)} of {len(prompts) + len(bad)} prompts cannot be used:"
        raise DataError("\n".join([first, *lines, "Correct or remove them (rows count from 0)."]))
    if not prompts:
        raise DataError(f"{name}: there are no prompts in it")
    return prompts


def _make_one(row: PromptRow | BadRow, implicit: bool, encoder: PromptEncoder) -> Prompt:
    if isinstance(row, BadRow):
        raise row
    if row.implicit and not implicit:
        raise BadRow("no prompt", "the row has two answers and no prompt, unlike others")
    if row.turns[-1]["role"] == "assistant":
        raise BadRow("nothing to answer", "the last turn of the prompt is the assistant's: end with a turn of the user")
    return Prompt(row.given, row.turns, row.tools, encoder.encode(row.turns, row.tools), row.unused)


def _rows_of(path: Path) -> Iterator[RawRow]:
    """Yields the rows of a file of prompts."""
    try:
        for number, row in enumerate(raw_rows(str(path), path)):
            if not isinstance(row.value, dict):
                place = f"row {number}" if row.line is None else f"line {row.line}"
                raise DataError(f'{path}, {place}: {short(row.value)} is no object: write {{"prompt": ...}}')
            yield row
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"{path}: cannot be read ({reason}): give a file of prompts") from error


def unused_columns(prompts: Sequence[Prompt]) -> str:
    """Says which columns of rows are not read, and of how many rows, in one line; empty if all are."""
    counts = Counter(name for prompt in prompts for name in prompt.unused)
    if not counts:
        return ""
    named = ", ".join(f"{name} (in {count:,} of {len(prompts):,})" for name, count in sorted(counts.items()))
    some = "1 column of the prompts' rows is" if len(counts) == 1 else f"{len(counts)} columns of the prompts' rows are"
    return f"{some} not used: {named}"
