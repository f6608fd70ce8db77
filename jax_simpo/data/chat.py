"""Loads the tokenizer and renders groups as text with its chat template, exactly as the original SimPO does."""

from __future__ import annotations

import difflib
import logging
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jax_simpo.data import synthetic, template_limits
from jax_simpo.data.conversations import Conversation
from jax_simpo.data.messages import BadRow, Message, short
from jax_simpo.errors import DataError
from jax_simpo.terminal import visible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

REASONABLE_LENGTH = 100_000
"""Tokenizers without a maximum length report a number above this one."""

TOO_MUCH = "too much for the chat template"
"""The `kind` of a row that the chat template takes too much time or memory for."""


Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class GroupText:
    """A prompt and its responses after the chat template. The model reads the prompt with each of the responses.

    Attributes:
        prompt: the text of the prompt.
        responses: the text of each response.
        scored: which characters of each response are scored, as starts and stops. Empty where all are.
    """

    prompt: str
    responses: tuple[str, ...]
    scored: tuple[Spans, ...] = ()

    def scored_of(self, place: int) -> Spans:
        """Returns the scored characters of a response."""
        return self.scored[place] if self.scored else ((0, len(self.responses[place])),)


# ---------------------------------------------------------------------------------------------------------------
# Tokenizer and template
# ---------------------------------------------------------------------------------------------------------------


def load_tokenizer(
    name_or_path: str | Path,
    *,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> PreTrainedTokenizerBase:
    """Loads a tokenizer and sets it up as the original SimPO does.

    Args:
        name_or_path: a folder, a hub id, or `builtin:NAME` for a tokenizer of `jax_simpo.data.synthetic`.
        chat_template: a built-in name (`built_in_templates()`), a path to a `.jinja` file, or the template's text.
            None keeps the tokenizer's own template; a template is never guessed from a path.
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
    _check_template(name, tokenizer)
    return tokenizer


def _load_as_saved(name: str, trust_remote_code: bool, revision: str | None) -> PreTrainedTokenizerBase:
    if name.startswith("builtin:"):
        return synthetic.make_tokenizer(name.removeprefix("builtin:"))
    # transformers takes a second to import, and brings torch along where torch is installed.
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    # transformers has different exceptions for a missing folder, no network, a broken file, refused remote code.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0][:300]
        raise DataError(
            f"tokenizer {name}: cannot be loaded ({type(error).__name__}: {reason}): give a folder with "
            "tokenizer.json, or a hub id, in tokenizer_name_or_path"
        ) from error


def built_in_templates() -> list[str]:
    """Lists the templates that come with the package: those of the published SimPO runs."""
    folder = resources.files("jax_simpo.data") / "templates"
    return sorted(file.name.removesuffix(".jinja") for file in folder.iterdir() if file.name.endswith(".jinja"))


def resolve_template(chat_template: str) -> str:
    """Returns the text of a template that is given by a built-in name, a path, or its text.

    Raises:
        DataError: the value is none of the three.
    """
    if chat_template in built_in_templates():
        return (resources.files("jax_simpo.data") / "templates" / f"{chat_template}.jinja").read_text("utf-8")
    if "{%" in chat_template or "{{" in chat_template:
        return chat_template
    try:
        path = Path(chat_template).expanduser()
        if path.is_file():
            return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError, RuntimeError) as error:  # the last of a user without a home folder
        raise DataError(f"chat_template {short(chat_template, 300)}: cannot be read ({reason_of(error)})") from error
    near = difflib.get_close_matches(chat_template, built_in_templates(), n=1)
    raise DataError(
        f"chat_template {short(chat_template, 300)}: neither a built-in name ({', '.join(built_in_templates())}), a "
        "file, nor a jinja template" + (f"; did you mean {near[0]}?" if near else "")
    )


def _check_template(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Renders an answer by itself: refuses a template that cannot, and warns of one that adds a system prompt to it."""
    from jinja2 import TemplateError, TemplateSyntaxError

    user, assistant = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
    dialogues = [[assistant], [user], [user, assistant]]
    remedy = f"set `chat_template`, for example to one of {', '.join(built_in_templates())}"
    try:
        line = template_limits.limited(lambda: template_limits.line_of_a_power(tokenizer.get_chat_template()))
        texts = [] if line else template_limits.limited(lambda: [_render(tokenizer, turns) for turns in dialogues])
        template_limits.check_written(texts, dialogues)
    except TemplateSyntaxError as error:
        raise DataError(f"chat template of {name}, line {error.lineno}: {reason_of(error)}: correct it") from error
    except TemplateError as error:
        raise DataError(
            f"chat template of {name}: cannot write an answer by itself, as SimPO needs ({reason_of(error)}): {remedy}"
        ) from error
    except Exception as error:  # a template may raise anything
        raise DataError(f"chat template of {name}: cannot write a message ({reason_of(error)}): {remedy}") from error
    if line:
        raise DataError(
            f"chat template of {name}, line {line}: the power `**` may take for ever: remove it, or {remedy}"
        )
    lone_answer, prompt, dialogue = texts
    lone_answer = _strip_bos(lone_answer, tokenizer)
    answer = dialogue.removeprefix(prompt)
    if answer != lone_answer and answer and lone_answer.endswith(answer):
        logger.warning(
            "The chat template of %s puts %s before every answer, so the model is trained to write it. "
            "The original SimPO does the same. To avoid it, set `chat_template` to a template without a default "
            "system prompt.",
            visible(name),
            visible(short(lone_answer.removesuffix(answer), 1000)),
        )


def reason_of(error: Exception) -> str:
    """Returns what an exception says, in a line."""
    from jinja2 import TemplateError

    text = " ".join(str(error).split())
    text = text if len(text) <= 300 else text[:297] + "..."
    plain = isinstance(error, TemplateError | template_limits.TooMuchError) and text
    return text if plain else f"{type(error).__name__}: {text}".removesuffix(": ")


# ---------------------------------------------------------------------------------------------------------------
# Rendering
# ---------------------------------------------------------------------------------------------------------------


def render_group(
    turns: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    auto_insert_empty_system_msg: bool,
    train_on: Literal["last_turn", "assistant_turns"] = "last_turn",
) -> GroupText:
    """Renders a prompt and its answers with the tokenizer's chat template.

    No generation prompt is added: the assistant header, where a template has one, belongs to the answer.

    Args:
        turns: the turns of the prompt and the answers.
        tokenizer: as `load_tokenizer` returns it.
        auto_insert_empty_system_msg: puts an empty system turn first if the template knows system turns and the prompt
            has none.
        train_on: the turns of the assistant that are scored in an answer of several turns.

    Raises:
        BadRow: the row cannot be rendered, or an answer is empty, or all are equal.
    """
    prompt = turns.prompt
    template = tokenizer.get_chat_template()
    takes_system = "system" in template or "<|im_start|>" in template
    if auto_insert_empty_system_msg and takes_system and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": ""}, *prompt]
    try:
        rendered, answers = template_limits.limited(lambda: _render_all(tokenizer, prompt, turns, train_on))
        template_limits.check_written([rendered, *(text for text, _ in answers)], turns)
    except BadRow:
        raise
    except template_limits.TooMuchError as error:
        raise BadRow(TOO_MUCH, str(error)) from error
    except Exception as error:  # a template may raise anything, `raise_exception` included: this row is at fault
        raise BadRow("refused by the chat template", reason_of(error)) from error
    all_scored = all(spans == ((0, len(answer)),) for answer, spans in answers)
    scored = () if all_scored else tuple(spans for _, spans in answers)
    text = GroupText(rendered, tuple(answer for answer, _ in answers), scored)
    if not text.prompt:
        raise BadRow("no prompt", "the chat template writes nothing for the prompt")
    if not all(text.responses):
        raise BadRow("empty response", "the chat template writes nothing for an answer")
    if len(set(text.responses)) == 1:
        raise BadRow("chosen = rejected", "the two answers read the same after the chat template")
    return text


def _render_all(
    tokenizer: PreTrainedTokenizerBase, prompt: list[Message], turns: Conversation, train_on: str
) -> tuple[str, list[tuple[str, Spans]]]:
    """Returns the text of the prompt, and of each answer the text and its scored characters."""
    rendered = _render(tokenizer, prompt, turns.tools)
    answers = [_render_answer(tokenizer, prompt, rendered, answer, turns.tools, train_on) for answer in turns.answers]
    return rendered, answers


def _render_answer(
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[Message],
    rendered: str,
    answer: list[Message],
    tools: list[Any] | None,
    train_on: str,
) -> tuple[str, Spans]:
    """Returns the text of an answer and its scored characters."""
    if len(answer) == 1:  # by itself, as in the original
        text = _strip_bos(_render(tokenizer, answer), tokenizer)
        return text, ((0, len(text)),)
    texts = [rendered]
    for number in range(1, len(answer) + 1):
        texts.append(_render(tokenizer, [*prompt, *answer[:number]], tools))
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


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: list[Any] | None = None) -> str:
    # Templates add text to `bos_token`, which would be undefined for a tokenizer without one.
    extra: dict[str, Any] = {"bos_token": ""} if tokenizer.bos_token is None else {}
    if tools:
        extra["tools"] = tools
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **extra))


def _strip_bos(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    return text.removeprefix(tokenizer.bos_token) if tokenizer.bos_token else text
