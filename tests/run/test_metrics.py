"""The records of a run: kept when it resumes, and an evaluation's keys over all pairs and per split."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jax_simpo.errors import ConfigError, TrainingError
from jax_simpo.run.metrics import (
    MetricsLog,
    check_finite,
    check_split_names,
    evaluation_figures,
    evaluation_line,
    read_metrics,
)


def test_a_resumed_run_drops_the_records_that_it_writes_again(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, first_step=0) as log:
        for record in ({"eval_step": 0}, {"step": 1}, {"step": 2}, {"eval_step": 2}, {"step": 3}):
            log.write(record)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # a killed run leaves half a line
    with MetricsLog(tmp_path, first_step=2) as log:
        log.write({"step": 3, "again": True})
    assert read_metrics(tmp_path) == [
        *({"eval_step": 0}, {"step": 1}, {"step": 2}, {"eval_step": 2}),
        {"step": 3, "again": True},
    ]
    with MetricsLog(tmp_path, first_step=0, write=False) as log:
        log.write({"step": 9})
    assert len(read_metrics(tmp_path)) == 5


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


def test_a_loss_or_gradient_that_is_not_finite_stops_the_run() -> None:
    check_finite(3, 0.5, 1.0, lambda: pytest.fail("the checkpoints are listed for an error only"))
    for loss, norm in ((float("nan"), 1.0), (0.5, float("inf"))):
        with pytest.raises(TrainingError, match=r"step 3: .* The newest checkpoint is of step 2\. Lower"):
            check_finite(3, loss, norm, lambda: [1, 2])


def test_the_records_are_json_lines(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, first_step=0) as log:
        log.write({"step": 1, "loss": 0.5})
        assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 0.5}  # at once
