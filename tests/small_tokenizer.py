"""A byte-level BPE tokenizer trained on the spot, for tests that must run without the real ones."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "the cat sat on the mat and the dog ran to the cat",
    "[INST] what is the answer [/INST] the answer is a cat",
    "aaab abab bbaa abba aabb ab ba a b aab abb baa bba",
] * 20


def train(special: dict[str, str] | None = None, template: str | None = None) -> PreTrainedTokenizerFast:
    """Words are not kept apart, so that merges reach across the boundary of prompt and answer."""
    special = {"bos_token": "<s>", "eos_token": "</s>"} if special is None else special
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=4,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **special)


def save(folder: Path, special: dict[str, str] | None = None, template: str | None = None) -> Path:
    """A tokenizer folder as a user has it."""
    train(special, template).save_pretrained(folder)
    return folder
