"""The best evaluation and the end of a run follow from the records of its evaluations alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jax_simpo.config import TrainConfig
from jax_simpo.errors import CheckpointError, ConfigError
from jax_simpo.run import files
from jax_simpo.run.best import BestRule, evaluations
from jax_simpo.run.metrics import MetricsLog

LOSS = BestRule("eval_loss", greater=False)
ACCURACY = BestRule("eval_rewards/accuracies", greater=True)


def records(*values: float, metric: str = "eval_loss") -> list[dict[str, Any]]:
    """Returns evaluations at the steps 0, 10, 20, ..."""
    return [{"eval_step": 10 * k, metric: value} for k, value in enumerate(values)]


def config(**settings: Any) -> TrainConfig:
    return TrainConfig(model_name_or_path="m", dataset_mixer={"d": 1.0}, eval_strategy="steps", **settings)


def test_a_config_that_asks_for_no_choice_has_no_rule() -> None:
    assert BestRule.of(config()) is None


@pytest.mark.parametrize(
    ("settings", "metric", "greater"),
    [
        ({}, "eval_loss", False),
        ({"metric_for_best_model": "loss"}, "eval_loss", False),
        ({"metric_for_best_model": "eval_test_sft_loss"}, "eval_test_sft_loss", False),
        ({"metric_for_best_model": "rewards/accuracies"}, "eval_rewards/accuracies", True),
        ({"metric_for_best_model": "eval_rewards/chosen", "greater_is_better": False}, "eval_rewards/chosen", False),
    ],
)
def test_less_of_a_loss_is_better_and_more_of_all_else(settings: dict[str, Any], metric: str, greater: bool) -> None:
    rule = BestRule.of(config(load_best_model_at_end=True, **settings))
    assert rule is not None and (rule.metric, rule.greater, rule.keep, rule.patience) == (metric, greater, True, None)


def test_the_best_is_the_first_of_the_least_losses_after_training_has_begun() -> None:
    assert LOSS.best_step(records(0.1, 0.7, 0.5, 0.5, 0.6)) == 20
    assert LOSS.best_step(records(0.1)) is None
    assert ACCURACY.best_step(records(0.9, 0.5, 0.7, 0.6, metric="eval_rewards/accuracies")) == 20


def test_a_metric_that_is_no_number_is_never_the_best() -> None:
    nan = float("nan")
    assert LOSS.best_step(records(0.9, nan, 0.8, nan)) == 20


def test_a_run_ends_after_as_many_evaluations_without_improvement_as_it_is_patient() -> None:
    patient = BestRule("eval_loss", greater=False, patience=2)
    course = records(0.9, 0.8, 0.85, 0.79, 0.8, 0.8)
    assert [patient.ends(course[:k]) for k in range(1, 7)] == [False, False, False, False, False, True]
    assert not LOSS.ends(course)


def test_an_improvement_below_the_threshold_is_none_but_moves_the_mark() -> None:
    strict = BestRule("eval_loss", greater=False, patience=2, threshold=0.1)
    assert strict.ends(records(0.9, 0.8, 0.75, 0.7))
    assert not strict.ends(records(0.9, 0.8, 0.75, 0.6))


def test_records_without_the_metric_do_not_count() -> None:
    assert LOSS.best_step([{"eval_step": 10, "eval_a_loss": 0.1}, *records(0.9, 0.8, 0.7)]) == 20


def test_a_best_step_without_a_checkpoint_is_found_before_training_goes_on() -> None:
    LOSS.check_saved(records(0.9, 0.5, 0.8), [10, 20], Path("run"))
    BestRule("eval_loss", greater=False, keep=False).check_saved(records(0.9, 0.5, 0.8), [20], Path("run"))
    with pytest.raises(CheckpointError, match=r"of run by eval_loss is that of step 10, which has no checkpoint; ther"):
        LOSS.check_saved(records(0.9, 0.5, 0.8), [20], Path("run"))


def test_an_unknown_metric_is_refused_with_those_there_are() -> None:
    BestRule("eval_b_loss", greater=False).check(["loss", "pairs"], ["a", "b"])
    with pytest.raises(ConfigError, match=r"no `eval_b_loss`; they have eval_loss, eval_pairs$"):
        BestRule("eval_b_loss", greater=False).check(["loss", "pairs"], ["b"])


def test_the_evaluations_of_a_resumed_run_are_those_up_to_its_first_step(tmp_path: Path) -> None:
    (tmp_path / files.METRICS).touch()
    with MetricsLog(tmp_path) as log:
        for record in ({"eval_step": 0}, {"step": 5}, {"eval_step": 10}, {"eval_step": 20}):
            log.write(record)
    assert [record["eval_step"] for record in evaluations(tmp_path, 10)] == [0, 10]
