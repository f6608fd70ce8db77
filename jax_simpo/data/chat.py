"""Loads the tokenizer, and renders groups as text with its chat template: as the original SimPO does, or in context."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jax_simpo.data import synthetic, template_limits
from jax_simpo.data.chat_templates import built_in_templates, check_template, reason_of, resolve_template
from jax_simpo.data.conversations import Conversation
from jax_simpo.data.gguf_tokenizers import make_gguf_tokenizer
from jax_simpo.data.in_context import ChatRendering, Spans, strip_bos, write, write_in_context
from jax_simpo.data.messages import BadRow, Message
from jax_simpo.data.rendering import Rendering, choose_rendering, knows_system
from jax_simpo.data.special_text import StandIns, shown
from jax_simpo.data.transformers_import import import_transformers
from jax_simpo.errors import DataError
from jax_simpo.gguf_files import is_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["GroupText", "built_in_templates", "load_tokenizer", "reason_of", "render_group", "resolve_template"]

REASONABLE_LENGTH = 100_000
"""Tokenizers without a maximum length report a number above this one."""

TOO_MUCH = "too much for the chat template"
"""The `kind` of a row that the chat template takes too much time or memory for."""


@dataclass(frozen=True)
class GroupText:
    """A prompt and its responses after the chat template. The model reads the prompt with each of the responses.

    Attributes:
        prompt: the text of the prompt.
        responses: the text of each response.
        scored: which characters of each response are scored, as starts and stops. Empty where all are.
        stand_ins: what parts of the texts stand for that are no special tokens (`special_text`). Empty in most groups.
        in_context: True if the responses were written in context, where others are as in the original.
        shortened: responses in which the template left out a part of what the answer says.
    """

    prompt: str
    responses: tuple[str, ...]
    scored: tuple[Spans, ...] = ()
    stand_ins: StandIns = field(default_factory=dict)
    in_context: bool = field(default=False, compare=False)
    shortened: int = field(default=0, compare=False)

    def scored_of(self, place: int) -> Spans:
        """Returns the scored characters of a response."""
        return self.scored[place] if self.scored else ((0, len(self.responses[place])),)

    def shown(self) -> tuple[str, tuple[str, ...]]:
        """Returns prompt and responses as people read them."""
        prompt, *responses = (shown(text, self.stand_ins) for text in (self.prompt, *self.responses))
        return prompt, tuple(responses)


# ---------------------------------------------------------------------------------------------------------------
# Tokenizer and template
# ---------------------------------------------------------------------------------------------------------------


def load_tokenizer(
    name_or_path: str | Path,
    *,
    chat_template: str | None = None,
    chat_rendering: ChatRendering = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> PreTrainedTokenizerBase:
    """Loads a tokenizer and sets it up as the original SimPO does.

    Args:
        name_or_path: a folder, a hub id, a GGUF file, or `builtin:NAME` for a tokenizer of `jax_simpo.data.synthetic`.
        chat_template: a built-in name (`built_in_templates()`), a path to a `.jinja` file, or the template's text.
            None keeps the tokenizer's own template; a template is never guessed from a path.
        chat_rendering: how answers will be rendered; for `original` the template must write an answer by itself.
        trust_remote_code: runs code that comes with the tokenizer.
        revision: a branch, tag or commit on the hub.

    Raises:
        DataError: the tokenizer cannot be loaded, has no EOS token, or has no chat template that renders an answer.
    """
    name = str(name_or_path)
    tokenizer = _load_as_saved(name, trust_remote_code, revision)
    if tokenizer.eos_token_id is None:
        raise DataError(f"tokenizer {name}: has no EOS token, which ends every answer: set eos_token in its files")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id
    tokenizer.truncation_side = "left"
    if tokenizer.model_max_length > REASONABLE_LENGTH:
        tokenizer.model_max_length = 2048
    if chat_template is not None:
        tokenizer.chat_template = resolve_template(chat_template)
    elif isinstance(tokenizer.chat_template, dict):
        if "default" not in tokenizer.chat_template:
            names = ", ".join(sorted(tokenizer.chat_template))
            raise DataError(f"tokenizer {name}: has the chat templates {names} but no default: set `chat_template`")
        tokenizer.chat_template = tokenizer.chat_template["default"]
    if not tokenizer.chat_template:
        raise DataError(
            f"tokenizer {name}: has no chat template: set `chat_template` to one of {', '.join(built_in_templates())}, "
            "to a .jinja file, or to the template's text"
        )
    check_template(name, tokenizer, chat_rendering)
    return tokenizer


def _load_as_saved(name: str, trust_remote_code: bool, revision: str | None) -> PreTrainedTokenizerBase:
    if name.startswith("builtin:"):
        return synthetic.make_tokenizer(name.removeprefix("builtin:"))
    if is_gguf(name):
        return make_gguf_tokenizer(name)
    transformers = import_transformers()
    try:
        return transformers.AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    # transformers has different exceptions for a missing folder, no network, a broken file, refused remote code.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0][:300]
        raise DataError(
            f"tokenizer {name}: cannot be loaded ({type(error).__name__}: {reason}): give a folder with "
            "tokenizer.json, or a hub id, in tokenizer_name_or_path"
        ) from error


# ---------------------------------------------------------------------------------------------------------------
# Rendering
# ---------------------------------------------------------------------------------------------------------------


def render_group(
    turns: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    auto_insert_empty_system_msg: bool,
    train_on: Literal["last_turn", "assistant_turns"] = "last_turn",
    rendering: Rendering | None = None,
) -> GroupText:
    """Renders a prompt and its answers with the tokenizer's chat template.

    In context, the template's generation prompt is part of the prompt (see `in_context`). In the original's rendering
    no generation prompt is added: the assistant header, where a template has one, belongs to the answer.

    Args:
        turns: the turns of the prompt and the answers.
        tokenizer: as `load_tokenizer` returns it.
        auto_insert_empty_system_msg: puts an empty system turn first if the template takes system turns and the prompt
            has none.
        train_on: the turns of the assistant that are scored in an answer of several turns.
        rendering: how answers are rendered; None chooses as `chat_rendering: auto` does.

    Raises:
        BadRow: the row cannot be rendered, or an answer is empty, or all are equal.
    """
    prompt = turns.prompt
    rendering = rendering or choose_rendering(tokenizer, "auto", auto_insert_empty_system_msg)
    takes_system = rendering.takes_system and knows_system(tokenizer)
    if auto_insert_empty_system_msg and takes_system and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": ""}, *prompt]
    try:
        text = template_limits.limited(lambda: _render(tokenizer, prompt, turns, train_on, rendering))
        template_limits.check_written([text.prompt, *text.responses], turns)
    except BadRow:
        raise
    except template_limits.TooMuchError as error:
        raise BadRow(TOO_MUCH, str(error)) from error
    except Exception as error:  # a template may raise anything, `raise_exception` included: this row is at fault
        raise BadRow("refused by the chat template", reason_of(error)) from error
    if not text.prompt:
        raise BadRow("no prompt", "the chat template writes nothing for the prompt")
    if not all(text.responses):
        raise BadRow("empty response", "the chat template writes nothing for an answer")
    if len(set(text.responses)) == 1:
        raise BadRow("chosen = rejected", "the two answers read the same after the chat template")
    pairs = zip(turns.answers, text.responses, strict=True)
    shortened = sum(not all(_holds(response, turn["content"]) for turn in answer) for answer, response in pairs)
    return replace(text, shortened=shortened) if shortened else text


def _holds(response: str, content: str) -> bool:
    """Returns True if a response holds the content of a turn, blanks apart."""
    return content.strip() in response or "".join(content.split()) in "".join(response.split())


def _render(
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[Message],
    turns: Conversation,
    train_on: Literal["last_turn", "assistant_turns"],
    rendering: Rendering,
) -> GroupText:
    """Renders a group in context, or as in the original."""
    if not rendering.in_context:
        try:
            text = _render_as_original(tokenizer, prompt, turns, train_on)
            if not rendering.compared or all(
                len(answer) > 1 or write(tokenizer, [*prompt, *answer], turns.tools) == text.prompt + response
                for answer, response in zip(turns.answers, text.responses, strict=True)
            ):
                return text
        except Exception as error:  # the template may refuse an answer by itself and write it in context
            if isinstance(error, MemoryError) or not rendering.compared:
                raise
    every_turn = train_on == "assistant_turns"
    written = write_in_context(tokenizer, prompt, turns.answers, turns.tools, every_turn=every_turn)
    return _group_text(written.prompt, written.answers, written.scored, in_context=not rendering.in_context)


def _render_as_original(
    tokenizer: PreTrainedTokenizerBase, prompt: list[Message], turns: Conversation, train_on: str
) -> GroupText:
    rendered = write(tokenizer, prompt, turns.tools)
    answers = [_render_answer(tokenizer, prompt, rendered, answer, turns.tools, train_on) for answer in turns.answers]
    return _group_text(rendered, tuple(text for text, _ in answers), tuple(spans for _, spans in answers))


def _group_text(
    prompt: str, responses: tuple[str, ...], scored: tuple[Spans, ...], *, in_context: bool = False
) -> GroupText:
    all_scored = all(spans == ((0, len(text)),) for text, spans in zip(responses, scored, strict=True))
    return GroupText(prompt, responses, () if all_scored else scored, in_context=in_context)


def _render_answer(
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[Message],
    rendered: str,
    answer: list[Message],
    tools: list[Any] | None,
    train_on: str,
) -> tuple[str, Spans]:
    """Returns the text of an answer and its scored characters, as in the original where it has one turn."""
    if len(answer) == 1:
        text = strip_bos(write(tokenizer, answer), tokenizer)
        return text, ((0, len(text)),)
    texts = [rendered]
    for number in range(1, len(answer) + 1):
        texts.append(write(tokenizer, [*prompt, *answer[:number]], tools))
        if not texts[-1].startswith(texts[-2]):
            raise BadRow(
                "refused by the chat template",
                f"it does not write turn {number - 1} of an answer after those before it, so that nobody knows which "
                "tokens are the assistant's",
            )
    ends = [len(text) - len(rendered) for text in texts]
    turns = [(ends[n], ends[n + 1]) for n, turn in enumerate(answer) if turn["role"] == "assistant"]
    scored = turns[-1:] if train_on == "last_turn" else turns
    return texts[-1].removeprefix(rendered), tuple(scored)
