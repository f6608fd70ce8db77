"""Makes the built-in preference pairs and their tokenizer, for the quickstart and for trials without data files.

`builtin:cafe` holds orders in a café. A guest orders ("Could I have a large tea with lemon? The name is Anna."),
sometimes with a change of mind ("... Actually, make that a coffee."). The chosen reply confirms the order, the rejected
one gets one word wrong. Both kinds of reply use the same words, so an untrained model prefers the right one half of the
time. Test orders combine a drink and an extra that never come together in training, so only a model that reads the
order gets them right.

`builtin:manners` is for models that know English; `jax_simpo.data.manners` makes it.

`builtin:lengths` has the lengths of a real data set without its texts, for hardware plans.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from jax_simpo.data import manners
from jax_simpo.data.transformers_import import import_transformers
from jax_simpo.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SIZES = ("small", "medium", "large")
DRINKS = ("tea", "coffee", "cocoa", "cider", "juice", "lemonade", "milkshake", "smoothie", "mocha", "latte")
EXTRAS = ("lemon", "honey", "cream", "cinnamon", "ginger", "mint", "vanilla", "ice", "sugar", "nutmeg")
NAMES = (
    *("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Greta", "Hugo", "Ida", "Jonas"),
    *("Klara", "Leo", "Mia", "Noah", "Olga", "Paul", "Rosa", "Simon", "Tara", "Victor"),
)

_ORDERS = (
    "Hello, I would like a {size} {drink} with {extra}, please. My name is {name}.",
    "Could I have a {size} {drink} with {extra}? The name is {name}.",
    "Hi, {name} here. One {drink} with {extra}, please, a {size} one.",
    "A {drink} for {name}, please. With {extra}, and make it {size}.",
    "Good morning! I am {name}. Do you have {drink} with {extra}? A {size} one, please.",
)
_SECOND_THOUGHTS = {
    "size": ("Actually, make it {size}.", "No, wait, a {size} one, please."),
    "drink": ("Actually, make that a {drink}.", "No, wait, I would rather have {drink}."),
    "extra": ("Actually, make that with {extra}.", "No, wait, with {extra}, please."),
}
_REPLIES = (
    "Of course, {name}! One {size} {drink} with {extra}, coming up.",
    "Thank you, {name}. Here is your {size} {drink} with {extra}.",
)

_WORD = r" ?[A-Za-z]+|[^A-Za-z]"
_PAD, _BOS, _EOS, _UNKNOWN = "<|pad|>", "<|begin|>", "<|end|>", "<|unknown|>"
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class _Order:
    size: str
    drink: str
    extra: str
    name: str


_CHOICES = {"size": SIZES, "drink": DRINKS, "extra": EXTRAS, "name": NAMES}
SPLITS = {"train": 4096, "test": 512}


def _held_out(drink: str, extra: str) -> bool:
    """Returns True if a drink and an extra come together only in the test split: a fifth of all combinations."""
    return (DRINKS.index(drink) + 2 * EXTRAS.index(extra)) % 5 == 0


def _another_word(chance: random.Random, field: str, than: str) -> str:
    return chance.choice([word for word in _CHOICES[field] if word != than])


def _pair(chance: random.Random, split: str) -> dict[str, list[dict[str, str]]]:
    """Makes one order with a right reply and a reply that gets one word wrong."""
    while True:
        order = _Order(*(chance.choice(_CHOICES[field.name]) for field in fields(_Order)))
        if _held_out(order.drink, order.extra) == (split == "test"):
            break
    request = chance.choice(_ORDERS)
    if chance.random() < 0.3:
        changed = chance.choice(list(_SECOND_THOUGHTS))
        first_order = replace(order, **{changed: _another_word(chance, changed, than=getattr(order, changed))})
        correction = chance.choice(_SECOND_THOUGHTS[changed])
        request = f"{request.format(**vars(first_order))} {correction.format(**vars(order))}"
    else:
        request = request.format(**vars(order))
    wrong_field = chance.choice([field.name for field in fields(_Order)])
    mistaken = replace(order, **{wrong_field: _another_word(chance, wrong_field, than=getattr(order, wrong_field))})
    reply = chance.choice(_REPLIES)
    prompt = {"role": "user", "content": request}
    return {
        "chosen": [prompt, {"role": "assistant", "content": reply.format(**vars(order))}],
        "rejected": [prompt, {"role": "assistant", "content": reply.format(**vars(mistaken))}],
    }


def _cafe_rows(split: str) -> list[dict[str, Any]]:
    # The split is part of the seed, so that each split has draws of its own.
    chance = random.Random(f"0/{split}")
    return [_pair(chance, split) for _ in range(SPLITS[split])]


def _length_rows(split: str) -> list[dict[str, Any]]:
    """Makes pairs of random words with the lengths of UltraFeedback, for hardware plans, where only lengths count.

    UltraFeedback's median prompt has 121 tokens and its median response 288 (arXiv 2410.20305 gives their sum, 409, and
    their ratio, 0.42). Lengths are log-normal with sigma 0.5 and cut at four medians, as in the benchmarks.
    """
    chance = random.Random(f"lengths/{split}")

    def text(median: int) -> str:
        count = min(4 * median, round(median * math.exp(chance.gauss(0.0, 0.5))))
        return "".join(f" {word}" for word in chance.choices(DRINKS, k=max(1, count)))

    def pair() -> dict[str, list[dict[str, str]]]:
        prompt = {"role": "user", "content": text(121)}
        chosen, rejected = ({"role": "assistant", "content": text(288)} for _ in range(2))
        return {"chosen": [prompt, chosen], "rejected": [prompt, rejected]}

    return [pair() for _ in range(SPLITS[split])]


# --- the names after `builtin:`, as data sources and as tokenizers

_ROWS: dict[str, Callable[[str], list[dict[str, Any]]]] = {
    "cafe": _cafe_rows,
    "lengths": _length_rows,
    "manners": manners.make_pairs,
}
BUILTINS = tuple(_ROWS)
_TOKENIZERS = ("cafe", "lengths")  # those whose words the word-level tokenizer knows


def make_rows(name: str, split: str) -> list[dict[str, Any]]:
    """Makes the pairs of one split of a built-in data set. Every call gives the same pairs.

    Raises:
        DataError: there is no built-in data set of that name, or it has no such split.
    """
    _check_name(name, BUILTINS)
    splits = manners.SPLITS if name == "manners" else SPLITS
    if split not in splits:
        raise DataError(f"builtin:{name} has no split `{split}`; it has {', '.join(splits)}")
    return _ROWS[name](split)


def make_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Makes a word-level tokenizer for the words of the built-in data sets, with a chat template.

    Raises:
        DataError: there is no built-in tokenizer of that name.
    """
    # Imported here, because it takes seconds and rows are made without it.
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    _check_name(name, _TOKENIZERS)
    special = (_PAD, _BOS, _EOS, _UNKNOWN, "<|user|>", "<|assistant|>")
    words = sorted({word for text in _all_texts() for word in re.findall(_WORD, text)})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate((*special, *words))}, unk_token=_UNKNOWN))
    # A token is a word with the space before it, so that joined tokens give back the text.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_WORD), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(special))
    made: PreTrainedTokenizerBase = import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        bos_token=_BOS,
        eos_token=_EOS,
        unk_token=_UNKNOWN,
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=_CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    return made


def _all_texts() -> list[str]:
    """Lists every sentence form with every word, from which the vocabulary is made."""
    # A second thought follows an order, so its first word has a space before it.
    forms = [*_ORDERS, *_REPLIES, *(" " + form for forms in _SECOND_THOUGHTS.values() for form in forms)]
    order = _Order(SIZES[0], DRINKS[0], EXTRAS[0], NAMES[0])
    orders = [replace(order, **{field: word}) for field, words in _CHOICES.items() for word in words]
    return [form.format(**vars(order)) for form in forms for order in orders]


def _check_name(name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise DataError(f"there is no builtin:{name}; built in: {', '.join(f'builtin:{one}' for one in known)}")
