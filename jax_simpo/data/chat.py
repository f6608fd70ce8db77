"""Loads the tokenizer and renders pairs as text with its chat template, exactly as the original SimPO does."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_simpo.data import synthetic
from jax_simpo.data.messages import BadRow, Message, read_conversation
from jax_simpo.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

REASONABLE_LENGTH = 100_000
"""Tokenizers without a maximum length report a number above this one."""


@dataclass(frozen=True)
class PairText:
    """Prompt and answers after the chat template. The model reads `prompt + chosen` and `prompt + rejected`."""

    prompt: str
    chosen: str
    rejected: str


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
    path = Path(chat_template).expanduser()
    if path.is_file():
        return path.read_text("utf-8")
    near = difflib.get_close_matches(chat_template, built_in_templates(), n=1)
    raise DataError(
        f"chat_template {chat_template!r}: neither a built-in name ({', '.join(built_in_templates())}), a file, nor a "
        "jinja template" + (f"; did you mean {near[0]}?" if near else "")
    )


def _check_template(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Renders an answer by itself: refuses a template that cannot, and warns of one that adds a system prompt to it."""
    from jinja2 import TemplateError, TemplateSyntaxError

    user, assistant = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
    try:
        lone_answer = _strip_bos(_render(tokenizer, [assistant]), tokenizer)
        prompt, dialogue = _render(tokenizer, [user]), _render(tokenizer, [user, assistant])
    except TemplateSyntaxError as error:
        raise DataError(f"chat template of {name}, line {error.lineno}: {error.message}: correct it") from error
    except TemplateError as error:
        raise DataError(
            f"chat template of {name}: cannot write an answer by itself, as SimPO needs ({error}): set "
            f"`chat_template`, for example to one of {', '.join(built_in_templates())}"
        ) from error
    answer = dialogue.removeprefix(prompt)
    if answer != lone_answer and answer and lone_answer.endswith(answer):
        logger.warning(
            "The chat template of %s puts %r before every answer, so the model is trained to write it. "
            "The original SimPO does the same. To avoid it, set `chat_template` to a template without a default "
            "system prompt.",
            name,
            lone_answer.removesuffix(answer),
        )


# ---------------------------------------------------------------------------------------------------------------
# Rendering
# ---------------------------------------------------------------------------------------------------------------


def render_pair(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, auto_insert_empty_system_msg: bool
) -> PairText:
    """Renders the prompt and the answers of a raw row with the tokenizer's chat template.

    No generation prompt is added: the assistant header, where a template has one, belongs to the answer.

    Args:
        row: a row in any form that `read_conversation` accepts.
        tokenizer: as `load_tokenizer` returns it.
        auto_insert_empty_system_msg: puts an empty system turn first if the template knows system turns and the row
            has none.

    Raises:
        BadRow: the row cannot be rendered, or an answer is empty, or the two are equal.
    """
    turns = read_conversation(row)
    prompt = turns.prompt
    template = tokenizer.get_chat_template()
    takes_system = "system" in template or "<|im_start|>" in template
    if auto_insert_empty_system_msg and takes_system and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": ""}, *prompt]
    try:
        text = PairText(
            prompt=_render(tokenizer, prompt),
            chosen=_strip_bos(_render(tokenizer, turns.chosen), tokenizer),
            rejected=_strip_bos(_render(tokenizer, turns.rejected), tokenizer),
        )
    except Exception as error:  # a template may raise anything, `raise_exception` included: this row is at fault
        raise BadRow("refused by the chat template", str(error)) from error
    if not text.prompt:
        raise BadRow("no prompt", "the chat template writes nothing for the prompt")
    if not text.chosen or not text.rejected:
        raise BadRow("empty response", "the chat template writes nothing for an answer")
    if text.chosen == text.rejected:
        raise BadRow("chosen = rejected", "the two answers read the same after the chat template")
    return text


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> str:
    # Templates add text to `bos_token`, which would be undefined for a tokenizer without one.
    extra = {"bos_token": ""} if tokenizer.bos_token is None else {}
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **extra))


def _strip_bos(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    return text.removeprefix(tokenizer.bos_token) if tokenizer.bos_token else text
