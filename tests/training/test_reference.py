"""Training with a frozen reference: its log-probs are computed once, before training, and are those of the start."""

from __future__ import annotations

import itertools
import json
import math
from io import StringIO
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from jax_simpo import api
from jax_simpo.config import TrainConfig
from jax_simpo.errors import CheckpointError, DataError, ModelError
from jax_simpo.run.metrics import read_metrics
from jax_simpo.training import reference as reference_module
from jax_simpo.training import trainer
from jax_simpo.training.reference import Reference
from jax_simpo.training.setup import Setup

MODEL = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
LAYOUTS = [*itertools.product((True, False), repeat=2)]


def config_of(folder: Path, **changes: Any) -> TrainConfig:
    settings = {
        "model_config": MODEL,
        "tokenizer_name_or_path": "builtin:cafe",
        "dataset_mixer": {"builtin:cafe": 0.01},
        "objective": "dpo",
        "max_length": 128,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "global_batch_size": 16,
        "max_steps": 2,
        "dtype": "float32",
        "output_dir": str(folder / "run"),
        "data_cache_dir": str(folder / "cache"),
    }
    return TrainConfig(**{**settings, **changes})


def train(config: TrainConfig) -> tuple[list[dict[str, Any]], str]:
    """Trains, and returns the records and what was printed."""
    console = Console(record=True, width=300, file=StringIO())
    trainer.train(config, console)
    return read_metrics(Path(config.output_dir)), console.export_text()


def sums_of(config: TrainConfig) -> np.ndarray:
    setup = Setup(config)
    return Reference.of(setup).sums(setup.train_pairs(), Console(quiet=True))


@pytest.mark.parametrize(
    ("adapter", "dtype", "bound"), [(False, "bfloat16", 1e-3), (True, "float32", 1e-6), (True, "bfloat16", 1e-3)]
)
def test_the_first_steps_loss_is_log_2(adapter: bool, dtype: str, bound: float, tmp_path: Path) -> None:
    records, _ = train(config_of(tmp_path, dtype=dtype, use_peft=adapter, max_steps=1))
    assert records[0]["loss"] == pytest.approx(math.log(2), abs=bound)
    assert records[0]["rewards/margins"] == pytest.approx(0, abs=2 * bound)


def test_the_losses_start_at_log_2_and_a_second_run_finds_the_cache(tmp_path: Path) -> None:
    evaluates = {"do_eval": True, "eval_strategy": "epoch"}
    records, printed = train(config_of(tmp_path, **evaluates))
    steps = [r for r in records if "step" in r]
    assert records[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(steps[1]["loss"] - math.log(2)) > 1e-4
    assert printed.count("reference: computing") == 2  # the training pairs and the evaluation pairs
    again, printed = train(config_of(tmp_path, output_dir=str(tmp_path / "again"), **evaluates))
    assert "reference: computing" not in printed and printed.count("found in") == 2
    assert [r["loss"] for r in again if "step" in r] == [r["loss"] for r in steps]


def test_sums_are_the_same_in_every_layout_and_from_the_cache(tmp_path: Path) -> None:
    found = {}
    for sharing, packing in LAYOUTS:
        config = config_of(
            tmp_path, prefix_sharing=sharing, packing=packing, data_cache_dir=str(tmp_path / f"{sharing}-{packing}")
        )
        found[sharing, packing] = sums_of(config)
        np.testing.assert_array_equal(sums_of(config), found[sharing, packing])
    for sums in found.values():
        # A sum of thirty log-probs; 2e-5 a response, relative where the sum is above 1.
        np.testing.assert_allclose(sums, found[True, True], rtol=2e-6, atol=2e-5)
    assert found[True, True].std() > 1


def test_a_pass_that_was_interrupted_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_module, "GROUPS_PER_PLAN", 8)
    config = config_of(tmp_path)
    computed: list[range] = []
    original = reference_module.score_steps

    def stops(*arguments: Any) -> Any:
        computed.append(arguments[-1])
        for done, scored in enumerate(original(*arguments)):
            if len(computed) == 1 and done == 2:
                raise KeyboardInterrupt
            yield scored

    monkeypatch.setattr(reference_module, "score_steps", stops)
    with pytest.raises(KeyboardInterrupt):
        sums_of(config)
    sums = sums_of(config)
    assert computed[1].start == 2 and computed[1].stop == -(-len(sums) // 16)  # two responses a pair
    whole = sums_of(config_of(tmp_path, data_cache_dir=str(tmp_path / "other")))
    np.testing.assert_allclose(sums, whole, rtol=2e-6, atol=2e-5)


def test_the_reference_may_be_another_model_and_its_weights_are_gone_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    setup = Setup(config_of(tmp_path, seed=7))
    with jax.set_mesh(setup.mesh):
        setup.export(setup.load_params(), other)
    for file in [*other.glob("*token*"), *other.glob("chat_template*")]:
        file.unlink()  # it scores the tokens of the run
    alive: list[int] = []
    load = Setup.load_params

    def counted(self: Setup) -> Any:
        alive.append(sum(x.nbytes for x in jax.live_arrays()))
        return load(self)

    monkeypatch.setattr(Setup, "load_params", counted)
    records, _ = train(config_of(tmp_path, ref_model_name_or_path=str(other)))
    assert abs(records[0]["rewards/margins"]) > 0.01  # not the start
    assert len(alive) == 2  # the reference, then the policy
    assert alive[1] - alive[0] < 20_000 < 4 * setup.model.parameter_count  # nothing of the reference is left
    own = sums_of(config_of(tmp_path))
    assert np.abs(sums_of(config_of(tmp_path, ref_model_name_or_path=str(other))) - own).max() > 1
    (other / "SHA256SUMS").unlink()  # or the change is found as damage
    change(other / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"these settings differ:\n  reference weights: was \["):
        train(config_of(tmp_path, ref_model_name_or_path=str(other), max_steps=3))


def change(weights: Path) -> None:
    """Changes the last weight of a file by one bit."""
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)


def test_without_a_cache_the_policy_starts_from_the_loaded_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[Setup] = []
    load = Setup.load_params
    monkeypatch.setattr(Setup, "load_params", lambda self: (loads.append(self), load(self))[1])
    train(config_of(tmp_path))
    assert len(loads) == 1


def test_a_resumed_run_has_the_numbers_of_one_that_was_not_stopped(tmp_path: Path) -> None:
    whole, _ = train(config_of(tmp_path, max_steps=4, output_dir=str(tmp_path / "whole")))
    train(config_of(tmp_path, max_steps=2, save_steps=2))
    resumed, _ = train(config_of(tmp_path, max_steps=4, save_steps=2))
    assert [r["loss"] for r in resumed if "step" in r] == [r["loss"] for r in whole if "step" in r]


def test_a_damaged_cache_ends_the_run_with_the_file_and_the_remedy(tmp_path: Path) -> None:
    sums_of(config_of(tmp_path))
    (file,) = (tmp_path / "cache").glob("reference-*/sums-000000.bin")
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)
    with pytest.raises(DataError, match="damaged"):
        train(config_of(tmp_path))


def test_a_reference_that_is_not_there_is_found_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        train(config_of(tmp_path, ref_model_name_or_path=str(tmp_path / "missing")))
    assert not list((tmp_path / "run").iterdir())


def test_score_gives_rewards_over_the_reference(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    run = api.train(config, quiet=True)
    rows = [{"prompt": "Anna: tea please", "chosen": "Yes, at once.", "rejected": "No."}]
    model = api.load_model(run.model_path, data_cache_dir=str(tmp_path / "cache"))
    (record,) = api.score(model, rows)
    ratios = [record[f"{side}_logp_sum"] - record[f"{side}_reference_logp_sum"] for side in ("chosen", "rejected")]
    assert record["reward_chosen"] == pytest.approx(0.1 * ratios[0], abs=1e-5)
    assert record["margin"] == pytest.approx(0.1 * (ratios[0] - ratios[1]), abs=1e-5)
    assert record["loss"] == pytest.approx(np.logaddexp(0, -record["margin"]), abs=1e-6)
    assert json.dumps(record)
    without = api.load_model(run.model_path, objective="simpo", beta=2.0)
    assert "chosen_reference_logp_sum" not in api.score(without, rows)[0]
