"""Keeps text in messages that spells a special token, such as `<|eot_id|>`, from becoming that token.

A tokenizer looks for special tokens in the whole text that a chat template has written, and cannot tell what the
template wrote from what a message holds: whoever wrote the message could end his turn with it, or begin one of the
system's. So such text is taken out of the messages before the template sees them, and a stand-in is put in its place.
When the text is encoded, the template's own special tokens get names that no text holds, in a copy of the tokenizer
that knows them by these names; then the stand-ins become the text that they stand for, which is nothing special to the
copy. All else is encoded as ever.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

from jax_simpo.data.conversations import Conversation
from jax_simpo.data.messages import BadRow

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

# Unicode has set these code points aside for use within a program. No text holds them.
_STAND_IN, _NAME = "\ufdd1", "\ufdd2"
_KIND = "special token in a message"
_REMEDY = "remove that text from the row, or set `special_tokens_in_messages: tokens` to let it become the token"

StandIns = dict[str, str]


class SpecialTokens:
    """The special tokens of a tokenizer.

    Args:
        tokenizer: the tokenizer. One with `split_special_tokens` makes no special tokens of any text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        tokens: set[str] = set()
        if not getattr(tokenizer, "split_special_tokens", False):
            tokens |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
            tokens |= set(tokenizer.all_special_tokens)
        self._pattern = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))) if tokens else None

    def found_in(self, turns: Conversation) -> list[str]:
        """Returns the first special token that each message spells, of those messages that spell any."""
        if self._pattern is None:
            return []
        texts = [_text_of(message) for message in chain(turns.prompt, *turns.answers)]
        texts += ["\n".join(_strings(turns.tools))] if turns.tools else []
        return [match.group() for text in texts if (match := self._pattern.search(text))]

    def hide(self, turns: Conversation) -> tuple[Conversation, StandIns]:
        """Puts stand-ins into the messages, and returns these with what each stand-in stands for.

        Raises:
            BadRow: a message holds a code point that is set aside for them, or the tokenizer has no fast form.
        """
        texts = list(_strings([turns.prompt, turns.answers, turns.tools]))
        if any(mark in text for text in texts for mark in (_STAND_IN, _NAME)):
            raise BadRow("broken text", "a message holds U+FDD1 or U+FDD2, which are no characters: remove them")
        assert self._pattern is not None
        pattern, found = self._pattern, dict.fromkeys(chain.from_iterable(map(self._pattern.findall, texts)))
        if not self._tokenizer.is_fast:
            raise BadRow(_KIND, f"a message spells {next(iter(found))}, and this tokenizer has no fast form: {_REMEDY}")
        stand_ins = {f"{_STAND_IN}{number}{_STAND_IN}": token for number, token in enumerate(found)}
        of_token = {token: stand_in for stand_in, token in stand_ins.items()}

        def hidden(value: Any) -> Any:
            if isinstance(value, str):
                return pattern.sub(lambda match: of_token[match.group()], value)
            if isinstance(value, dict):
                return {hidden(key): hidden(item) for key, item in value.items()}
            return [hidden(item) for item in value] if isinstance(value, list) else value

        answers = tuple(hidden(answer) for answer in turns.answers)
        return replace(turns, prompt=hidden(turns.prompt), answers=answers, tools=hidden(turns.tools)), stand_ins

    def encode(self, texts: Sequence[str], stand_ins: StandIns) -> list[list[int]]:
        """Encodes texts of a template in which stand-ins stand for what is no special token.

        Raises:
            BadRow: the tokenizer makes a special token even of ordinary text.
        """
        assert self._pattern is not None
        copy, names, ids = self._copy
        named = [self._pattern.sub(lambda match: names.get(match.group(), match.group()), text) for text in texts]
        encoded = copy.encode_batch([shown(text, stand_ins) for text in named], add_special_tokens=False)
        result = [[ids.get(token, token) for token in one.ids] for one in encoded]
        for token in stand_ins.values():
            own = self._tokenizer.convert_tokens_to_ids(token)
            name = names.get(token, token)
            if own != self._tokenizer.unk_token_id and any(
                one.count(own) != text.count(name) for one, text in zip(result, named, strict=True)
            ):
                raise BadRow(_KIND, f"this tokenizer makes a special token of {token} in any text: {_REMEDY}")
        return result

    @cached_property
    def _copy(self) -> tuple[Tokenizer, dict[str, str], dict[int, int]]:
        """A copy of the tokenizer that knows special tokens by other names; their names, and their ids in the copy."""
        from tokenizers import Tokenizer

        backend = self._tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        content = json.loads(backend.to_str())
        added = [token["content"] for token in content["added_tokens"]]
        names: dict[str, str] = {token: token for token in added}
        for number, token in enumerate(content["added_tokens"]):
            if token["special"]:
                names[token["content"]] = token["content"] = f"{_NAME}{number}{_NAME}"
        copy = Tokenizer.from_str(json.dumps(content))
        # Names that the model's vocabulary does not have get new ids, and may push those of other added tokens.
        ids: dict[Any, Any] = {copy.token_to_id(name): backend.token_to_id(token) for token, name in names.items()}
        return copy, names, ids


def shown(text: str, stand_ins: StandIns) -> str:
    """Returns a text with what its stand-ins stand for."""
    for stand_in, token in stand_ins.items():
        text = text.replace(stand_in, token)
    return text


def _text_of(message: Mapping[str, Any]) -> str:
    """Returns all text of a message: usually its content alone."""
    content = str(message["content"])
    return content if len(message) == 2 else "\n".join([content, *_strings(message)])


def _strings(value: Any) -> Iterator[str]:
    """Yields every text in a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from (str(key), *_strings(item))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
