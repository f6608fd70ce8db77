"""The records of a run: kept when it resumes, and an evaluation's keys over all pairs and per split."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from jax_simpo.errors import CheckpointError, ConfigError, TrainingError
from jax_simpo.run.metrics import (
    MetricsLog,
    check_records,
    check_split_names,
    evaluation_figures,
    evaluation_line,
    read_metrics,
    share_interval,
)
from jax_simpo.run.sums import NOTHING, Sum


def test_a_resumed_run_drops_the_records_that_it_writes_again(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        for record in ({"eval_step": 0}, {"step": 1}, {"step": 2}, {"eval_step": 2}):
            log.write(record)
        before = log.synced()
        log.write({"step": 3})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # a killed run leaves half a line
    with MetricsLog(tmp_path, before=before) as log:
        assert log.synced() == before
        log.write({"step": 3, "again": True})
    assert read_metrics(tmp_path) == [
        *({"eval_step": 0}, {"step": 1}, {"step": 2}, {"eval_step": 2}),
        {"step": 3, "again": True},
    ]
    with MetricsLog(tmp_path, write=False) as log:
        log.write({"step": 9})
    assert len(read_metrics(tmp_path)) == 5


def written(output: Path) -> Sum:
    with MetricsLog(output) as log:
        for step in range(1, 4):
            log.write({"step": step, "loss": 0.5})
        return log.synced()


@given(bit=st.integers(0, 8 * 75 - 1))
@settings(max_examples=30, deadline=None)
def test_records_that_changed_are_found_whichever_bit_it_is(bit: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    output = tmp_path_factory.mktemp("run")
    before = written(output)
    assert before.bytes == 75 and check_records(output, before) == ""
    data = bytearray((output / "metrics.jsonl").read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    (output / "metrics.jsonl").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"metrics.jsonl: its first 75 bytes are not the records that the run"):
        MetricsLog(output, before=before)
    assert (output / "metrics.jsonl").read_bytes() == data


def test_what_follows_the_records_of_a_step_is_dropped_unread(tmp_path: Path) -> None:
    before = written(tmp_path)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b"\0\xff no record\n")
    with MetricsLog(tmp_path, before=before) as log:
        log.write({"step": 4})
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_a_step_saved_before_any_record_needs_no_file(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, before=NOTHING) as log:
        log.write({"step": 1})
    assert read_metrics(tmp_path) == [{"step": 1}]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_is_an_error_that_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainingError, match=r"cannot be written: No space left on device\. Make room, or mend"):
        with MetricsLog(tmp_path) as log:
            monkeypatch.setattr(log, "_check_own", lambda _: None)
            log.__exit__(None, None, None)
            log._file = open("/dev/full", "ab", buffering=0)
            log.write({"step": 1})


def test_missing_records_are_said_and_refused_where_the_run_needs_them(tmp_path: Path) -> None:
    before = written(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    assert "metrics.jsonl is missing: the records of the steps before are lost" in check_records(tmp_path, before)
    with pytest.raises(CheckpointError, match="without its evaluations the run cannot choose its best model"):
        check_records(tmp_path, before, needed=True)


def remove(path: Path) -> None:
    path.unlink()


def move_the_folder(path: Path) -> None:
    path.parent.rename(path.parent.with_name("moved"))


def replace(path: Path) -> None:
    path.write_text(path.read_text())
    path.rename(path.with_name("other"))
    path.write_text(path.with_name("other").read_text())


def write_as_a_second_run(path: Path) -> None:
    with path.open("a") as file:
        file.write('{"step": 9}\n')


@pytest.mark.parametrize("disturb", [remove, move_the_folder, replace, write_as_a_second_run])
def test_a_run_whose_records_are_taken_from_it_ends_and_says_so(
    disturb: Callable[[Path], None], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    with MetricsLog(tmp_path / "run") as log:
        log.write({"step": 1})
        disturb(tmp_path / "run" / "metrics.jsonl")
        with pytest.raises(
            TrainingError, match=r"metrics.jsonl was removed, moved or changed while this run was writing"
        ):
            log.write({"step": 2})


@pytest.mark.parametrize("line", ["\0" * 40, "[1]", "1", "{}", '{"loss": 1}', '{"step": 2', "[" * 10**5, "\udcff"])
def test_a_line_that_is_no_record_is_named(line: str, tmp_path: Path) -> None:
    written(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a", errors="surrogateescape") as file:
        file.write(line + "\n")
    with pytest.raises(CheckpointError, match=r"metrics.jsonl, line 4: is no record of a run, so the file is damaged"):
        read_metrics(tmp_path)


def test_an_evaluation_has_figures_over_all_pairs_and_of_each_of_several_splits() -> None:
    overall, a, b = {"loss": 0.5}, {"loss": 0.4}, {"loss": 0.6}
    assert evaluation_figures(overall, {"a": a}) == {"eval_loss": 0.5}
    figures = evaluation_figures(overall, {"a": a, "b": b})
    assert figures == {"eval_loss": 0.5, "eval_a_loss": 0.4, "eval_b_loss": 0.6}


@pytest.mark.parametrize("splits", [["test", "sft"], ["test", "test_sft"]])
def test_a_split_whose_figures_would_have_the_names_of_others_is_refused(splits: list[str]) -> None:
    names = ("loss", "rewards/accuracies", "sft_loss")
    with pytest.raises(ConfigError, match=rf"of the split `{splits[1]}` would have the name of another metric"):
        check_split_names(splits, names)
    check_split_names(splits[:1], names)
    check_split_names(splits, names[:2])


def test_the_line_of_an_evaluation_names_several_splits() -> None:
    figures = {"eval_loss": 0.5, "eval_rewards/accuracies": 0.75, "eval_rewards/margins": 1.0}
    line = evaluation_line(8, figures, ["test"])
    assert line == "evaluation at step 8: loss 0.5000, accuracy 0.750, margin 1.000"
    figures |= {"eval_a_rewards/accuracies": 0.5, "eval_b_rewards/accuracies": 1.0}
    assert evaluation_line(8, figures, ["a", "b"]) == f"{line} (accuracy by split: a 0.500, b 1.000)"


def test_the_records_are_json_lines(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write({"step": 1, "loss": 0.5})
        assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 0.5}  # at once


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_a_share_lies_in_the_interval_of_19_experiments_in_20(share: float) -> None:
    chance = np.random.default_rng(0)
    found = chance.binomial(200, share, size=2000) / 200
    inside = [low - 1e-12 <= share <= high + 1e-12 for low, high in (share_interval(f, 200) for f in found)]
    assert np.mean(inside) > 0.93
    oracle = binomtest(round(200 * share), 200).proportion_ci(method="wilson")
    assert share_interval(share, 200) == pytest.approx((oracle.low, oracle.high), abs=1e-6)
