"""Prompts that a model is to answer are read from rows, with or without answers, as training reads them."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jax_simpo.data.conversations import read_row
from jax_simpo.data.messages import BadRow
from jax_simpo.data.prompt_rows import read_prompt_row
from jax_simpo.data.prompts import PromptEncoder, make_prompts, read_prompts, unused_columns
from jax_simpo.data.sources import from_memory
from jax_simpo.errors import DataError
from tests.data.test_formats import DOCUMENTED
from tests.small_tokenizer import train

ANSWERS = (
    *("chosen", "rejected", "chosen_response", "rejected_response", "output"),
    *("responses", "completions", "answers", "scores", "response", "score"),
)
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
ENCODER = PromptEncoder(train(template=TEMPLATE), auto_insert_empty_system_msg=False)

USER = {"role": "user", "content": "Name a tea."}
SAID = {"role": "assistant", "content": "Darjeeling."}
SYSTEM = {"role": "system", "content": "You know plants."}


def without_answers(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in ANSWERS}


@pytest.mark.parametrize(("name", "rows"), DOCUMENTED)
def test_every_documented_row_has_the_prompt_that_training_reads(name: str, rows: list[dict[str, Any]]) -> None:
    raw = from_memory("rows", rows)
    for number, row in enumerate(rows):
        trained = read_row(raw.row(number))
        found = [read_prompt_row(row)]
        if not {"prompt", "question", "instruction", "conversations", "messages"}.isdisjoint(row):
            found.append(read_prompt_row(without_answers(row)))
        else:
            assert name in ("dialogues", "hh", "implicit_text")  # whose prompts are in their answers
            with pytest.raises(BadRow, match="no prompt"):
                read_prompt_row(without_answers(row))
        assert [(one.turns, one.tools) for one in found] == [(trained.prompt, trained.tools)] * len(found)


ROWS: list[dict[str, Any]] = [
    {"prompt": "Name a tea.", "system": "You know plants.", "id": 1},
    {"prompt": "Name a coffee.", "system": "Be brief.", "id": 2},
    {"prompt": "Name a cake.", "system": None, "id": None},
]


def write_csv(path: Path) -> None:
    with path.open("w", newline="") as file:
        lines = csv.DictWriter(file, list(ROWS[0]))
        lines.writeheader()
        lines.writerows(ROWS)


LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
FILES: dict[str, Callable[[Path], object]] = {
    "prompts.jsonl": lambda path: path.write_text(LINES),
    "prompts.txt": lambda path: path.write_text(LINES),
    "prompts.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES.encode())),
    "prompts.json": lambda path: path.write_text(json.dumps(ROWS)),
    "prompts.csv": write_csv,
    "prompts.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
}


@pytest.mark.parametrize("name", FILES)
def test_every_type_of_file_has_the_prompts_of_its_rows(name: str, tmp_path: Path) -> None:
    FILES[name](tmp_path / name)
    prompts, expected = read_prompts(tmp_path / name, ENCODER), make_prompts("rows", ROWS, ENCODER)
    assert [(one.given, one.turns, one.ids) for one in prompts] == [(o.given, o.turns, o.ids) for o in expected]
    assert prompts[0].turns == [SYSTEM, USER]
    # Of a parquet file a column that no format knows is not read, so its rows are all counted.
    count = 3 if name.endswith(".parquet") else 2
    assert unused_columns(prompts) == f"1 column of the prompts' rows is not used: id (in {count} of 3)"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("prompt,system\nTea?\n", "prompts.csv, line 2: 1 cells for 2 columns"),
        (
            "query\nTea?\n",
            "prompts.csv, row 0 (line 2): no prompt: the row has the columns query, and none of `prompt`",
        ),
        ("prompt\n", "prompts.csv: there are no prompts in it"),
    ],
)
def test_a_mistake_in_a_table_is_told_with_its_line(content: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.csv").write_text(content)
    with pytest.raises(DataError) as error:
        read_prompts(tmp_path / "prompts.csv", ENCODER)
    assert told in str(error.value)


def test_columns_that_are_not_used_are_counted_and_answers_are_not_named() -> None:
    rows = [
        {"question": "q", "answers": ["a"], "context": "c"},
        {"instruction": "q", "input": "i", "output": "a"},
        {"prompt": "q", "input": "i", "response": "a", "context": None},
        {"prompt": "q", "chosen": "a", "rejected": "b", "context": "c"},
    ]
    prompts = make_prompts("rows", rows, ENCODER)
    assert prompts[1].turns == [{"role": "user", "content": "q\ni"}]
    assert unused_columns(prompts) == (
        "2 columns of the prompts' rows are not used: context (in 2 of 4), input (in 1 of 4)"
    )
    assert unused_columns(prompts[1:2]) == ""


@pytest.mark.parametrize(
    ("row", "given"),
    [
        ({"question": "Name a tea.", "system": ""}, "Name a tea."),
        ({"messages": [USER], "tools": []}, [USER]),
        ({"instruction": "Name a tea.", "input": "", "output": "Darjeeling."}, "Name a tea."),
        ({"prompt": "Name a tea.", "system": SYSTEM["content"]}, [SYSTEM, USER]),
        ({"chosen": [USER, SAID], "rejected": [USER, {**SAID, "content": "Espresso."}]}, [USER]),
    ],
)
def test_a_prompt_is_given_back_as_it_was_unless_it_was_put_together(row: dict[str, Any], given: Any) -> None:
    assert read_prompt_row(row).given == given


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Name a tea.", "chosen": "a", "rejected": "a"},
        {"prompt": "Name a tea.", "chosen": "a"},
        {"prompt": "Name a tea.", "completion": "a", "label": True},
        {"prompt": "Name a tea.", "responses": ["a"]},
        {"prompt": "Name a tea.", "messages": [USER, SAID]},  # as in the rows of UltraChat
        {"prompt": [USER], "chosen": [USER, SAID], "rejected": [USER, SAID]},
    ],
)
def test_answers_that_nothing_can_be_learned_from_leave_the_prompt_as_it_is(row: dict[str, Any]) -> None:
    assert read_prompt_row(row).turns == [USER]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "q", "instruction": "r"}, "several prompts: the row fits 2 formats (`pairs`: .*`alpaca`: "),
        ({"prompt": "q", "messages": [USER]}, "several prompts: the row fits 2 formats (`pairs`: .*`conversation`: "),
        ({"messages": [USER, SAID]}, "nothing to answer: the last turn of the prompt is the assistant's"),
        ({"conversations": []}, "no prompt: the prompt is empty"),
        ({"prompt": [SYSTEM, USER], "system": "Be brief."}, "two system messages"),
        ({"chosen": "a cat", "rejected": "a dog"}, "no prompt: the row has two answers and no prompt, unlike others"),
        ({"prompt": "Name it.", "image": "cat.png"}, "not text: the row has `image`"),
        ({}, "no prompt: the row has no columns"),
    ],
)
def test_a_row_without_one_prompt_is_told(row: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError) as error:
        make_prompts("prompts", ["Name a tea.", row], ENCODER)
    start, *rest = told.split(".*")
    assert f"prompts, row 1: {start}" in str(error.value) and all(part in str(error.value) for part in rest)


def test_texts_that_begin_alike_hold_a_prompt_if_all_rows_are_such() -> None:
    row = {"chosen": "Name a tea. Darjeeling.", "rejected": "Name a tea. Espresso."}
    assert [one.turns for one in make_prompts("prompts", [row, row], ENCODER)] == [[USER], [USER]]
    with pytest.raises(DataError, match=r"1 of 2 prompts cannot be used:\n  prompts, row 1: no prompt"):
        make_prompts("prompts", [row, {"chosen": "Tea is good.", "rejected": "A tea is bad."}], ENCODER)
