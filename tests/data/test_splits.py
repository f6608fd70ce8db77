"""Pairs of several splits that are read as one know which split they belong to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from jax_simpo.data import sources
from jax_simpo.data.synthetic import make_tokenizer
from jax_simpo.data.tokenize import tokenize_split

GOOD = {"prompt": "A tea", "chosen": "One tea", "rejected": "One coffee"}
BAD = {"prompt": "A tea", "chosen": "One tea", "rejected": "One tea"}


def test_the_pairs_of_each_split_are_known_though_rows_are_skipped_and_sources_alternate(tmp_path: Path) -> None:
    rows = {"one": {"a": [BAD, GOOD], "b": [GOOD, GOOD]}, "two": {"a": [GOOD, BAD], "b": [BAD, GOOD, BAD]}}
    for source, splits in rows.items():
        (tmp_path / source).mkdir()
        for split, pairs in splits.items():
            lines = [json.dumps({**pair, "prompt": f"{source} {split} {i}"}) for i, pair in enumerate(pairs)]
            (tmp_path / source / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    raw = sources.load_eval({str(tmp_path / "one"): 0.5, str(tmp_path / "two"): 0.0}, ["a", "b"])
    assert len(raw) == 9  # fractions are for training
    pairs = tokenize_split(
        raw,
        make_tokenizer("cafe"),
        max_length=128,
        max_prompt_length=64,
        on_bad_row="skip",
        cache_dir=tmp_path / "cache",
    )
    files = [file for file, _ in pairs.origins]
    assert list(pairs.splits) == ["a", "b"]
    for split, indices in pairs.splits.items():
        assert indices.tolist() == np.flatnonzero([file.endswith(f"{split}.jsonl") for file in files]).tolist()
    assert [len(indices) for indices in pairs.splits.values()] == [2, 3]


def test_a_split_that_is_read_alone_has_all_pairs(tmp_path: Path) -> None:
    raw = sources.load_split({"builtin:cafe": 1.0}, "test")
    pairs = tokenize_split(raw, make_tokenizer("cafe"), max_length=128, max_prompt_length=64, cache_dir=tmp_path)
    assert {split: indices.tolist() for split, indices in pairs.splits.items()} == {"test": list(range(len(pairs)))}
