"""Pairs are read from every kind of source and mixed, and an error says what is wrong with a source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jax_simpo.data.selection import Selection
from jax_simpo.data.sources import load_split, load_train
from jax_simpo.errors import DataError


def turns(answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]


def make_rows(count: int, name: str = "") -> list[dict[str, Any]]:
    return [{"chosen": turns(f"{name} good {i}"), "rejected": turns(f"{name} bad {i}")} for i in range(count)]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        write_jsonl(path, rows)
    return path


def read(source: Path | str, split: str = "train") -> list[dict[str, Any]]:
    raw = load_split({str(source): 1.0}, split)
    return [{k: v for k, v in raw.row(i).items() if v is not None} for i in range(len(raw))]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub-cache")


# --- every kind of source


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_a_single_file_is_the_split_train(tmp_path: Path, suffix: str) -> None:
    rows = make_rows(3)
    assert read(write(tmp_path / f"pairs.{suffix}", rows)) == rows


def test_a_json_file_may_hold_one_object_per_line(tmp_path: Path) -> None:
    rows = make_rows(3)
    file = write_jsonl(tmp_path / "pairs.jsonl", rows).rename(tmp_path / "pairs.json")
    assert read(file) == rows


def test_a_folders_splits_are_its_file_names(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "hh.train.jsonl", make_rows(3, "train"))
    write(tmp_path / "hh.test.parquet", make_rows(2, "test"))
    assert read(tmp_path, "hh.train") == make_rows(3, "train")
    assert read(tmp_path, "hh.test") == make_rows(2, "test")


def test_the_shards_of_a_downloaded_hub_repository_are_one_split(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    rows = make_rows(5)
    write(tmp_path / "data" / "train-00000-of-00002.parquet", rows[:3])
    write(tmp_path / "data" / "train-00001-of-00002.parquet", rows[3:])
    raw = load_split({str(tmp_path): 1.0}, "train")
    assert read(tmp_path) == rows
    assert raw.origin(3) == (str(tmp_path / "data" / "train-00001-of-00002.parquet"), 0)


def test_a_saved_dataset_is_the_split_train(tmp_path: Path) -> None:
    datasets.Dataset.from_list(make_rows(4)).save_to_disk(str(tmp_path / "saved"))
    assert read(tmp_path / "saved") == make_rows(4)


@pytest.mark.parametrize("as_dict", [True, False])
def test_a_saved_dataset_dict_keeps_its_splits(tmp_path: Path, as_dict: bool) -> None:
    parts = {name: datasets.Dataset.from_list(make_rows(2, name)) for name in ("train_prefs", "test_prefs")}
    if as_dict:
        datasets.DatasetDict(parts).save_to_disk(str(tmp_path))
    else:  # each split saved by itself into a folder of its name, as the original reads them
        for name, part in parts.items():
            part.save_to_disk(str(tmp_path / name))
    assert read(tmp_path, "test_prefs") == make_rows(2, "test_prefs")


def test_a_saved_selection_keeps_its_rows(tmp_path: Path) -> None:
    datasets.Dataset.from_list(make_rows(6)).select([4, 1]).save_to_disk(str(tmp_path / "saved"))
    assert read(tmp_path / "saved") == [make_rows(6)[4], make_rows(6)[1]]


def test_a_hub_id_is_loaded_with_its_split_and_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(name: str, config: str | None, *, split: str) -> datasets.Dataset:
        calls.append((name, config, split))
        return datasets.Dataset.from_list(make_rows(4))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    raw = load_train({"owner/pairs": 0.5}, ["train_prefs"], Selection(dataset_configs=["default"]))
    assert calls == [("owner/pairs", "default", "train_prefs")]
    assert [raw.origin(i) for i in range(len(raw))] == [("owner/pairs/train_prefs", 0), ("owner/pairs/train_prefs", 1)]


def test_a_built_in_source_needs_no_file() -> None:
    assert set(read("builtin:cafe", "test")[0]) >= {"chosen", "rejected"}


def test_origin_names_file_row_and_line(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n\n".join(json.dumps(row) for row in make_rows(3)))
    raw = load_split({str(file): 1.0}, "train")
    assert raw.origin(2) == (str(file), 2)
    assert raw.place(2) == f"{file}, row 2 (line 5)"


# --- mixing


def test_each_train_split_is_cut_to_the_fraction_of_its_own_source(tmp_path: Path) -> None:
    for source, counts in (("a", (10, 5)), ("b", (4, 9))):
        for split, count in zip(("train_1", "train_2"), counts, strict=True):
            write_jsonl(tmp_path / source / f"{split}.jsonl", make_rows(count, source + split))
    mixer = {str(tmp_path / "a"): 0.5, str(tmp_path / "b"): 1.0}
    raw = load_train(mixer, ["train_1", "train_2"])
    expected = [
        *make_rows(10, "atrain_1")[:5],
        *make_rows(5, "atrain_2")[:2],
        *make_rows(4, "btrain_1"),
        *make_rows(9, "btrain_2"),
    ]
    assert [raw.row(i)["chosen"] for i in range(len(raw))] == [row["chosen"] for row in expected]


def test_held_out_splits_are_taken_whole(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "test.jsonl", make_rows(10))
    assert len(load_split({str(tmp_path): 0.1}, "test")) == 10


def test_sources_of_different_columns_and_forms_are_mixed(tmp_path: Path) -> None:
    messages = write_jsonl(tmp_path / "messages.jsonl", [{**row, "score": 1} for row in make_rows(1)])
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b", "score": "high"}])
    table = write(tmp_path / "table.parquet", make_rows(1))
    raw = load_train({str(messages): 1, str(texts): 1, str(table): 1}, ["train"])
    assert [type(raw.row(i)["chosen"]) for i in range(3)] == [list, str, list]
    assert [raw.row(i)["prompt"] for i in range(3)] == [None, "q", None]


def test_the_fingerprint_follows_content_not_names(tmp_path: Path) -> None:
    jsonl = write_jsonl(tmp_path / "one.jsonl", make_rows(3))
    parquet = write(tmp_path / "two.parquet", make_rows(3))
    other = write_jsonl(tmp_path / "other.jsonl", make_rows(3, "x"))
    prints = [load_split({str(path): 1.0}, "train").fingerprint for path in (jsonl, parquet, other)]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize("fraction", [-0.1, 1.5, float("nan"), True, "half"])
def test_a_fraction_outside_0_to_1_is_an_error(tmp_path: Path, fraction: Any) -> None:
    file = write_jsonl(tmp_path / "pairs.jsonl", make_rows(3))
    with pytest.raises(DataError, match=r"the fraction of '.*' is .*: give a number from 0 to 1"):
        load_train({str(file): fraction}, ["train"])


def test_fractions_that_leave_nothing_are_an_error(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "pairs.jsonl", make_rows(3))
    with pytest.raises(DataError, match=r"the fractions leave no training pairs"):
        load_train({str(file): 0}, ["train"])


def test_a_source_of_which_nothing_is_left_is_named_with_its_fraction_and_rows(tmp_path: Path) -> None:
    many, few = (write_jsonl(tmp_path / f"{name}.jsonl", make_rows(n)) for name, n in (("many", 30), ("few", 3)))
    with pytest.raises(DataError, match=r"few\.jsonl: the fraction 0\.3 of its 3 rows is not one pair"):
        load_train({str(many): 1, str(few): 0.3}, ["train"])
    assert len(load_train({str(many): 1, str(few): 0}, ["train"])) == 30


# --- errors that say what is wrong with a source


def test_an_unknown_split_lists_the_splits_there_are(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", make_rows(1))
    write_jsonl(tmp_path / "test.jsonl", make_rows(1))
    with pytest.raises(DataError, match=r"no split 'tset'; there is test, train"):
        load_split({str(tmp_path): 1.0}, "tset")
    with pytest.raises(DataError, match=r"no split 'test'; there is train"):
        load_split({str(tmp_path / "train.jsonl"): 1.0}, "test")


def test_a_missing_file_is_named_with_its_nearest_neighbour(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", make_rows(1))
    with pytest.raises(DataError, match=r"pears\.jsonl: no such file or folder; did you mean pairs\.jsonl\?"):
        load_split({str(tmp_path / "pears.jsonl"): 1.0}, "train")
    with pytest.raises(DataError, match=r"(?s)one\.jsonl: no such file.*two\.jsonl: no such file"):
        load_split({str(tmp_path / "one.jsonl"): 1.0, str(tmp_path / "two.jsonl"): 1.0}, "train")


def test_a_name_that_exists_neither_here_nor_on_the_hub_is_an_error_that_says_so() -> None:
    with pytest.raises(DataError, match=r"owner/no-such-pairs: neither a file or folder here nor .* on the hub"):
        load_split({"owner/no-such-pairs": 1.0}, "train")


def test_an_unknown_split_on_the_hub_passes_on_the_splits_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> None:
        raise ValueError("Unknown split \"tset\". Should be one of ['train', 'test'].")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"no split 'tset' on the hub: .*\['train', 'test'\]"):
        load_split({"owner/pairs": 1.0}, "tset")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", "", "the file is empty"),
        ("empty.json", "", "the file is empty"),
        ("empty.parquet", "", "the file is empty"),
        ("empty.jsonl", "\n \n", "there are no rows in it"),
        ("empty.json", "\n \n", "the file is empty"),
        ("empty.json", "[]", "there are no rows in it"),
        ("empty.parquet", "\n \n", "not a readable parquet file"),
    ],
)
def test_an_empty_file_is_an_error(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=f"{name}: {message}"):
        load_split({str(tmp_path / name): 1.0}, "train")


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"the folder holds neither \.jsonl, \.json, \.csv \(also with \.gz\) or \.parquet files"
    ):
        load_split({str(tmp_path): 1.0}, "train")


@pytest.mark.parametrize("broken", ['{"chosen": [', "not json", '{"chosen": "\xff"}', "9" * 5000])
def test_broken_json_names_file_and_line(tmp_path: Path, broken: str) -> None:
    good = json.dumps(make_rows(1)[0])
    file = tmp_path / "pairs.jsonl"
    file.write_bytes(f"{good}\n\n{good}\n".encode() + broken.encode("latin-1") + b"\n")
    with pytest.raises(DataError, match=r"pairs\.jsonl, line 4: broken JSON"):
        load_split({str(file): 1.0}, "train")


def test_broken_json_in_a_list_names_the_line(tmp_path: Path) -> None:
    file = tmp_path / "pairs.json"
    file.write_text('[\n{"chosen": "a", "rejected": "b"}\n{"chosen": "a"}]')
    with pytest.raises(DataError, match=r"pairs\.json, line 3: broken JSON"):
        load_split({str(file): 1.0}, "train")


def test_a_line_that_is_no_object_is_an_error(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "pairs.jsonl", [make_rows(1)[0], ["chosen", "rejected"]])
    with pytest.raises(DataError, match=r"line 2: a list, not an object"):
        load_split({str(file): 1.0}, "train")


def test_a_value_that_is_no_object_is_called_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 1: true or false, not an object"):
        load_split({str(write_jsonl(tmp_path / "pairs.jsonl", [True])): 1.0}, "train")


@pytest.mark.parametrize("indent", [None, 1])
def test_one_object_in_a_json_file_is_called_an_object(tmp_path: Path, indent: int | None) -> None:
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps({"train": make_rows(2)}, indent=indent))
    messages = {
        None: "has the columns train but not chosen and rejected",
        1: r"holds an object: .* one list of objects",
    }
    with pytest.raises(DataError, match=messages[indent]):
        load_split({str(file): 1.0}, "train")


@pytest.mark.parametrize("suffix", ["JSONL", "JSON", "Parquet"])
def test_the_case_of_a_suffix_does_not_matter(tmp_path: Path, suffix: str) -> None:
    rows = make_rows(3)
    file = write(tmp_path / f"train.{suffix.lower()}", rows).rename(tmp_path / f"train.{suffix}")
    assert read(file) == read(tmp_path) == rows


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_wrong_columns_name_those_there_and_those_needed(tmp_path: Path, suffix: str) -> None:
    file = write(tmp_path / f"pairs.{suffix}", [{"question": "q", "chosen": "a", "worse": "b"}])
    with pytest.raises(DataError, match=r"has the columns chosen, question, worse but not rejected"):
        load_split({str(file): 1.0}, "train")


def test_two_files_for_one_split_are_an_error(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", make_rows(1))
    write(tmp_path / "train.parquet", make_rows(1))
    with pytest.raises(DataError, match=r"the split 'train' is in several files \(train\.jsonl, train\.parquet\)"):
        load_split({str(tmp_path): 1.0}, "train")


def test_a_file_of_another_type_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "pairs.xlsx").write_text("chosen,rejected\na,b\n")
    with pytest.raises(DataError, match=r"cannot read \.xlsx; use \.jsonl, \.json, \.csv"):
        load_split({str(tmp_path / "pairs.xlsx"): 1.0}, "train")
