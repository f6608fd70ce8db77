"""Weights of pairs: what they do to loss and gradients, and how they reach a run from a column of the data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from jax_simpo.data.loader import Known, build_step
from jax_simpo.errors import CheckpointError, DataError
from jax_simpo.models.policy import Forward
from jax_simpo.objectives.orpo import ORPO
from jax_simpo.run.metrics import read_metrics
from jax_simpo.training import trainer
from jax_simpo.training.evaluate import score_groups
from jax_simpo.training.step import Accumulated, accumulate_step
from tests.training.support import (
    fresh_params,
    mesh_of,
    plan_of,
    score_function,
    shared_optimizer,
    some_pairs,
    tiny_model,
    train_functions,
)
from tests.training.test_trainer import config_of

OBJECTIVE = ORPO(beta=0.3, sft_weight=0.5, sft_over="response")
PAIRS = some_pairs(16)
PLAN = plan_of(PAIRS, mesh_of((1, 1, 1)), batch=16)

Step = Callable[[np.ndarray | None], Accumulated]


@pytest.fixture(scope="module")
def step() -> Step:
    """Returns the gradients and metrics of a step of all pairs with these weights."""
    mesh, model = mesh_of((1, 1, 1)), tiny_model()
    with jax.set_mesh(mesh):
        functions = train_functions(Forward(model, "dense", 64), OBJECTIVE, shared_optimizer(), mesh)
        params = fresh_params(model, mesh)

    def of_weights(weights: np.ndarray | None) -> Accumulated:
        with jax.set_mesh(mesh):
            return jax.device_get(
                accumulate_step(functions, params, build_step(PLAN, PAIRS, 0, known=Known(weights=weights)))
            )

    return of_weights


def test_a_weight_multiplies_what_its_pair_adds_to_the_loss(step: Step) -> None:
    weights = np.random.default_rng(0).uniform(0, 3, len(PAIRS.all)).astype(np.float32)
    mesh, model = mesh_of((1, 1, 1)), tiny_model()
    with jax.set_mesh(mesh):
        plan = plan_of(PAIRS, mesh, batch=16)
        score = score_function(Forward(model, "dense", 64), mesh)
        scores = score_groups(score, fresh_params(model, mesh), plan, PAIRS, mesh)
    losses = np.asarray(scores.terms(OBJECTIVE).loss, np.float64)
    sft = -(weights * scores.sums[::2]).sum() / scores.lengths.targets[::2].sum()
    metrics = step(weights).metrics
    assert float(metrics["sft_loss"]) == pytest.approx(sft, rel=1e-5)
    assert float(metrics["loss"]) == pytest.approx((weights * losses).mean() + 0.5 * sft, rel=1e-5)
    for name, value in step(None).metrics.items():  # rewards and log-probs count every pair once
        if name not in ("loss", "sft_loss"):
            assert float(metrics[name]) == pytest.approx(float(value), rel=1e-6)


def test_weights_of_1_change_no_bit_and_those_of_0_leave_the_rest_of_the_gradient(step: Step) -> None:
    without, ones = step(None), step(np.ones(16, np.float32))
    for name, value in without.metrics.items():
        assert float(ones.metrics[name]) == float(value)
    first = (np.arange(16) < 6).astype(np.float32)
    parts = [step(first), step(1 - first)]
    for whole, a, b in zip(*(jax.tree.leaves(part.gradients) for part in (without, *parts)), strict=True):
        np.testing.assert_allclose(a + b, whole, atol=1e-6 * np.abs(whole).max())
    assert not any(jax.tree.leaves(jax.tree.map(np.any, step(np.zeros(16, np.float32)).gradients)))


# --- from the data to the run


def rows_with(*weights: Any) -> list[dict[str, Any]]:
    rows = [
        {"prompt": f"a tea for Anna {k}", "chosen": "one tea", "rejected": "one coffee"} for k in range(len(weights))
    ]
    return [{**row, "trust": weight} for row, weight in zip(rows, weights, strict=True)]


def config(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "pairs.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    settings = {"dataset_mixer": {str(file): 1.0}, "dataset_splits": ["train"], "weight_column": "trust"}
    return config_of(folder, **{**settings, "global_batch_size": 4, "max_steps": 2, "save_strategy": "no", **changes})


def loss_of(settings: Any) -> float:
    trainer.train(settings, Console(quiet=True))
    return float(read_metrics(Path(settings.output_dir))[0]["loss"])


def test_a_column_of_weights_reaches_the_loss_of_a_run(tmp_path: Path) -> None:
    plain = loss_of(config(tmp_path / "a", rows_with(1, 1, 1, 1), weight_column=None))
    assert loss_of(config(tmp_path / "b", rows_with(0.5, 0.5, 0.5, 0.5))) == pytest.approx(0.5 * plain, rel=1e-6)


@pytest.mark.parametrize(
    ("weight", "told"),
    [(None, "missing"), (-1, "-1"), ("high", "'high'"), (True, "True"), (float("nan"), "nan"), (1e300, r"1e\+300")],
)
def test_a_weight_that_is_no_number_from_0_on_is_named_with_its_file_and_row(
    tmp_path: Path, weight: Any, told: str
) -> None:
    with pytest.raises(DataError, match=rf"pairs.jsonl, row 1 \(line 2\).*`trust` is {told}; expected a number >= 0"):
        loss_of(config(tmp_path, rows_with(1, weight)))


def test_a_file_without_the_column_or_with_zeros_alone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no column `score`, which `weight_column` names; it has chosen, prompt, "):
        loss_of(config(tmp_path, rows_with(1, 1), weight_column="score"))
    with pytest.raises(DataError, match=r"every pair of train has the weight 0 \(`trust`\)"):
        loss_of(config(tmp_path, rows_with(0, 0)))


def test_a_run_with_other_weights_is_another_run(tmp_path: Path) -> None:
    saved = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
    loss_of(config(tmp_path, rows_with(1, 2, 3, 4), max_steps=1, **saved))
    with pytest.raises(CheckpointError, match="training pairs: was"):
        loss_of(config(tmp_path, rows_with(1, 2, 3, 5), max_steps=2, **saved))


def test_pairs_in_memory_have_weights_too(tmp_path: Path) -> None:
    from jax_simpo.data.sources import from_memory

    settings = config(tmp_path, rows_with(1, 1), dataset_mixer={})
    pairs = from_memory("pairs", rows_with(2, 2, 2, 2), settings.weight_column)
    run = trainer.train(settings, Console(quiet=True), pairs=pairs)
    half = trainer.train(config(tmp_path / "ones", rows_with(1, 1, 1, 1)), Console(quiet=True))
    assert run.metrics[0]["loss"] == pytest.approx(2 * half.metrics[0]["loss"], rel=1e-6)
