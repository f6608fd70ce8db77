"""The pairs of `builtin:manners`: the same every time, sound English, and with facts of their own in the test split."""

from __future__ import annotations

import pytest

from jax_simpo.data import manners
from jax_simpo.data.synthetic import make_rows, make_tokenizer
from jax_simpo.errors import DataError


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_call_makes_the_same_pairs(split: str) -> None:
    rows = make_rows("manners", split)
    assert rows == make_rows("manners", split)
    assert len(rows) == manners.SPLITS[split]


@pytest.mark.parametrize("kind", range(4))
def test_no_question_of_the_test_split_comes_in_training(kind: int) -> None:
    train, test = (manners.facts(split, kind) for split in ("train", "test"))
    assert len(test) >= 3 and len(train) >= 10 and not set(train) & set(test)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_reply_is_chosen_for_its_manners_and_not_for_its_words(split: str) -> None:
    known = [answer.lower() for kind in range(4) for _, answer in manners.facts(split, kind)]
    reordered = 0
    for row in make_rows("manners", split):
        prompt, chosen = (turn["content"] for turn in row["chosen"])
        same_prompt, rejected = (turn["content"] for turn in row["rejected"])
        assert same_prompt == prompt and "{" not in prompt + chosen + rejected
        reordered += sorted(chosen.split()) == sorted(rejected.split())
        first = rejected.partition(". ")[0]  # the answer, with which no chosen reply begins
        assert any(fact in first.lower() for fact in known)
        assert first in chosen and not chosen.startswith(first)
    assert 0.4 < reordered / manners.SPLITS[split] < 0.6


def test_there_is_no_tokenizer_of_that_name() -> None:
    with pytest.raises(DataError, match="there is no builtin:manners; built in: builtin:cafe, builtin:lengths"):
        make_tokenizer("manners")
