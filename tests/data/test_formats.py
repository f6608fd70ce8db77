"""Every format that docs/data-formats.md shows is found by itself and means what the page says; others are refused."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest

from jax_simpo.data.conversations import Conversation, make_conversation, read_row
from jax_simpo.data.detection import SAMPLE
from jax_simpo.data.formats import BY_NAME, FORMATS
from jax_simpo.data.messages import BadRow
from jax_simpo.data.ranking import GroupSettings
from jax_simpo.data.selection import Selection
from jax_simpo.data.sources import RawSplit, divide, from_memory, load_eval, load_named, load_split, load_train
from jax_simpo.errors import DataError

PAGE = (Path(__file__).parents[2] / "docs/data-formats.md").read_text()


def examples(heading: str) -> list[list[dict[str, Any]]]:
    """Returns the examples of a section of the page, each a list of the rows that stand under one another."""
    section = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    assert section is not None
    (block,) = re.findall(r"```json\n(.*?)```", section[1], re.S)
    rows, decoder = [], json.JSONDecoder()
    for text in block.split("\n\n"):
        together = []
        while text := text.strip():
            row, end = decoder.raw_decode(text)
            together.append(row)
            text = text[end:]
        rows.append(together)
    return rows


DOCUMENTED = [(entry.name, rows) for entry in FORMATS for rows in examples(f"`{entry.name}`")]


def conversation(raw: RawSplit) -> Conversation:
    return make_conversation([read_row(raw.row(i)) for i in range(len(raw))], GroupSettings())


def is_the_pair(read: Conversation) -> bool:
    *_, last = read.prompt
    asked = " ".join(last["content"].split())
    answers = [[turn["content"] for turn in answer] for answer in read.answers]
    return asked == "Name a tea." and last["role"] == "user" and answers == [["Darjeeling."], ["Espresso."]]


@pytest.mark.parametrize(("name", "rows"), DOCUMENTED)
def test_every_documented_row_is_found_by_itself_and_says_the_same(name: str, rows: list[dict[str, Any]]) -> None:
    raw = from_memory("rows", rows)
    assert raw.layouts[0].formats == (name,)
    assert is_the_pair(conversation(raw))
    named = from_memory("rows", rows, selection=Selection(dataset_format=name))
    assert named.table == raw.table and named.fingerprint == raw.fingerprint


@pytest.mark.parametrize("rows", examples("Refused"))
def test_rows_without_a_comparison_are_refused_as_what_they_are(rows: list[dict[str, Any]]) -> None:
    labelled = "label" in rows[0] or "kto_tag" in rows[0]
    with pytest.raises(DataError, match="unpaired rows, as for KTO" if labelled else "as for supervised fine-tuning"):
        from_memory("rows", rows)


def test_a_system_column_and_the_history_come_before_the_prompt() -> None:
    (row,) = examples("`alpaca`")[-1]
    assert conversation(from_memory("rows", [row])).prompt == [
        {"role": "system", "content": "You know plants."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Good morning"},
        {"role": "user", "content": "Name\na tea."},
    ]


def test_a_system_column_that_contradicts_the_conversation_is_a_bad_row() -> None:
    turns = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "q"}]
    row = {"prompt": turns, "chosen": "a", "rejected": "b"}
    assert read_row({**row, "system": "Be short."}).prompt == read_row({**row, "system": ""}).prompt == turns
    with pytest.raises(BadRow, match="two system messages"):
        read_row({**row, "system": "Be long."})


def test_tool_calls_of_sharegpt_become_calls() -> None:
    turns = [
        {"from": "human", "value": "Which tea?"},
        {"from": "function_call", "value": '{"name": "shop", "arguments": {"what": "tea"}}'},
        {"from": "observation", "value": "Darjeeling"},
    ]
    row = {"conversations": turns, "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}}
    raw = from_memory("rows", [row])
    assert conversation(raw).prompt == [
        {"role": "user", "content": "Which tea?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "shop", "arguments": {"what": "tea"}}}],
        },
        {"role": "tool", "content": "Darjeeling"},
    ]
    for broken in ("shop", "[]", '{"arguments": 1}'):
        with pytest.raises(BadRow, match="wrong tools"):
            read_row({**row, "prompt": [turns[0], {"from": "function_call", "value": broken}, turns[2]]})


@pytest.mark.parametrize(
    ("row", "first", "second"),
    [
        ({"prompt": "q", "instruction": "r", "input": "s", "chosen": "a", "rejected": "b"}, "pairs", "alpaca"),
        (
            {"prompt": "q", "messages": [{"role": "user", "content": "r"}], "chosen": "a", "rejected": "b"},
            "pairs",
            "conversation",
        ),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1, 2], "chosen": "a", "rejected": "b"}, "pairs", "ranked"),
    ],
)
def test_where_two_formats_fit_both_are_named_and_either_may_be_chosen(
    row: dict[str, Any], first: str, second: str
) -> None:
    with pytest.raises(DataError, match=f"2 formats .*`{first}`: .*`{second}`: .*dataset_format: {first}"):
        from_memory("rows", [row])
    for name in (first, second):
        read = from_memory("rows", [row], selection=Selection(dataset_format=name))
        assert conversation(read).answers


def test_rows_of_two_formats_in_one_split_are_an_error_but_for_those_that_say_what_they_are() -> None:
    (alpaca,), (pairs,), (ranked,) = (examples(f"`{name}`")[0] for name in ("alpaca", "pairs", "ranked"))
    with pytest.raises(DataError, match=r"its rows fit 2 formats \(`pairs`.*`alpaca`"):
        from_memory("rows", [alpaca, pairs])
    mixed = from_memory("rows", [pairs, ranked])
    assert mixed.layouts[0].formats == ("pairs", "ranked")
    assert all(is_the_pair(make_conversation([read_row(mixed.row(i))], GroupSettings())) for i in range(2))


def test_a_row_unlike_the_others_is_a_bad_row_and_never_read_in_another_way() -> None:
    (hh,) = examples("`hh`")[0]
    stray = {"chosen": "Tea is good.", "rejected": "Tea is bad."}
    raw = from_memory("rows", [hh, stray])
    assert raw.layouts[0].formats == ("hh",)
    with pytest.raises(BadRow, match="no prompt"):
        read_row(raw.row(1))
    late = from_memory("rows", [examples("`implicit_text`")[0][0]] * SAMPLE + [{"chosen": "x", "rejected": "y"}])
    with pytest.raises(BadRow, match="no prompt"):
        read_row(late.row(SAMPLE))


def test_answers_that_begin_alike_by_chance_are_not_taken_for_prompts() -> None:
    rows = [{"input": "q", "chosen": "I am one.", "rejected": "I am two."}, {"chosen": "Yes", "rejected": "No"}]
    with pytest.raises(DataError, match=r"none is known to hold the prompt.*dataset_columns: \{prompt: COLUMN\}"):
        from_memory("rows", rows)


@pytest.mark.parametrize(
    ("texts", "prompt", "answers"),
    [
        (("The sky is blue.", "The sky is black."), "The sky is", ["blue.", "black."]),
        (("Q: tea?\nyes", "Q: tea?\nno"), "Q: tea?", ["yes", "no"]),
    ],
)
def test_an_implicit_prompt_ends_before_the_word_in_which_texts_part(
    texts: tuple[str, str], prompt: str, answers: list[str]
) -> None:
    read = conversation(from_memory("rows", [dict(zip(("chosen", "rejected"), texts, strict=True))]))
    assert read.prompt == [{"role": "user", "content": prompt}]
    assert [answer[0]["content"] for answer in read.answers] == answers


def test_columns_are_renamed_and_those_not_used_are_named(tmp_path: Path) -> None:
    row = {"query": "Name a tea.", "good": "Darjeeling.", "bad": "Espresso.", "id": 1, "prompt": "not this one"}
    columns = {"prompt": "query", "chosen": "good", "rejected": "bad"}
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(row))
    mixer = {str(file): 1.0}
    raw = load_split(mixer, "train", Selection(dataset_columns=columns))
    assert is_the_pair(conversation(raw))
    assert raw.layouts[0].line == (
        f"{file}: read as pairs (prompt from query, chosen from good, rejected from bad); columns not used: id, prompt"
    )
    by_source = Selection(dataset_columns={str(file): columns}, dataset_format={str(file): "pairs"})
    assert load_split(mixer, "train", by_source).table == raw.table
    with pytest.raises(DataError, match=r"has no column worse, which `dataset_columns` names; it has bad, good, id"):
        load_split(mixer, "train", Selection(dataset_columns={**columns, "rejected": "worse"}))
    with pytest.raises(DataError, match=r"`dataset_columns` reject: expected one of prompt, system, chosen"):
        load_split(mixer, "train", Selection(dataset_columns={"reject": "bad"}))
    with pytest.raises(DataError, match=r"`dataset_columns` names other\.jsonl, which is no source"):
        load_split(mixer, "train", Selection(dataset_columns={"other.jsonl": columns}))


def test_the_format_and_the_columns_change_the_fingerprint_that_names_cached_tokens() -> None:
    row = {"instruction": "Name a tea.", "input": "A green one.", "chosen": "a", "rejected": "b"}
    prints = {
        from_memory("rows", [row], selection=selection).fingerprint
        for selection in (
            Selection(),
            Selection(dataset_columns={"prompt": "instruction"}),
            Selection(dataset_columns={"chosen": "rejected", "rejected": "chosen"}),
        )
    }
    assert len(prints) == 3


@pytest.mark.parametrize(
    ("name", "message"), [("sharegpt", "here that is `conversation`"), ("paris", "expected one of")]
)
def test_an_unknown_format_is_an_error_that_says_what_it_may_be(name: str, message: str) -> None:
    with pytest.raises(DataError, match=f"`dataset_format` {name}: {message}"):
        from_memory("rows", [{}], selection=Selection(dataset_format=name))


@pytest.mark.parametrize("name", BY_NAME)
def test_a_named_format_without_its_columns_is_an_error(name: str) -> None:
    with pytest.raises(DataError, match=f"`dataset_format: {name}` needs"):
        from_memory("rows", [{"text": "a"}], selection=Selection(dataset_format=name))


def test_a_column_without_values_makes_bad_rows_and_one_that_is_missing_an_error(tmp_path: Path) -> None:
    raw = from_memory("rows", [{"prompt": "q", "chosen": "a", "rejected": None}])
    with pytest.raises(BadRow, match="missing value: the row has no `rejected`"):
        read_row(raw.row(0))
    with pytest.raises(DataError, match="has the columns chosen, rejected, without a value in its first 1 rows"):
        from_memory("rows", [{"chosen": None, "rejected": None}])
    datasets.Dataset.from_list([{"a": 1, "b": 2}]).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match="has the columns a, b but not chosen and rejected"):
        load_split({str(tmp_path / "saved"): 1.0}, "train")


def test_rows_with_pictures_are_refused() -> None:
    raw = from_memory("rows", [{"prompt": "q", "chosen": "a", "rejected": "b", "images": ["cat.png"]}])
    with pytest.raises(BadRow, match="not text: the row has `images`"):
        read_row(raw.row(0))


# --- files


@pytest.mark.parametrize("name", ["pairs.jsonl.gz", "pairs.json.gz", "pairs.csv.gz", "pairs.csv"])
def test_compressed_files_and_tables_are_read_alone_and_in_folders(tmp_path: Path, name: str) -> None:
    (block,) = re.findall(r"```csv\n(.*?)```", PAGE, re.S)
    (row,) = examples("`pairs`")[0]
    text = {"jsonl": json.dumps(row) + "\n", "json": json.dumps([row], indent=1), "csv": block}[name.split(".")[1]]
    data = gzip.compress(text.encode()) if name.endswith(".gz") else text.encode()
    (tmp_path / name).write_bytes(data)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / name.replace("pairs", "train")).write_bytes(data)
    for source in (tmp_path / name, tmp_path / "folder"):
        assert is_the_pair(conversation(load_split({str(source): 1.0}, "train")))


def test_a_compressed_file_that_is_cut_off_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl.gz"
    whole = gzip.compress(json.dumps(examples("`pairs`")[0][0]).encode() * 100)
    for data in (whole[:-20], b"{}"):
        file.write_bytes(data)
        with pytest.raises(DataError, match=r"pairs\.jsonl\.gz: not a whole gzip file"):
            load_split({str(file): 1.0}, "train")


def test_cells_of_a_table_may_hold_messages_scores_and_line_ends(tmp_path: Path) -> None:
    file = tmp_path / "pairs.csv"
    turns = json.dumps([{"role": "user", "content": "Name a tea."}]).replace('"', '""')
    file.write_text(
        f'prompt,responses,scores,note\n"{turns}","[""Espresso."", ""Darjeeling.""]","[1, 2]","two\nlines"\n'
    )
    raw = load_split({str(file): 1.0}, "train")
    assert is_the_pair(conversation(raw)) and raw.layouts[0].unused == ("note",)
    file.write_text('prompt,chosen,rejected\nq,"[1]\n",[2]\n\nq,[a],b\n')
    raw = load_split({str(file): 1.0}, "train")
    assert [raw.row(i)["chosen"] for i in range(2)] == ["[1]\n", "[a]"]
    assert raw.place(1) == f"{file}, row 1 (line 5)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,chosen,rejected\nq,a,b\nq,a,b,c\n", r"line 3: 4 cells for 3 columns: put quotes"),
        ("prompt,chosen,chosen\nq,a,b\n", r"line 1: the first line must name every column once"),
        ('prompt,chosen,rejected\nq,a,"b', r"line 2: not a readable CSV file"),
        ("prompt,chosen,rejected\nq,a,b\nq,caf\xe9,b\n", r"the byte e9 after line \d is not UTF-8 text: save"),
        ("prompt,chosen,rejected\n", r"there are no rows in it"),
    ],
)
def test_a_broken_table_is_an_error_that_names_the_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "pairs.csv"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=message):
        load_split({str(file): 1.0}, "train")


@pytest.mark.parametrize("source", ["no-such-pairs", "here/no-such-pairs", "a/b/c", "./x", "no-such/"])
def test_a_missing_local_folder_is_not_looked_for_on_the_hub(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_hub(*args: Any) -> None:
        raise AssertionError("the hub was asked")

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jax_simpo.data.sources.read_hub", read_hub)
    with pytest.raises(DataError, match="no such file or folder"):
        load_split({source: 1.0}, "train")


# --- which rows are taken


def numbered(path: Path, rows: int, prompts: int) -> str:
    """Writes rows of some prompts in turn; the answers number them."""
    path.parent.mkdir(exist_ok=True)
    lines = [json.dumps({"prompt": f"q{i % prompts}", "chosen": f"{i}", "rejected": "no"}) for i in range(rows)]
    path.write_text("\n".join(lines))
    return str(path.parent)


def answers(raw: RawSplit) -> list[int]:
    return [int(raw.row(i)["chosen"]) for i in range(len(raw))]


def test_max_samples_and_shuffle_seed_choose_the_rows_of_each_split(tmp_path: Path) -> None:
    folder = numbered(tmp_path / "a" / "train.jsonl", 40, 40)
    numbered(tmp_path / "a" / "test.jsonl", 20, 20)
    first = load_train({folder: 0.5}, ["train"], Selection(max_samples=7))
    assert answers(first) == list(range(7))
    assert first.layouts[0].line.endswith("; 13 of 40 rows left out (`max_samples`)")
    drawn = load_train({folder: 0.5}, ["train"], Selection(max_samples=7, shuffle_seed=1))
    assert len(drawn) == 7 and answers(drawn) == sorted(answers(drawn)) != list(range(7))
    assert answers(drawn) == answers(load_train({folder: 0.5}, ["train"], Selection(max_samples=7, shuffle_seed=1)))
    assert answers(drawn) != answers(load_train({folder: 0.5}, ["train"], Selection(max_samples=7, shuffle_seed=2)))
    assert len(load_eval({folder: 1.0}, ["test"], Selection(max_samples=7))) == 7
    assert len(load_split({folder: 1.0}, "train", Selection(max_samples=7))) == 40


@pytest.mark.parametrize("test_size", [0.25, 10])
def test_held_out_rows_share_no_prompt_with_those_trained_on(tmp_path: Path, test_size: float) -> None:
    one, two = numbered(tmp_path / "a" / "train.jsonl", 30, 13), numbered(tmp_path / "b" / "train.jsonl", 10, 4)
    mixer, selection = {one: 1.0, two: 1.0}, Selection(test_size=test_size)
    trained = load_train(mixer, ["train"], selection)
    held_out = load_named(mixer, "held_out", ["train"], selection)
    prompts = [{raw.row(i)["prompt"] for i in range(len(raw))} for raw in (trained, held_out)]
    assert prompts[0].isdisjoint(prompts[1]) and prompts[0] | prompts[1] == {f"q{i}" for i in range(13)}
    assert len(trained) + len(held_out) == 40 and 10 <= len(held_out) < 10 + 6  # no prompt has more than six rows
    assert trained.parts == (("train", sum(file.startswith(one) for file, _ in origins(trained))), trained.parts[1])
    assert sum(rows for _, rows in trained.parts) == len(trained)
    again = load_named(mixer, "held_out", ["train"], selection)
    other = load_named(mixer, "held_out", ["train"], Selection(test_size=test_size, shuffle_seed=7))
    assert origins(again) == origins(held_out) != origins(other)


def origins(raw: RawSplit) -> list[tuple[str, int]]:
    return [raw.origin(i) for i in range(len(raw))]


def test_prompts_that_read_the_same_are_one_and_bad_rows_are_on_either_side() -> None:
    texts = ["Name a tea.", " name  a\nTEA. ", "Name a tea", None]
    rows = [{"prompt": text, "chosen": "a", "rejected": "b"} for text in texts for _ in range(5)]
    for seed in range(4):
        trained, held_out = divide(from_memory("rows", rows), Selection(test_size=1, shuffle_seed=seed))
        sides = [{raw.row(i)["prompt"] for i in range(len(raw))} for raw in (trained, held_out)]
        assert len(held_out) in (1, 5, 10)
        assert (texts[0] in sides[0]) == (texts[1] in sides[0]) != (texts[0] in sides[1])


@pytest.mark.parametrize("test_size", [0.01, 3, 0.9])
def test_a_test_size_that_leaves_one_side_empty_is_an_error(test_size: float) -> None:
    rows = [{"prompt": "q", "chosen": f"{i}", "rejected": "b"} for i in range(3)]
    with pytest.raises(DataError, match=r"`test_size` .* of the 3 rows of rows out, counted by whole prompts"):
        divide(from_memory("rows", rows), Selection(test_size=test_size))
