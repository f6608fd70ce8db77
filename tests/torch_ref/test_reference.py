"""Training with a frozen reference: its log-probs are computed once, before training, and are those of the start."""

from __future__ import annotations

import json
import math
import shutil
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from jax_simpo.config import load_config
from jax_simpo.errors import ConfigError, DataError, ModelError
from jax_simpo.run.metrics import read_metrics
from tests.torch_ref.start import DPO, config_file, make_start
from tests.torch_ref.support import record_memory
from torch_ref import reference as reference_module
from torch_ref.__main__ import app
from torch_ref.distributed import Ranks
from torch_ref.evaluate import open_model, score_steps
from torch_ref.reference import frozen_weights, reference_sums
from torch_ref.setup import Setup
from torch_ref.trainer import train

ALONE = Ranks(0, 1, torch.device("cpu"), launched=False)
NEW_MODEL = [
    "--model_name_or_path=null",
    "--tokenizer_name_or_path=builtin:cafe",
    "--model_config={model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, "
    "num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 256, initializer_range: 0.2}",
]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_start(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with other weights, and without a tokenizer."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("other")
    model = AutoModelForCausalLM.from_pretrained(make_start(folder))
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    model.save_pretrained(folder / "alone")
    return folder / "alone"


def setup_of(start: Path, folder: Path, *overrides: str) -> Setup:
    cache = f"--data_cache_dir={folder / 'cache'}"
    file = config_file(start, folder, steps=2, save_strategy="no", lr_scheduler_type="constant", warmup_ratio=0)
    return Setup(load_config(file, [*DPO, cache, *overrides], torch=True), ALONE)


def run(start: Path, folder: Path, *overrides: str) -> tuple[list[dict[str, Any]], str]:
    """Trains, and returns the records and what was printed."""
    console = Console(record=True, width=300, file=StringIO())
    config = setup_of(start, folder, *overrides).config
    train(config, console, ALONE)
    return read_metrics(Path(config.output_dir)), console.export_text()


def sums_of(setup: Setup) -> np.ndarray:
    return reference_sums(setup, [setup.train_pairs()], Console(quiet=True))[0]


def test_the_losses_start_at_log_2_and_a_second_run_finds_the_cache(start: Path, tmp_path: Path) -> None:
    records, printed = run(start, tmp_path, "--do_eval=true")
    steps = [r for r in records if "step" in r]
    assert records[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(steps[1]["loss"] - math.log(2)) > 1e-4
    assert printed.count("reference: computing") == 2  # the training pairs and the evaluation pairs
    again, printed = run(start, tmp_path, "--do_eval=true", f"--output_dir={tmp_path}/again")
    assert "reference: computing" not in printed and printed.count("found in") == 2
    assert [r["loss"] for r in again if "step" in r] == [r["loss"] for r in steps]


@pytest.mark.parametrize(
    ("overrides", "bound"),
    [
        (["--use_peft=true", "--lora_r=4"], 1e-6),
        (["--dtype=bfloat16"], 1e-3),
        ([*NEW_MODEL], 1e-6),
        ([*NEW_MODEL, "--dtype=bfloat16"], 1e-3),
    ],
    ids=["adapter", "bfloat16", "new", "new in bfloat16"],
)
def test_the_reference_is_the_model_as_it_starts(
    overrides: list[str], bound: float, start: Path, tmp_path: Path
) -> None:
    records, _ = run(start, tmp_path, "--max_steps=1", *overrides)
    assert records[0]["rewards/margins"] == pytest.approx(0, abs=2 * bound)
    assert records[0]["loss"] == pytest.approx(math.log(2), abs=bound)


def test_the_reference_may_be_another_model_and_is_gone_before_the_policy_is_made(
    start: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[int] = []
    monkeypatch.setattr(Setup, "load_policy", record_memory(loads))
    records, _ = run(start, tmp_path, f"--ref_model_name_or_path={other}")
    before_reference, before_policy = loads
    assert before_policy - before_reference < 1000 < setup_of(start, tmp_path).parameter_count
    assert abs(records[0]["rewards/margins"]) > 0.01  # not the start
    own = sums_of(setup_of(start, tmp_path))
    assert np.abs(sums_of(setup_of(start, tmp_path, f"--ref_model_name_or_path={other}")) - own).max() > 1


def test_sums_are_those_of_the_model_alone_whatever_the_objective_reads(start: Path, tmp_path: Path) -> None:
    prompts = ["--sft_weight=0.1", "--sft_over=prompt_and_response"]
    setup = setup_of(start, tmp_path, *prompts)
    pairs = setup.train_pairs()
    plan = setup_of(start, tmp_path, "--packing=false").step_plan(pairs, batch=7, seed=None)
    with open_model(setup) as forward:
        steps = score_steps(forward, plan, pairs, ALONE)
        alone, prompts = (np.concatenate(parts) for parts in zip(*steps, strict=True))
    np.testing.assert_allclose(sums_of(setup), alone, rtol=2e-6, atol=2e-5)
    assert not prompts.any() and alone.std() > 1


def test_a_pass_that_was_interrupted_goes_on_where_it_was(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference_module, "GROUPS_PER_PLAN", 8)
    computed: list[range] = []

    def stops(*arguments: Any) -> Any:
        computed.append(arguments[-1])
        for done, scored in enumerate(score_steps(*arguments)):
            if len(computed) == 1 and done == 2:
                raise KeyboardInterrupt
            yield scored

    monkeypatch.setattr(reference_module, "score_steps", stops)
    with pytest.raises(KeyboardInterrupt):
        sums_of(setup_of(start, tmp_path))
    sums = sums_of(setup_of(start, tmp_path))
    assert computed == [range(3), range(2, 3)]
    whole = sums_of(setup_of(start, tmp_path / "other"))
    np.testing.assert_allclose(sums, whole, rtol=2e-6, atol=2e-5)


def test_a_damaged_cache_ends_the_run_with_the_file_and_the_remedy(start: Path, tmp_path: Path) -> None:
    sums_of(setup_of(start, tmp_path))
    (file,) = (tmp_path / "cache").glob("reference-*/sums-000000.bin")
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"sums-000000.bin: .*damaged.* Remove the folder"):
        run(start, tmp_path)


def test_what_the_numbers_depend_on_gives_another_entry(start: Path, other: Path, tmp_path: Path) -> None:
    for overrides in ([], ["--dtype=bfloat16"], [f"--ref_model_name_or_path={other}"], NEW_MODEL):
        sums_of(setup_of(start, tmp_path, *overrides))
    sums_of(setup_of(start, tmp_path, *NEW_MODEL, "--seed=7"))
    sums_of(setup_of(start, tmp_path, "--beta=0.2", "--learning_rate=1.0"))  # nothing depends on these
    entries = [json.loads(file.read_text()) for file in (tmp_path / "cache").glob("reference-*/identity.json")]
    assert len(entries) == 5 and {entry["trainer"] for entry in entries} == {"torch_ref"}


def test_other_weights_in_the_folder_of_the_reference_or_under_an_adapter_make_another_run(
    other: Path, start: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(other, base)

    def digests() -> list[dict[str, Any]]:
        reference = f"--ref_model_name_or_path={base}"
        adapter = [
            "--use_peft=true",
            "--objective=simpo",
            f"--model_name_or_path={base}",
            f"--tokenizer_name_or_path={start}",
        ]
        return [frozen_weights(setup_of(start, tmp_path, *overrides)) for overrides in ([reference], adapter)]

    before = digests()
    assert [list(found) for found in before] == [["reference weights"], ["base weights"]]
    assert digests() == before
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert all(now != then for now, then in zip(digests(), before, strict=True))


def test_a_reference_that_cannot_be_used_is_told_before_anything_is_written(start: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="its weights cannot be found"):
        run(start, tmp_path, f"--ref_model_name_or_path={tmp_path / 'missing'}")
    small = tmp_path / "small"
    small.mkdir()
    values = json.loads((start / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**values, "vocab_size": 10}))
    with pytest.raises(ModelError, match=r"the model only 10\."):
        run(start, tmp_path, f"--ref_model_name_or_path={small}")
    assert not list((tmp_path / "run").iterdir())


def test_an_objective_in_jax_is_refused_before_anything_is_written(start: Path, tmp_path: Path) -> None:
    file = config_file(start, tmp_path, steps=1, beta=None, gamma_beta_ratio=None, sft_weight=None)
    with pytest.raises(ConfigError, match="`jax-simpo train`"):
        app(["train", str(file), "--objective=mine.py:Mine", "--allow_code"], standalone_mode=False)
    assert not list((tmp_path / "run").iterdir())


def test_score_writes_rewards_over_the_reference(start: Path, tmp_path: Path) -> None:
    records, _ = run(start, tmp_path, "--do_eval=true")
    file, config = tmp_path / "scores.jsonl", str(tmp_path / "config.yaml")
    options = ["--split", "test", "--output", str(file), "--model", str(tmp_path / "run/model")]
    app(["score", config, *options, *DPO, f"--data_cache_dir={tmp_path / 'cache'}"], standalone_mode=False)
    scores = [json.loads(line) for line in file.read_text().splitlines()]
    for record in scores:
        chosen, rejected = (
            record[f"{side}_logp_sum"] - record[f"{side}_reference_logp_sum"] for side in ("chosen", "rejected")
        )
        assert record["reward_chosen"] == pytest.approx(0.1 * chosen, abs=1e-5)
        assert record["margin"] == pytest.approx(0.1 * (chosen - rejected), abs=1e-5)
        assert record["loss"] == pytest.approx(np.logaddexp(0, -record["margin"]), abs=1e-6)
    assert np.mean([s["margin"] for s in scores]) == pytest.approx(records[-1]["eval_rewards/margins"], abs=1e-5)
    assert np.mean([s["loss"] for s in scores]) == pytest.approx(records[-1]["eval_loss"], abs=1e-5)
