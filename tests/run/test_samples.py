"""Samples are prompts as training sees them, answered where the answer begins, and texts that a person can read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jax_simpo.data import sources
from jax_simpo.data.chat import load_tokenizer
from jax_simpo.data.synthetic import make_tokenizer
from jax_simpo.data.tokenize import GroupDataset, tokenize_split
from jax_simpo.errors import DataError
from jax_simpo.run.samples import (
    drop_later,
    read_answers,
    read_samples,
    readable,
    sample_prompts,
    with_answers,
    write_samples,
)

HARMLESS = "hh_harmless.test.jsonl"


def tokenized(source: str, split: str, tokenizer: Any, cache: Path) -> GroupDataset:
    raw = sources.load_split({source: 1.0}, split)
    return tokenize_split(raw, tokenizer, max_length=2048, max_prompt_length=1800, cache_dir=cache)


def test_samples_of_the_quickstart_read_like_a_cafe(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("cafe")
    pairs = tokenized("builtin:cafe", "test", tokenizer, tmp_path)
    samples, prompts = sample_prompts(pairs, tokenizer, 3)
    assert len(samples) == len(prompts) == 3
    for index, (sample, ids) in enumerate(zip(samples, prompts, strict=True)):
        text = pairs.texts(index)
        assert "<|" not in sample.prompt + sample.chosen + sample.rejected
        assert sample.prompt in text.prompt
        assert tokenizer.decode(ids) == text.prompt + "<|assistant|>"


@pytest.mark.parametrize(
    ("name", "header"),
    [("llama3", "<|start_header_id|>assistant<|end_header_id|>\n\n"), ("bpe4k", "<|assistant|>\n")],
)
def test_a_prompt_goes_on_to_where_the_answer_begins(name: str, header: str, shared: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(shared / "tokenizers" / name)
    pairs = tokenized(str(shared / "data" / HARMLESS), "train", tokenizer, tmp_path)
    _, prompts = sample_prompts(pairs, tokenizer, 20)
    for index, ids in enumerate(prompts):
        assert tokenizer.decode(ids).endswith(pairs.texts(index).prompt + header)
        assert ids.tolist() == pairs.group(index).responses[0].ids[: len(ids)].tolist()


def test_a_template_without_a_header_gets_none(shared: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(shared / "tokenizers" / "bpe4k-inst")
    pairs = tokenized(str(shared / "data" / HARMLESS), "train", tokenizer, tmp_path)
    _, prompts = sample_prompts(pairs, tokenizer, 20)
    assert [len(ids) for ids in prompts] == [pairs.group(index).responses[0].prompt_length for index in range(20)]


@pytest.mark.parametrize(
    ("header", "told"),
    [("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"), ("{{ 'a' * 10000000000 }}", "it takes more than 1.1 GB")],
)
def test_a_template_that_fails_to_write_a_header_is_told(header: str, told: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer("cafe")
    pairs = tokenized("builtin:cafe", "test", tokenizer, tmp_path)
    tokenizer.chat_template += f"{{% if add_generation_prompt %}}{header}{{% endif %}}"
    with pytest.raises(DataError, match=rf"cannot write what an answer begins with \({told}.*set `sample_prompts: 0`"):
        sample_prompts(pairs, tokenizer, 3)


def test_turns_of_a_conversation_are_named(shared: Path) -> None:
    messages = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "A café.\nAnd you?"},
        {"role": "user", "content": "A guest."},
    ]
    for name in ("llama3", "bpe4k"):
        tokenizer = load_tokenizer(shared / "tokenizers" / name)
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
        assert readable(text, tokenizer) == "User: Who are you?\nAssistant: A café.\nAnd you?\nUser: A guest."
        answer = str(tokenizer.apply_chat_template(messages[2:3], tokenize=False))
        assert readable(answer, tokenizer) == "A café.\nAnd you?"


def test_an_answer_of_nothing_but_special_tokens_is_not_shown_as_empty() -> None:
    tokenizer = make_tokenizer("cafe")
    user, eos = tokenizer.convert_tokens_to_ids(["<|user|>", "<|end|>"])
    assert read_answers([[user, user, eos], []], tokenizer) == ["<|user|> (2 times) <|end|>", ""]


def test_answers_are_filled_in_one_after_the_other(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("cafe")
    samples, _ = sample_prompts(tokenized("builtin:cafe", "test", tokenizer, tmp_path), tokenizer, 2)
    ids = tokenizer("Thank you, Anna.", add_special_tokens=False)["input_ids"]
    texts = read_answers([ids, []], tokenizer)
    assert texts == ["Thank you, Anna.", ""]
    samples = with_answers(samples, "before", ["", ""], step=0)
    samples = with_answers(samples, "during", ["Thank you.", "Tea."], step=2)
    samples = with_answers(samples, "during", ["Thank you!", "Tea!"], step=4)
    samples = with_answers(samples, "after", texts, step=6)
    assert [(s.before, s.after) for s in samples] == [("", "Thank you, Anna."), ("", "")]
    assert [s.during for s in samples] == [{"2": "Thank you.", "4": "Thank you!"}, {"2": "Tea.", "4": "Tea!"}]

    write_samples(tmp_path, samples)
    drop_later(tmp_path, 3)  # a killed run goes on from step 3
    assert [s.during for s in read_samples(tmp_path)] == [{"2": "Thank you."}, {"2": "Tea."}]
    assert [(s.before, s.after) for s in read_samples(tmp_path)] == [(s.before, s.after) for s in samples]
