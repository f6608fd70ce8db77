"""Chooses how answers are rendered: by themselves as in the original SimPO, or in context."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jax_simpo.data import template_limits
from jax_simpo.data.chat_templates import built_in_templates, resolve_template
from jax_simpo.data.in_context import ChatRendering, once, strip_bos, write
from jax_simpo.data.messages import Message, short

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Rendering:
    """Describes how the answers of a run are rendered.

    Attributes:
        in_context: True if each answer is written with its prompt before it, False if by itself as in the original.
        compared: a row of which the original gives other text is written in context all the same.
        takes_system: the template writes an empty system turn, so one may be put first.
        reasons: what the user should know, a sentence each.
    """

    in_context: bool
    compared: bool = False
    takes_system: bool = True
    reasons: tuple[str, ...] = ()


def choose_rendering(
    tokenizer: PreTrainedTokenizerBase, chat_rendering: ChatRendering, auto_insert_empty_system_msg: bool
) -> Rendering:
    """Chooses how answers are rendered, from what the template writes for a few short conversations.

    `auto` takes the original's rendering if both give the same tokens for all of them. A template that ends an answer
    with EOS and a line end is an exception, because the original then adds a second EOS: only where it writes what a
    template of the published runs writes, the original's rendering is kept to reproduce them, and a reason says so.

    Args:
        tokenizer: as `load_tokenizer` returns it.
        chat_rendering: `original`, `in_context`, or `auto`.
        auto_insert_empty_system_msg: see `render_group`.
    """
    asks = auto_insert_empty_system_msg and knows_system(tokenizer)
    empty = [{"role": "system", "content": ""}]
    takes_system = asks and _try_to_write(tokenizer, [*empty, *_TURNS[:1]]) is not None
    reasons = []
    if asks and not takes_system:
        reasons.append("the chat template refuses system messages, so no empty one is put first")
    if chat_rendering == "auto":
        prompts = [empty * takes_system + _TURNS[:1], empty * takes_system + _TURNS, _SYSTEM + _TURNS[:1]]
        found = [_difference(tokenizer, prompt) for prompt in prompts]
        if all(difference is None for difference in found):
            found = ["the chat template refuses the conversations with which it is tried"]
        reason = next(filter(None, found), "")
        if reason:
            reasons.append(f"answers are rendered in context, unlike in the original SimPO, because {reason}")
        elif after := _after_eos(tokenizer, _try_to_write(tokenizer, [_ANSWER]) or ""):
            eos = short(tokenizer.eos_token)
            reasons.append(
                f"the chat template ends answers with {eos} and {short(after)}, and the original SimPO puts a second "
                f"{eos} after that: both are trained, since the template is one of the published runs'; "
                "`chat_rendering: in_context` trains one"
            )
        return Rendering(bool(reason), not reason, takes_system, tuple(reasons))
    return Rendering(chat_rendering == "in_context", False, takes_system, tuple(reasons))


_SYSTEM = [{"role": "system", "content": "Be brief."}]
_TURNS = [
    {"role": "user", "content": "Name a tea."},
    {"role": "assistant", "content": "Darjeeling."},
    {"role": "user", "content": "And a coffee?"},
]
_ANSWER = {"role": "assistant", "content": "Mocha."}


def knows_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Returns True if a template seems to know system messages, by the rule of the original SimPO."""
    template = tokenizer.get_chat_template()
    return "system" in template or "<|im_start|>" in template


def _try_to_write(tokenizer: PreTrainedTokenizerBase, turns: list[Message], **more: Any) -> str | None:
    """Returns what a template writes for these turns; None if it refuses them."""
    try:
        return template_limits.limited(lambda: write(tokenizer, turns, **more))
    except Exception:  # a template may raise anything
        return None


def _difference(tokenizer: PreTrainedTokenizerBase, prompt: list[Message]) -> str | None:
    """Says, after "because", how the original's rendering differs from that in context.

    Empty if it does not; None if the template refuses the conversation.
    """
    whole, before = (_try_to_write(tokenizer, turns) for turns in ([*prompt, _ANSWER], prompt))
    if whole is None or before is None:  # it takes no such prompt at all
        return None
    alone = _try_to_write(tokenizer, [_ANSWER])
    if alone is None:
        return "the chat template cannot write an answer by itself"
    bos, answer = tokenizer.bos_token, strip_bos(alone, tokenizer)
    if before + answer != whole:
        own = whole.removeprefix(before)
        if own == alone:
            return f"the turn of the assistant begins with the BOS token {short(bos)}, which the original takes away"
        if own != whole and own and answer.endswith(own):
            return f"the chat template writes {short(answer.removesuffix(own), 200)} before an answer by itself"
        return "the chat template writes an answer by itself otherwise than after its prompt"
    if whole != once(whole, bos):
        return f"the chat template begins with {short(bos)} twice"
    after = _after_eos(tokenizer, answer)
    if after and not _is_published(tokenizer, (prompt, [*prompt, _ANSWER], [_ANSWER])):
        return f"it would put a second {short(tokenizer.eos_token)} after the {short(after)} that ends them"
    return ""


def _after_eos(tokenizer: PreTrainedTokenizerBase, answer: str) -> str:
    """Returns the white space that an answer has after EOS; empty if it has none, or does not end with EOS."""
    text, eos = answer.rstrip(), tokenizer.eos_token
    return answer.removeprefix(text) if eos and text.endswith(eos) else ""


def _is_published(tokenizer: PreTrainedTokenizerBase, dialogues: Iterable[list[Message]]) -> bool:
    """Returns True if a template writes these dialogues as one of the published runs' does."""
    pairs = [(turns, _try_to_write(tokenizer, turns)) for turns in dialogues]
    templates = [resolve_template(name) for name in built_in_templates()]
    return any(
        all(_try_to_write(tokenizer, turns, chat_template=template) == text for turns, text in pairs)
        for template in templates
    )
