"""The built-in café teaches what it should, and its tokenizer knows its words."""

from __future__ import annotations

import re

import pytest

from jax_simpo.data import synthetic
from jax_simpo.errors import DataError


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
    return {split: synthetic.make_rows("cafe", split) for split in synthetic.SPLITS}


def test_rows_are_the_same_every_time(rows):
    assert synthetic.make_rows("cafe", "train") == rows["train"]


def test_no_held_out_combination_of_drink_and_extra_is_ever_right_in_training(rows):
    def combinations(split: str) -> set[tuple[str, str]]:
        replies = [_words(row["chosen"][1]["content"]) for row in rows[split]]
        drinks, extras = set(synthetic.DRINKS), set(synthetic.EXTRAS)
        return {(min(words & drinks), min(words & extras)) for words in replies}

    assert combinations("train").isdisjoint(combinations("test"))
    assert len(combinations("train")) + len(combinations("test")) == len(synthetic.DRINKS) * len(synthetic.EXTRAS)


def test_no_held_out_prompt_stands_in_training(rows):
    train = {row["chosen"][0]["content"] for row in rows["train"]}
    assert train.isdisjoint(row["chosen"][0]["content"] for row in rows["test"])


def test_the_replies_of_a_pair_differ_in_exactly_one_word(rows):
    for row in rows["train"]:
        chosen, rejected = (row[side][1]["content"].split() for side in ("chosen", "rejected"))
        assert row["chosen"][0] == row["rejected"][0]
        assert len(chosen) == len(rejected)
        assert sum(a != b for a, b in zip(chosen, rejected, strict=True)) == 1


def test_chosen_and_rejected_use_each_word_about_equally_often(rows):
    """An untrained model, which can only prefer words, is then right half of the time."""
    for word in (*synthetic.SIZES, *synthetic.DRINKS, *synthetic.EXTRAS):
        chosen, rejected = (
            sum(word in _words(row[side][1]["content"]) for row in rows["train"]) for side in ("chosen", "rejected")
        )
        assert abs(chosen - rejected) < 0.2 * (chosen + rejected) / 2, word


def test_the_tokenizer_gives_back_every_text_and_knows_every_word(rows):
    tokenizer = synthetic.make_tokenizer("cafe")
    for split in rows:
        for row in rows[split]:
            for side in ("chosen", "rejected"):
                text = tokenizer.apply_chat_template(row[side], tokenize=False)
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                assert tokenizer.unk_token_id not in ids
                assert tokenizer.decode(ids) == text


def test_the_saved_tokenizer_loads_with_transformers_and_agrees(tmp_path, rows):
    from transformers import AutoTokenizer

    tokenizer = synthetic.make_tokenizer("cafe")
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    messages = rows["test"][0]["chosen"]
    assert loaded.apply_chat_template(messages) == tokenizer.apply_chat_template(messages)
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<|begin|>", "<|end|>", "<|pad|>")


def test_an_unknown_name_or_split_is_an_error_that_lists_the_known_ones():
    with pytest.raises(DataError, match=r"no builtin:caffe; built in: builtin:cafe"):
        synthetic.make_rows("caffe", "train")
    with pytest.raises(DataError, match=r"builtin:cafe has no split `dev`; it has train, test"):
        synthetic.make_rows("cafe", "dev")
