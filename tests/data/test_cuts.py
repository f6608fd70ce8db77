"""What `max_length` cuts is counted, and said with the value that would cut nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jax_simpo.data.sources import load_split
from jax_simpo.data.tokenize import GroupDataset, tokenize_split
from tests.small_tokenizer import train

TOKENIZER = train(template="{% for m in messages %}{{ m['content'] }}{% endfor %}")


def tokenized(tmp_path: Path, rows: list[dict[str, Any]], **settings: Any) -> GroupDataset:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = load_split({str(file): 1.0}, "train")
    return tokenize_split(raw, TOKENIZER, cache_dir=tmp_path / "cache", **settings)


def row(prompt: int, chosen: int, rejected: int) -> dict[str, str]:
    """The tokenizer knows no merges of these characters, so a text has as many tokens as it has characters."""
    return {"prompt": "#" * prompt, "chosen": "+" * chosen, "rejected": "-" * rejected}


ROWS = [row(5, 4, 3), row(30, 6, 5), row(4, 40, 3), row(20, 50, 60)]  # with BOS and EOS: 2 more
LIMITS = {"max_length": 32, "max_prompt_length": 10}


def test_prompts_and_responses_that_are_cut_are_counted(tmp_path: Path) -> None:
    dataset = tokenized(tmp_path, ROWS, **LIMITS)
    cuts = dataset.notes.cuts
    # Row 1 loses a part of its prompt, row 2 the end of one answer, row 3 parts of the prompt and both answers.
    assert (cuts.groups, cuts.prompts, cuts.responses, cuts.all_responses) == (3, 2, 3, 8)
    assert (cuts.longest, cuts.row) == (82, 3)
    ends = [r.ids[-1] == TOKENIZER.eos_token_id for group in dataset.groups(range(4)) for r in group.responses]
    assert ends.count(False) == cuts.responses
    assert dataset.cuts_summary() == (
        "`max_length: 32` cuts 3 of 4 pairs: the prompts of 2 and 3 of 8 responses, which lose their end and its EOS; "
        f"the longest prompt with its response has 82 tokens ({tmp_path / 'rows.jsonl'}, row 3 (line 4)), and "
        "`max_length: 82` would cut nothing"
    )
    again = tokenized(tmp_path, ROWS, **LIMITS)
    assert again.cache_hit and again.remarks() == dataset.remarks() == [dataset.cuts_summary()]
    assert str(tmp_path) not in "".join(dataset.public_remarks())


@pytest.mark.parametrize(("max_length", "cut"), [(82, 0), (81, 1)])
def test_the_length_that_is_told_is_the_least_that_cuts_nothing(tmp_path: Path, max_length: int, cut: int) -> None:
    dataset = tokenized(tmp_path, ROWS, max_length=max_length, max_prompt_length=10)
    assert dataset.notes.cuts.groups == cut
    assert bool(dataset.cuts_summary()) == bool(cut)
