"""The file of bad steps follows the steps of its run, and a damaged one is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jax_simpo.errors import CheckpointError
from jax_simpo.run.bad_steps import drop_later, read_bad_steps, write_bad_step


def record(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "left_out": True,
        "metrics": {"loss": float("nan")},
        "groups": [{"loss": float("inf")}],
        **more,
    }


def test_numbers_that_are_not_finite_are_texts(tmp_path: Path) -> None:
    write_bad_step(tmp_path, record(3))
    (read,) = read_bad_steps(tmp_path)
    assert (read["metrics"], read["groups"]) == ({"loss": "nan"}, [{"loss": "inf"}])


def test_lines_of_steps_that_are_taken_again_go(tmp_path: Path) -> None:
    for step in (3, 5, 8, 5):  # the run has gone back
        write_bad_step(tmp_path, record(step))
    assert [bad["step"] for bad in read_bad_steps(tmp_path)] == [3, 5]
    drop_later(tmp_path, 4)
    assert [bad["step"] for bad in read_bad_steps(tmp_path)] == [3]


@pytest.mark.parametrize("line", ["{", "3", '{"step": 3}', '{"step": "3", "left_out": true}', '{"left_out": true}'])
def test_a_damaged_line_is_an_error_that_names_the_file(line: str, tmp_path: Path) -> None:
    path = write_bad_step(tmp_path, record(3))
    path.write_text(f"{path.read_text()}{line}\n")
    with pytest.raises(CheckpointError, match=r"bad_steps\.jsonl: is damaged"):
        read_bad_steps(tmp_path)


def test_a_file_of_the_users_is_neither_read_nor_replaced(tmp_path: Path) -> None:
    (tmp_path / "bad_steps.jsonl").write_text("mine")
    assert read_bad_steps(tmp_path) == []
    drop_later(tmp_path, 0)
    with pytest.raises(CheckpointError, match="which no run of jax-simpo wrote"):
        write_bad_step(tmp_path, record(3))
    assert (tmp_path / "bad_steps.jsonl").read_text() == "mine"
