"""Finds chat templates by their names, and refuses those that cannot be used before any row is written."""

from __future__ import annotations

import difflib
import logging
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from jax_simpo.data import template_limits
from jax_simpo.data.in_context import ChatRendering, strip_bos, write
from jax_simpo.data.messages import short
from jax_simpo.errors import DataError
from jax_simpo.terminal import visible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


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


def check_template(name: str, tokenizer: PreTrainedTokenizerBase, chat_rendering: ChatRendering) -> None:
    """Renders an answer: refuses a template that cannot; of `original`, warns where the answer gets a system prompt."""
    from jinja2 import TemplateError, TemplateSyntaxError

    user, assistant = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
    alone = [[assistant]] if chat_rendering == "original" else []
    dialogues = [[user], [user, assistant], *alone]
    remedy = f"set `chat_template`, for example to one of {', '.join(built_in_templates())}"
    try:
        line = template_limits.limited(lambda: template_limits.line_of_a_power(tokenizer.get_chat_template()))
        texts = [] if line else template_limits.limited(lambda: [write(tokenizer, turns) for turns in dialogues])
        template_limits.check_written(texts, dialogues)
    except TemplateSyntaxError as error:
        raise DataError(f"chat template of {name}, line {error.lineno}: {reason_of(error)}: correct it") from error
    except TemplateError as error:
        what = "an answer by itself, as in the original SimPO" if alone else "a question and its answer"
        either = f"set `chat_rendering: auto`, or {remedy}" if alone else remedy
        raise DataError(f"chat template of {name}: cannot write {what} ({reason_of(error)}): {either}") from error
    except Exception as error:  # a template may raise anything
        raise DataError(f"chat template of {name}: cannot write a message ({reason_of(error)}): {remedy}") from error
    if line:
        raise DataError(
            f"chat template of {name}, line {line}: the power `**` may take for ever: remove it, or {remedy}"
        )
    if not alone:
        return
    prompt, dialogue, lone_answer = texts
    lone_answer = strip_bos(lone_answer, tokenizer)
    answer = dialogue.removeprefix(prompt)
    if answer != lone_answer and answer and lone_answer.endswith(answer):
        logger.warning(
            "The chat template of %s puts %s before every answer, so the model is trained to write it, as in the "
            "original SimPO. To avoid it, set `chat_rendering: auto`.",
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
