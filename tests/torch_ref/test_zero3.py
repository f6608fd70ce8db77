"""ZeRO-3 on two gloo ranks against a single process. All that needs the ranks is computed in one start."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from jax_simpo.run.bad_steps import read_bad_steps
from jax_simpo.run.facts import read_facts
from jax_simpo.run.metrics import read_metrics
from tests.torch_ref.start import BEST, DPO, SKIPPING, config_file, make_start
from tests.torch_ref.support import poisoned
from torch_ref import trainer
from torch_ref.__main__ import app

pytest.importorskip("deepspeed")
ROOT = Path(__file__).parents[2]
STEPS = 5
# Everything is partitioned, however small, and nothing is kept for later.
DEEPSPEED = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    }
}
LAYOUTS = {"rows": [], "stacked": ["--prefix_sharing=false", "--packing=false"]}


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, start_new_session=True, **pipes) as process:
        try:
            out, err = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:  # the ranks are the launcher's children, and must go with it
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs a single process and several ranks from the same start; returns the folder of their results."""
    folder = tmp_path_factory.mktemp("zero3")
    start = make_start(folder / "start")
    (folder / "deepspeed.json").write_text(json.dumps(DEEPSPEED))
    file = config_file(start, folder / "plain", steps=STEPS)
    app(["train", str(file)], standalone_mode=False)
    # In a cache of its own: the ranks are to compute the reference's log-probs, and not to find these.
    own = [*DPO, f"--data_cache_dir={folder}/cache", "--save_strategy=no"]
    app(["train", str(config_file(start, folder / "plain-dpo", steps=STEPS)), *own], standalone_mode=False)
    app(["train", str(config_file(start, folder / "plain-best", steps=STEPS)), *BEST], standalone_mode=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "batch_part", poisoned(3))
        app(
            ["train", str(config_file(start, folder / "plain-skipping", steps=STEPS)), *SKIPPING], standalone_mode=False
        )
    done = torchrun(str(ROOT / "tests/torch_ref/zero3_cells.py"), str(folder))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "found.json").read_text())


def curve(folder: Path, name: str, *keys: str, left_out: int = 0) -> np.ndarray:
    records = [r for r in read_metrics(folder / name / "run") if "step" in r]
    assert [r["step"] for r in records] == [step for step in range(1, STEPS + 1) if step != left_out]
    return np.array([[r[key] for key in keys] for r in records])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_five_steps_are_those_of_a_single_process(layout: str, folder: Path) -> None:
    keys = ("loss", "grad_norm", "rewards/margins", "sft_loss", "rewards/accuracies")
    np.testing.assert_allclose(curve(folder, layout, *keys), curve(folder, "plain", *keys), atol=1e-5)


def test_dpo_starts_at_log_2_and_has_the_curve_of_a_single_process(folder: Path) -> None:
    keys = ("loss", "grad_norm", "rewards/margins", "rewards/accuracies")
    ours = curve(folder, "dpo", *keys)
    np.testing.assert_allclose(ours, curve(folder, "plain-dpo", *keys), atol=1e-5)
    assert ours[0, 0] == pytest.approx(math.log(2), abs=1e-6)
    assert read_metrics(folder / "dpo/run")[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_a_gradient_that_is_not_finite_on_one_rank_is_applied_on_none(found: dict[str, Any]) -> None:
    """`test_a_resumed_run_is_the_uninterrupted_one` compares the run that goes on from there."""
    assert "step 5: the loss is " in found["bad step"] and "Its update was not applied" in found["bad step"]
    assert found["saved"] == [3, 4]


def test_a_step_that_is_bad_on_one_rank_is_left_out_on_all(folder: Path) -> None:
    keys = ("loss", "grad_norm", "learning_rate", "rewards/margins")
    ours, oracle = (curve(folder, name, *keys, left_out=3) for name in ("skipping", "plain-skipping"))
    np.testing.assert_allclose(ours, oracle, atol=1e-5)
    for name in ("skipping", "plain-skipping"):
        assert [(bad["step"], bad["left_out"]) for bad in read_bad_steps(folder / name / "run")] == [(3, True)]


def test_nothing_of_the_reference_is_left_when_the_policy_is_made(found: dict[str, Any]) -> None:
    before_reference, before_policy = found["memory"]
    assert before_policy - before_reference < 1000 < found["rows"]["held"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_a_single_process(layout: str, folder: Path, tmp_path: Path) -> None:

    from jax_simpo.config import load_config
    from torch_ref.batches import build_rank_step
    from torch_ref.distributed import Ranks
    from torch_ref.setup import Setup
    from torch_ref.trainer import batch_part, make_engine

    config = load_config(config_file(folder / "start/model", tmp_path, steps=STEPS), LAYOUTS[layout])
    setup = Setup(config, Ranks(0, 1, torch.device("cpu"), launched=False))
    pairs = setup.train_pairs()
    step = build_rank_step(setup.step_plan(pairs, batch=6, seed=42), pairs, 0, 0, 1)
    engine = make_engine(setup)
    for batch in step.micro_batches:
        engine.backward(batch_part(engine, setup.objective, batch, step).loss, last=False)
    ours = torch.load(folder / f"gradients-{layout}.pt")
    oracle = engine.gradients()
    assert ours.keys() == oracle.keys() and "model.layers.1.self_attn.q_proj.weight" in ours
    for name, gradient in oracle.items():
        distance = torch.linalg.norm(ours[name] - gradient) / torch.linalg.norm(gradient)
        assert distance < 1e-5, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_chosen_and_rejected_share_one_gathering_of_each_parameter(layout: str, found: dict[str, Any]) -> None:
    assert set(found[layout]["gathered"]) == {found[layout]["parameters"]}


def test_a_rank_holds_its_share_of_the_model_and_no_more(found: dict[str, Any]) -> None:
    assert found["rows"]["held"] == found["rows"]["parameters"] // 2
    assert found["rows"]["visible"] == 0


def test_a_step_that_leaves_a_rank_without_pairs_was_among_them(folder: Path, found: dict[str, Any]) -> None:
    assert found["ranks"] == [2.0]
    assert curve(folder, "stacked", "pairs")[:, 0].tolist() == [6, 6, 6, 3, 6]  # one pair a forward, on two ranks


def test_a_resumed_run_is_the_uninterrupted_one(folder: Path) -> None:
    keys = ("loss", "grad_norm", "learning_rate", "rewards/margins")
    assert (curve(folder, "resumed", *keys) == curve(folder, "rows", *keys)).all()


def test_the_exported_model_is_that_of_a_single_process(folder: Path) -> None:
    from safetensors.torch import load_file

    ours, oracle = (load_file(folder / name / "run/model/model.safetensors") for name in ("rows", "plain"))
    assert ours.keys() == oracle.keys()
    for name in oracle:
        torch.testing.assert_close(ours[name], oracle[name], atol=1e-4, rtol=0)
    assert (folder / "rows/run/model/tokenizer.json").exists()


def test_all_ranks_end_a_run_early_and_export_the_best_model_as_a_single_process_does(folder: Path) -> None:
    """The learning rate of the first step is 0, so its model, which is the best here, is that of the start."""
    for name in ("best", "plain-best"):
        facts = read_facts(folder / name / "run")
        assert (facts["exported_step"], facts["model_step"], facts["ended_early"]) == (3, 1, True)
        weights, start = (load_file(folder / of / "model.safetensors") for of in (f"{name}/run/model", "start/model"))
        assert weights.keys() == start.keys() and all(torch.equal(weights[n], start[n]) for n in start)
    ours, theirs = (read_metrics(folder / name / "run") for name in ("best", "plain-best"))
    assert [r["loss"] for r in ours if "step" in r] == pytest.approx(
        [r["loss"] for r in theirs if "step" in r], abs=1e-5
    )


def test_an_adapter_trains(folder: Path) -> None:
    records = read_metrics(folder / "adapter/run")
    assert records[-1]["eval_loss"] < records[0]["eval_loss"]
    assert (folder / "adapter/run/model/adapter_model.safetensors").exists()


def test_bfloat16_stays_near_float32(folder: Path) -> None:
    distance = np.abs(curve(folder, "bfloat16", "loss") - curve(folder, "plain", "loss"))
    assert 0 < distance.max() < 0.05


def test_bfloat16_starts_from_the_float32_weights_of_the_checkpoint(folder: Path) -> None:
    """DeepSpeed alone would make its master weights from rounded ones."""
    start, checkpoint = load_file(folder / "start.safetensors"), load_file(folder / "start/model/model.safetensors")
    assert start.keys() == checkpoint.keys()
    assert all(torch.equal(start[name], checkpoint[name]) for name in checkpoint)


def test_scores_are_those_of_a_single_process(folder: Path, found: dict[str, Any], tmp_path: Path) -> None:
    file = config_file(folder / "start/model", tmp_path, steps=STEPS)
    app(["score", str(file), "--split", "test", "--output", str(tmp_path / "scores.jsonl")], standalone_mode=False)
    for line, ours in zip((tmp_path / "scores.jsonl").read_text().splitlines(), found["scores"], strict=True):
        oracle = json.loads(line)
        del oracle["row"]
        for response, theirs in zip(ours.pop("responses"), oracle.pop("responses"), strict=True):
            assert response == pytest.approx(theirs, abs=2e-5)
        assert ours == pytest.approx(oracle, abs=2e-5)


def test_what_is_refused_is_told(found: dict[str, Any]) -> None:
    assert "beta: was 2.5, is 3.0" in found["another config"]
    assert "7, which 2 ranks cannot share out equally" in found["uneven"]
    assert "written by a single process, this is DeepSpeed ZeRO-3 on 2 ranks" in found["plain checkpoint"]


def test_the_command_tells_a_mistake_once_and_ends_with_an_error(folder: Path, tmp_path: Path) -> None:
    file = config_file(folder / "start/model", tmp_path, steps=STEPS)
    done = torchrun("-m", "torch_ref", "train", str(file), "--resume_from_checkpoint=true")
    assert done.returncode == 1
    assert done.stderr.count("error: `resume_from_checkpoint` is true") == 1
    assert "torch_ref/trainer.py" not in done.stderr  # no traceback of ours


def test_parameters_are_counted_before_models_are_partitioned(folder: Path) -> None:
    """Partitioned parameters look empty, and a count of zero would plan rows that are too long."""
    from transformers import AutoConfig

    from torch_ref.model import count_parameters
    from torch_ref.zero3 import Zero3Model

    config = AutoConfig.from_pretrained(folder / "start/model")
    count = count_parameters(config)
    partition = Zero3Model(DEEPSPEED | {"train_micro_batch_size_per_gpu": 1})
    with pytest.raises(RuntimeError, match="before a `Zero3Model` exists"):
        count_parameters(config)
    del partition
    assert count_parameters(config) == count > 0
