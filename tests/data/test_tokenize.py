"""Pairs become the token ids of the original, splits are cached, and bad rows are reported or skipped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from jax_simpo.data.chat import GroupText, load_tokenizer, render_group
from jax_simpo.data.conversations import read_conversation
from jax_simpo.data.groups import GroupLengths, Response
from jax_simpo.data.messages import BadRow
from jax_simpo.data.sources import RawSplit, load_split
from jax_simpo.data.tokenize import GroupDataset, tokenize_group, tokenize_split
from jax_simpo.errors import DataError
from tests.small_tokenizer import save, train

SETTINGS: dict[str, Any] = {"max_length": 48, "max_prompt_length": 24, "truncation_mode": "keep_end"}
TOKENIZER = train(template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
HUGE = 10**6

words = st.text("ab [/INST]", min_size=1, max_size=60)
modes = st.sampled_from(["keep_end", "keep_start"])


def tokenize(text: GroupText, max_length: int, max_prompt_length: int, mode: Any = "keep_end") -> Any:
    return tokenize_group(
        text, TOKENIZER, max_length=max_length, max_prompt_length=max_prompt_length, truncation_mode=mode
    )


def parts(response: Response) -> tuple[list[int], list[int]]:
    ids = response.ids.tolist()
    return ids[: response.prompt_length], ids[response.prompt_length :]


def tokenize_untruncated(text: GroupText) -> Any:
    assume(text.responses[0] != text.responses[1])
    return tokenize(text, HUGE, HUGE)


# --- the original's tokens


@pytest.fixture(scope="module")
def golden(shared: Path) -> list[dict[str, Any]]:
    with (shared / "golden" / "simpo_tokenization.jsonl").open() as file:
        return [json.loads(line) for line in file]


def test_all_golden_rows_are_equal_in_text_and_tokens(shared: Path, golden: list[dict[str, Any]]) -> None:
    tokenizers = {n: load_tokenizer(shared / "tokenizers" / n) for n in sorted({g["tokenizer"] for g in golden})}
    splits = {name: load_split({str(shared / "data"): 1.0}, name) for name in sorted({g["file"] for g in golden})}
    equal = 0
    for row in golden:
        tokenizer = tokenizers[row["tokenizer"]]
        text = render_group(
            read_conversation(splits[row["file"]].row(row["row"])), tokenizer, row["auto_insert_empty_system_msg"]
        )
        assert (text.prompt, text.responses[0], text.responses[1]) == tuple(
            row[f"text_{part}"] for part in ("prompt", "chosen", "rejected")
        )
        settings = {key: row[key] for key in ("max_length", "max_prompt_length", "truncation_mode")}
        pair = tokenize_group(text, tokenizer, **settings)
        for name, response in (("chosen", pair.responses[0]), ("rejected", pair.responses[1])):
            assert response.ids.tolist() == row[f"{name}_input_ids"], (row["file"], row["row"], name)
            assert len(response.targets) == row[f"{name}_response_length"]
        equal += 1
    assert equal == len(golden) == 251


def test_a_split_at_once_gives_the_golden_objects(shared: Path, golden: list[dict[str, Any]], tmp_path: Path) -> None:
    rows = {g["row"]: g for g in golden if g["tokenizer"] == "bpe4k-inst" and g["file"] == "hh_harmless.train"}
    raw = load_split({str(shared / "data"): 1.0}, "hh_harmless.train")
    tokenizer = load_tokenizer(shared / "tokenizers" / "bpe4k-inst")
    dataset = tokenize_split(raw, tokenizer, max_length=2048, max_prompt_length=1800, cache_dir=tmp_path)
    objects = list(dataset.inspect_objects())
    assert [o["row"] for o in objects] == list(range(1300))
    merged = 0
    for row, expected in rows.items():
        keys = set(expected) & set(objects[row]) - {"file"}
        assert len(keys) == 8
        assert {k: objects[row][k] for k in keys} == {k: expected[k] for k in keys}
        prompts = dataset.group(row).responses[0].prompt_length, dataset.group(row).responses[1].prompt_length
        merged += (
            prompts[0] != prompts[1]
            or objects[row]["chosen_input_ids"][prompts[0] - 1] != (objects[row]["rejected_input_ids"][prompts[1] - 1])
        )
    assert merged  # the golden rows of this tokenizer have prompts that differ


# --- one pair: boundary, BOS, EOS, truncation


@given(words, words, words)
def test_the_ids_are_those_of_the_whole_text_between_bos_and_eos(prompt: str, chosen: str, rejected: str) -> None:
    pair = tokenize_untruncated(GroupText(prompt, (chosen, rejected)))
    for answer, response in ((chosen, pair.responses[0]), (rejected, pair.responses[1])):
        ids = TOKENIZER(prompt + answer, add_special_tokens=False)["input_ids"]
        assert response.ids.tolist() == [TOKENIZER.bos_token_id, *ids, TOKENIZER.eos_token_id]


def test_the_boundary_moves_back_by_one_where_the_last_prompt_token_merges() -> None:
    text = GroupText("cataaa ", ("aa!", "!"))
    alone, merged = (TOKENIZER(t, add_special_tokens=False)["input_ids"] for t in ("cataaa ", "cataaa aa!"))
    assert merged[: len(alone)] != alone and merged[: len(alone) - 1] == alone[:-1]
    pair = tokenize(text, HUGE, HUGE)
    assert (pair.responses[0].prompt_length, pair.responses[1].prompt_length) == (
        len(alone),
        1 + len(alone),
    )  # with BOS


def test_where_more_than_the_last_token_merges_the_answer_begins_with_the_first_changed_token() -> None:
    vocabulary = [("<s>", 0.0), ("</s>", 0.0), *((token, -1.0) for token in ("q", "a", "b", "c", "d", "e", "abcd"))]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(Unigram(vocabulary, unk_id=0)), bos_token="<s>", eos_token="</s>"
    )
    pair = tokenize_group(GroupText("qabc", ("de", "e")), tokenizer, **SETTINGS)  # the original stops with an exception
    assert tokenizer.convert_ids_to_tokens(pair.responses[0].ids.tolist()) == ["<s>", "q", "abcd", "e", "</s>"]
    assert (pair.responses[0].prompt_length, pair.responses[1].prompt_length) == (2, 5)


def test_bos_and_eos_that_the_template_wrote_are_not_doubled() -> None:
    pair = tokenize(GroupText("<s>the cat", (" sat</s>", " ran</s>")), HUGE, HUGE)
    for response in (pair.responses[0], pair.responses[1]):
        assert (response.ids == TOKENIZER.bos_token_id).sum() == 1
        assert (response.ids == TOKENIZER.eos_token_id).sum() == 1


def test_without_a_bos_token_none_is_put_first() -> None:
    tokenizer = train(special={"eos_token": "</s>"})
    pair = tokenize_group(GroupText("the cat", (" sat", " ran")), tokenizer, **SETTINGS)
    assert pair.responses[0].ids[0] == tokenizer("the cat", add_special_tokens=False)["input_ids"][0]


@given(words, words, words, st.integers(3, 60), st.data(), modes)
def test_truncation_cuts_the_prompt_as_the_original_and_answers_only_as_far_as_needed(
    prompt: str, chosen: str, rejected: str, max_length: int, data: st.DataObject, mode: str
) -> None:
    max_prompt_length = data.draw(st.integers(1, max_length - 1))
    text = GroupText(prompt, (chosen, rejected))
    full = tokenize_untruncated(text)
    longer = max(len(full.responses[0].targets), len(full.responses[1].targets))
    try:
        cut = tokenize(text, max_length, max_prompt_length, mode)
    except BadRow as bad:  # nothing but the difference of the two answers can have been lost
        assert "differ only beyond" in bad.detail
        return
    for before, after in ((full.responses[0], cut.responses[0]), (full.responses[1], cut.responses[1])):
        (full_prompt, full_answer), (cut_prompt, cut_answer) = parts(before), parts(after)
        if len(full_prompt) + longer <= max_length:
            assert after.ids.tolist() == before.ids.tolist()
            continue
        keep = slice(-max_prompt_length, None) if mode == "keep_end" else slice(max_prompt_length)
        assert cut_prompt == full_prompt[keep]
        assert cut_answer == full_answer[: len(cut_answer)]
        assert len(cut_answer) == min(len(full_answer), max_length - len(cut_prompt))


def test_a_long_answer_to_a_short_prompt_loses_only_what_does_not_fit() -> None:
    text = GroupText("the cat", (" x" * 100, " y"))
    full = tokenize(text, HUGE, HUGE)
    max_length = len(full.responses[0].ids) - 1  # one token too many
    cut = tokenize(text, max_length, max_length - 10)
    assert cut.responses[0].ids.tolist() == full.responses[0].ids.tolist()[:-1]
    assert cut.responses[1].ids.tolist() == full.responses[1].ids.tolist()


@pytest.mark.parametrize("limits", [(10, 10), (10, 20), (10, 0)])
def test_limits_that_leave_no_answer_make_a_bad_row(limits: tuple[int, int]) -> None:
    with pytest.raises(BadRow, match="nothing left after truncation"):
        tokenize(GroupText("the cat sat on the mat and ran " * 3, (" a", " b")), *limits)


# --- a split


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def random_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)

    def text() -> str:
        return "".join(rng.choice(list("abcd "), rng.integers(1, 50))) + "."

    rows = []
    for i in range(count):
        question = text()
        rows.append({"chosen": turns(question, f"{i} {text()}"), "rejected": turns(question, text())})
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> RawSplit:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_split({str(path): 1.0}, "train")


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., GroupDataset]:
    def run(raw: RawSplit, tokenizer: PreTrainedTokenizerBase = TOKENIZER, **settings: Any) -> GroupDataset:
        return tokenize_split(raw, tokenizer, **{**SETTINGS, "cache_dir": tmp_path / "cache", **settings})

    return run


def test_a_split_holds_the_pairs_one_by_one(tmp_path: Path, run: Callable[..., GroupDataset]) -> None:
    rows = random_rows(1100)  # three chunks
    dataset = run(write(tmp_path / "pairs.jsonl", rows))
    expected = [
        tokenize_group(render_group(read_conversation(row), TOKENIZER, True), TOKENIZER, **SETTINGS) for row in rows
    ]
    assert len(dataset) == 1100
    indices = np.random.default_rng(1).permutation(1100)
    for index, pair in zip(indices, dataset.groups(indices), strict=True):
        for ours, theirs in zip(pair.responses, expected[index].responses, strict=True):
            assert ours.prompt_length == theirs.prompt_length
            np.testing.assert_array_equal(ours.ids, theirs.ids)
    measured = GroupLengths.of(expected)
    for name, column in vars(dataset.lengths).items():
        np.testing.assert_array_equal(column, getattr(measured, name), err_msg=name)
        assert column.dtype == (np.int64 if name == "tree_visible" else np.int32)
    assert dataset.texts(700) == render_group(read_conversation(rows[700]), TOKENIZER, True)
    assert dataset.origin(700) == dataset.origins[700] == (str(tmp_path / "pairs.jsonl"), 700)


def test_an_index_outside_is_an_index_error(tmp_path: Path, run: Callable[..., GroupDataset]) -> None:
    dataset = run(write(tmp_path / "pairs.jsonl", random_rows(3)))
    for index in (3, -1):
        with pytest.raises(IndexError):
            dataset.group(index)
    assert dataset.groups([]) == []


def test_parallel_and_serial_give_the_same_pairs(tmp_path: Path, run: Callable[..., GroupDataset]) -> None:
    raw = write(tmp_path / "pairs.jsonl", random_rows(600))
    results = [list(run(raw, num_proc=n, cache_dir=tmp_path / str(n)).inspect_objects()) for n in (1, 2, None)]
    assert results[0] == results[1] == results[2]


def test_a_second_run_reads_the_cache_and_tokenises_nothing(
    tmp_path: Path, run: Callable[..., GroupDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = write(tmp_path / "pairs.jsonl", random_rows(20))
    first = run(raw)
    monkeypatch.setattr("jax_simpo.data.tokenize._encode", lambda *_: pytest.fail("tokenised again"))
    moved = (tmp_path / "pairs.jsonl").rename(tmp_path / "moved.jsonl")
    again = run(load_split({str(moved): 1.0}, "train"))
    assert (first.cache_hit, again.cache_hit) == (False, True)
    assert again.origin(3) == (str(moved), 3)
    assert [o | {"file": ""} for o in again.inspect_objects()] == [o | {"file": ""} for o in first.inspect_objects()]


@pytest.mark.parametrize("name", ["groups.arrow", "notes.json", "sums.json"])
@pytest.mark.parametrize("harm", ["flip a bit", "cut", "empty", "remove"])
def test_tokens_that_were_damaged_in_the_cache_are_made_again(
    name: str, harm: str, tmp_path: Path, run: Callable[..., GroupDataset]
) -> None:
    raw = write(tmp_path / "pairs.jsonl", random_rows(20))
    first = list(run(raw).inspect_objects())
    (file,) = (tmp_path / "cache").glob(f"*/{name}")
    content = bytearray(file.read_bytes())
    if harm == "remove":
        file.unlink()
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes({"flip a bit": content, "cut": content[: len(content) // 2], "empty": b""}[harm])
    again = run(raw)
    assert not again.cache_hit and str(tmp_path / "cache") in again.cache_damage
    assert list(again.inspect_objects()) == first
    assert run(raw).cache_hit and not run(raw).cache_damage


def test_the_fingerprint_tells_one_data_set_from_another(tmp_path: Path, run: Callable[..., GroupDataset]) -> None:
    first = run(write(tmp_path / "pairs.jsonl", random_rows(5)))
    same = run(write(tmp_path / "copy.jsonl", random_rows(5)), cache_dir=tmp_path / "elsewhere")
    other = run(write(tmp_path / "pairs.jsonl", random_rows(5, seed=1)))
    shorter = run(write(tmp_path / "pairs.jsonl", random_rows(5)), max_length=47)
    assert first.fingerprint == same.fingerprint
    assert len({first.fingerprint, other.fingerprint, shorter.fingerprint}) == 3


@pytest.mark.parametrize("set_before", [None, "3"])
def test_the_environment_is_left_as_it_was(
    set_before: str | None, tmp_path: Path, run: Callable[..., GroupDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM"):
        monkeypatch.delenv(name, raising=False)
        if set_before is not None:
            monkeypatch.setenv(name, set_before)
    before = dict(os.environ)
    run(write(tmp_path / "pairs.jsonl", random_rows(5)), num_proc=2)
    assert dict(os.environ) == before


def test_the_state_a_call_leaves_in_the_tokenizer_is_no_cache_miss(
    tmp_path: Path, run: Callable[..., GroupDataset]
) -> None:
    raw = write(tmp_path / "pairs.jsonl", random_rows(5))
    tokenizer = load_tokenizer(save(tmp_path / "tokenizer", template="{{ messages[-1]['content'] }}"))
    run(raw, tokenizer)
    tokenizer("the cat", truncation=True, max_length=1, padding="max_length")
    assert run(raw, tokenizer).cache_hit
    assert run(raw, load_tokenizer(tmp_path / "tokenizer")).cache_hit


def changed_template() -> PreTrainedTokenizerBase:
    return train(template="{% for m in messages %}{{ m['content'] }}!{% endfor %}")


def changed_special_token() -> PreTrainedTokenizerBase:
    tokenizer = train(template=TOKENIZER.chat_template)
    tokenizer.bos_token = "</s>"
    return tokenizer


def changed_vocabulary() -> PreTrainedTokenizerBase:
    tokenizer = train(template=TOKENIZER.chat_template)
    tokenizer.add_tokens(["cat"])
    return tokenizer


CHANGES: dict[str, dict[str, Any]] = {
    "max_length": {"max_length": 47},
    "max_prompt_length": {"max_prompt_length": 23},
    "truncation_mode": {"truncation_mode": "keep_start"},
    "system message": {"auto_insert_empty_system_msg": False},
    "template": {"tokenizer": changed_template},
    "special token": {"tokenizer": changed_special_token},
    "vocabulary": {"tokenizer": changed_vocabulary},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_of_settings_or_tokenizer_is_a_cache_miss(
    change: dict[str, Any], tmp_path: Path, run: Callable[..., GroupDataset]
) -> None:
    raw = write(tmp_path / "pairs.jsonl", random_rows(5))
    run(raw)
    assert not run(raw, **{k: v() if callable(v) else v for k, v in change.items()}).cache_hit
    assert run(raw).cache_hit


def test_changed_rows_and_a_changed_version_are_cache_misses(
    tmp_path: Path, run: Callable[..., GroupDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = write(tmp_path / "pairs.jsonl", random_rows(5))
    run(raw)
    assert not run(write(tmp_path / "pairs.jsonl", random_rows(5, seed=1))).cache_hit
    monkeypatch.setattr("jax_simpo.data.store.TOKENISATION_VERSION", 0)
    assert not run(raw).cache_hit


def test_an_interrupted_run_leaves_no_cache_behind(
    tmp_path: Path, run: Callable[..., GroupDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = write(tmp_path / "pairs.jsonl", random_rows(1000))
    encode = tokenize_split.__globals__["_encode"]
    calls = []

    def interrupted(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("jax_simpo.data.tokenize._encode", interrupted)
        run(raw)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    dataset = run(raw)
    assert (len(dataset), dataset.cache_hit) == (1000, False)


def test_the_cache_is_where_hugging_face_keeps_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    tokenize_split(write(tmp_path / "pairs.jsonl", random_rows(2)), TOKENIZER, **SETTINGS)
    assert list((tmp_path / "hf" / "jax_simpo").glob("*/groups.arrow"))


def test_a_cache_folder_that_cannot_be_made_is_an_error_that_names_the_key_that_chose_it(
    tmp_path: Path, run: Callable[..., GroupDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "file"))
    raw = write(tmp_path / "pairs.jsonl", random_rows(2))
    with pytest.raises(DataError, match=r"file/cache: .*: set `data_cache_dir` to a folder"):
        run(raw, cache_dir=tmp_path / "file" / "cache")
    with pytest.raises(DataError, match=r"file/jax_simpo: .*: set HF_DATASETS_CACHE \(or `data_cache_dir`\)"):
        run(raw, cache_dir=None)


# --- bad rows


def with_bad_rows() -> list[dict[str, Any]]:
    rows = random_rows(30)
    rows[4] = {"chosen": turns("q", "same"), "rejected": turns("q", "same")}
    rows[7] = {"chosen": turns("q", " "), "rejected": turns("q", "b")}
    rows[8] = {"chosen": turns("q", ""), "rejected": turns("q", "b")}
    rows[20] = {"chosen": turns("q", "x" * 90 + "a"), "rejected": turns("q", "x" * 90 + "b")}
    return rows


def test_bad_rows_stop_the_run_with_file_row_line_reason_and_total(
    tmp_path: Path, run: Callable[..., GroupDataset]
) -> None:
    raw = write(tmp_path / "pairs.jsonl", with_bad_rows())
    for _ in range(2):  # the second time from the cache
        with pytest.raises(DataError) as caught:
            run(raw)
        message = str(caught.value)
        assert "4 of 30 rows of train cannot be used" in message
        assert f"{tmp_path / 'pairs.jsonl'}, row 4 (line 5): chosen = rejected" in message
        assert f"{tmp_path / 'pairs.jsonl'}, row 20 (line 21): same tokens: the answers differ only beyond" in message
        assert "on_bad_row: skip" in message


def test_a_kind_of_bad_rows_is_told_once_with_its_count(tmp_path: Path, run: Callable[..., GroupDataset]) -> None:
    rows = [{"prompt": " ", "chosen": "a", "rejected": "b", "id": 7}, {"prompt": "q", "chosen": "a", "rejected": "b"}]
    with pytest.raises(DataError, match=r"25 of 50 rows of train cannot be used:\n") as caught:
        run(write(tmp_path / "pairs.jsonl", rows * 25))
    _, kind, columns, _ = str(caught.value).splitlines()
    assert "row 0 " in kind and kind.endswith("(25 of this kind, also rows 2, 4, 6, 8, 10 and 19 more)")
    assert columns.endswith("pairs.jsonl: read as pairs (prompt, chosen, rejected); columns not used: id")


@pytest.mark.parametrize("second", ["fresh", "cached"])
def test_skipped_rows_are_counted_and_summarised(second: str, tmp_path: Path, run: Callable[..., GroupDataset]) -> None:
    raw = write(tmp_path / "pairs.jsonl", with_bad_rows())
    dataset = run(raw, on_bad_row="skip")
    if second == "cached":
        dataset = run(raw, on_bad_row="skip")
        assert dataset.cache_hit
    assert [(row.index, row.kind) for row in dataset.skipped] == [
        (4, "chosen = rejected"),
        (7, "empty response"),
        (8, "empty response"),
        (20, "same tokens"),
    ]
    assert dataset.skipped_summary() == ("4 of 30 rows skipped: 2 empty response, 1 chosen = rejected, 1 same tokens")
    lines = dataset.skipped_report().splitlines()
    assert lines[:2] == [
        dataset.skipped_summary(),
        f"  {tmp_path / 'pairs.jsonl'}, row 4 (line 5): chosen = rejected: the two answers are the same, so there is "
        "nothing to prefer",
    ]
    assert len(lines) == 5 and lines[2].endswith("(2 of this kind, also row 8)")
    assert lines[4].endswith("pairs.jsonl: read as dialogues (chosen, rejected)")
    assert len(dataset) == 26
    assert [row for _, row in dataset.origins] == [i for i in range(30) if i not in (4, 7, 8, 20)]


def test_a_split_of_bad_rows_only_is_an_error(tmp_path: Path, run: Callable[..., GroupDataset]) -> None:
    with pytest.raises(DataError, match=r"no row of train can be used: 3 of 3 rows skipped: 3 no prompt"):
        run(write(tmp_path / "pairs.jsonl", [{"prompt": [], "chosen": "a", "rejected": "b"}] * 3), on_bad_row="skip")


# --- the real files


@pytest.mark.parametrize("name", ["llama3", "bpe4k-inst"])
def test_real_files_have_no_bad_row(shared: Path, tmp_path: Path, name: str) -> None:
    tokenizer = load_tokenizer(shared / "tokenizers" / name)
    for split, count in (("hh_harmless.train", 1300), ("hh_harmless.test", 200), ("dpo_en_demo", 300)):
        raw = load_split({str(shared / "data"): 1.0}, split)
        dataset = tokenize_split(raw, tokenizer, max_length=2048, max_prompt_length=1800, cache_dir=tmp_path)
        assert len(dataset) == count and not dataset.skipped
