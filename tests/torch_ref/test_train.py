"""The command in a single process: metrics, resuming, export, scoring, adapters, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jax_simpo.errors import CheckpointError, ConfigError, ModelError, TrainingError, UserError
from jax_simpo.run import guard
from jax_simpo.run.bad_steps import read_bad_steps
from jax_simpo.run.metrics import read_metrics
from tests.torch_ref.start import TEST_PAIRS, config_file, make_start
from tests.torch_ref.support import poisoned
from torch_ref import trainer
from torch_ref.__main__ import app
from torch_ref.attention_choice import choose_attention
from torch_ref.distributed import Ranks
from torch_ref.trainer import batch_part

STEPS = 5


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_start(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def finished(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps with a checkpoint on the way."""
    folder = tmp_path_factory.mktemp("finished")
    run(start, folder, "--do_eval=true")
    return folder


def run(start: Path, folder: Path, *overrides: str) -> list[dict[str, Any]]:
    file = config_file(start, folder, steps=STEPS)
    app(["train", str(file), *overrides], standalone_mode=False)
    return read_metrics(folder / "run")


def refused(start: Path, folder: Path, *overrides: str, kind: type[UserError] = ConfigError) -> str:
    with pytest.raises(kind) as caught:
        run(start, folder, *overrides)
    return str(caught.value)


def test_metrics_have_the_keys_of_the_other_side(finished: Path) -> None:
    records = read_metrics(finished / "run")
    steps, evaluations = ([r for r in records if key in r] for key in ("step", "eval_step"))
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5] and [r["eval_step"] for r in evaluations] == [0, 5]
    objective = {"loss", "sft_loss", "logps/chosen", "logps/rejected"} | {
        f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")
    }
    speeds = {"tokens_per_second", "pairs_per_second", "packing_fill"}
    assert steps[0].keys() == objective | speeds | {"step", "grad_norm", "learning_rate", "epoch", "pairs", "tokens"}
    more = {"pairs", "runtime", "step", "epoch"}
    assert evaluations[0].keys() == {f"eval_{name}" for name in objective | more}
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]


@pytest.mark.parametrize("layout", [("false", "true"), ("true", "false"), ("false", "false")])
def test_every_layout_has_the_same_curve(layout: tuple[str, str], start: Path, finished: Path, tmp_path: Path) -> None:
    sharing, packing = layout
    ours = run(start, tmp_path, f"--prefix_sharing={sharing}", f"--packing={packing}", "--save_strategy=no")
    oracle = [r for r in read_metrics(finished / "run") if "step" in r]
    for name in ("loss", "grad_norm", "rewards/margins"):
        np.testing.assert_allclose([r[name] for r in ours], [r[name] for r in oracle], atol=1e-4, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_is_the_uninterrupted_one(dtype: str, start: Path, tmp_path: Path) -> None:
    whole = run(start, tmp_path, f"--dtype={dtype}")
    weights = load_weights(tmp_path / "run/model")
    shutil.rmtree(tmp_path / "run/checkpoints/5")
    shutil.rmtree(tmp_path / "run/model")
    resumed = run(start, tmp_path, f"--dtype={dtype}")
    timeless = [{k: v for k, v in r.items() if "per_second" not in k} for r in (*whole, *resumed)]
    assert timeless[:STEPS] == timeless[STEPS:]
    for name, weight in load_weights(tmp_path / "run/model").items():
        assert torch.equal(weight, weights[name]), name


def test_a_step_that_is_not_finite_is_not_applied_and_the_state_before_it_is_kept(
    start: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "batch_part", poisoned(3))
        message = refused(start, tmp_path, "--save_steps=100", kind=TrainingError)
    assert "step 3: the loss is " in message and "the gradient norm nan. Its update was not applied" in message
    run(start, tmp_path, "--save_steps=100")
    ours, oracle = (load_weights(folder / "run/model") for folder in (tmp_path, finished))
    assert all(torch.equal(ours[name], tensor) for name, tensor in oracle.items())


def test_a_step_that_is_left_out_leaves_the_weights_alone_and_is_written_down(
    start: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "batch_part", poisoned(STEPS))
    records = run(start, tmp_path, "--on_bad_step=skip", "--save_steps=1")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    state = torch.load(tmp_path / "run/checkpoints/4/state.pt", weights_only=True)["weights"]
    assert all(torch.equal(weight, state[name]) for name, weight in load_weights(tmp_path / "run/model").items())
    (bad,) = read_bad_steps(tmp_path / "run")
    assert (bad["step"], bad["left_out"], bad["metrics"]["grad_norm"]) == (STEPS, True, "nan")
    good = read_metrics(finished / "run")[-2]  # the step's record in a run where it is good
    rewards = [[response["reward"] for response in group["responses"]] for group in bad["groups"]]
    assert np.mean([chosen - rejected for chosen, rejected in rewards]) == pytest.approx(
        good["rewards/margins"], abs=1e-5
    )
    assert all(group["prompt"] and group["file"] for group in bad["groups"])


def test_a_run_that_left_a_step_out_goes_on_to_the_same_weights_and_leaves_out_no_more_than_it_may(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "batch_part", poisoned(2))
    keys = ("step", "loss", "grad_norm", "learning_rate")
    settings = ("--on_bad_step=skip", "--max_bad_steps=1", "--save_steps=1", "--lr_scheduler_type=linear")
    records = run(start, tmp_path, *settings)
    weights = load_weights(tmp_path / "run/model")
    for later in (4, 5):
        shutil.rmtree(tmp_path / "run/checkpoints" / str(later))
    shutil.rmtree(tmp_path / "run/model")
    resumed = run(start, tmp_path, *settings)
    assert [[r[key] for key in keys] for r in resumed] == [[r[key] for key in keys] for r in records]
    assert all(torch.equal(weight, weights[name]) for name, weight in load_weights(tmp_path / "run/model").items())
    (tmp_path / "other").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(guard, "WINDOW", 4)
        patch.setattr(trainer, "batch_part", batch_part)
        spike = refused(start, tmp_path / "other", *settings, "--spike_sigma=1e-9", kind=TrainingError)
    assert "standard deviations" in spike and "`max_bad_steps: 1` allows to leave out no more" in spike


def test_a_learning_rate_that_overflows_is_refused(start: Path, tmp_path: Path) -> None:
    assert "`learning_rate` is 1e+39; PyTorch's AdamW computes with at most 1e37" in refused(
        start, tmp_path, "--learning_rate=1e39"
    )


@pytest.mark.parametrize("save_strategy", ["steps", "no"])
def test_weights_that_are_not_finite_are_neither_saved_nor_exported(
    save_strategy: str, start: Path, tmp_path: Path
) -> None:
    settings = ("--learning_rate=1e37", "--max_grad_norm=0", "--warmup_ratio=0", "--save_steps=1")
    message = refused(start, tmp_path, *settings, f"--save_strategy={save_strategy}", kind=TrainingError)
    assert "The newest checkpoint is of step" in message
    assert not (tmp_path / "run/model").exists()
    for state in tmp_path.glob("run/checkpoints/*/state.pt"):
        assert all(torch.isfinite(w).all() for w in torch.load(state, weights_only=True)["weights"].values())


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_a_run_replaces_and_removes_only_what_its_manifest_lists(finished: Path) -> None:
    from jax_simpo.run.manifest import read_manifest

    written = {path.name for path in (finished / "run").iterdir()}
    assert written == {*read_manifest(finished / "run"), ".jax-simpo.json"}


def test_score_of_the_exported_model_agrees_with_the_last_evaluation(finished: Path) -> None:
    file, model = finished / "scores.jsonl", finished / "run/model"
    options = ["--split", "test", "--output", str(file), "--model", str(model)]
    app(["score", str(finished / "config.yaml"), *options], standalone_mode=False)
    scores = [json.loads(line) for line in file.read_text().splitlines()]
    last = read_metrics(finished / "run")[-1]
    assert [s["row"] for s in scores] == list(range(last["eval_pairs"]))
    assert np.mean([s["margin"] for s in scores]) == pytest.approx(last["eval_rewards/margins"], abs=1e-6)
    assert scores[0]["chosen_logp"] == pytest.approx(scores[0]["chosen_logp_sum"] / scores[0]["chosen_length"])
    config = json.loads((model / "config.json").read_text())
    assert (config["dtype"], config["use_cache"]) == ("float32", True)


def test_an_adapter_learns_and_its_folder_can_be_scored(start: Path, tmp_path: Path) -> None:
    records = run(start, tmp_path, "--use_peft=true", "--lora_r=4", "--learning_rate=0.01", "--save_strategy=no")
    assert records[-1]["loss"] < records[0]["loss"]
    model, file = tmp_path / "run/model", tmp_path / "scores.jsonl"
    assert (model / "adapter_config.json").exists() and not (model / "model.safetensors").exists()
    for options in ([], ["--model", str(model)]):
        arguments = ["--split", "test", "--output", str(file), "--do_eval=false", *options]
        app(["score", str(tmp_path / "config.yaml"), *arguments], standalone_mode=False)
        last, file = file, tmp_path / "other.jsonl"
    assert last.read_text() != (tmp_path / "scores.jsonl").read_text()


def test_a_new_model_is_made_from_a_mapping(start: Path, tmp_path: Path) -> None:
    new = "{model_type: qwen3, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, head_dim: 8, "
    new += "num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 256}"
    overrides = ["--model_name_or_path=null", f"--model_config={new}", "--tokenizer_name_or_path=builtin:cafe"]
    first, second = (run(start, tmp_path / name, *overrides, "--save_strategy=no") for name in "ab")
    assert [r["loss"] for r in first] == [r["loss"] for r in second]


def test_a_model_that_another_optimizer_trains_can_be_scored(finished: Path) -> None:
    file = finished / "other-optimizer.jsonl"
    options = ["--split", "test", "--output", str(file), "--optim=lion", "--adam_mu_dtype=bfloat16"]
    app(["score", str(finished / "config.yaml"), *options], standalone_mode=False)
    assert len(file.read_text().splitlines()) == TEST_PAIRS


# --- what is refused


def test_optimizers_of_the_other_side_are_refused_before_anything_is_written(start: Path, tmp_path: Path) -> None:
    message = refused(start, tmp_path, "--optim=lion", "--adam_mu_dtype=bfloat16")
    for setting in ("optim: lion", "adam_mu_dtype: bfloat16"):
        assert f"`{setting}` cannot be honoured by `python -m torch_ref`" in message
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_config_is_refused(start: Path, finished: Path) -> None:
    message = refused(start, finished, "--beta=3.0", "--max_steps=9", kind=CheckpointError)
    assert "beta: was 2.5, is 3.0" in message and "max_steps: was 5, is 9" in message


def test_a_finished_run_is_not_trained_again(start: Path, finished: Path) -> None:
    assert "finished at step 5" in refused(start, finished, kind=CheckpointError)


def test_a_missing_checkpoint_is_never_a_silent_restart(start: Path, finished: Path, tmp_path: Path) -> None:
    message = refused(start, tmp_path, "--resume_from_checkpoint=true", kind=CheckpointError)
    assert "holds no checkpoint" in message
    message = refused(start, finished, "--resume_from_checkpoint=4", kind=CheckpointError)
    assert "there is no step 4; there are: [3, 5]" in message


def test_a_damaged_or_foreign_checkpoint_is_told(start: Path, tmp_path: Path) -> None:
    run(start, tmp_path)
    shutil.rmtree(tmp_path / "run/checkpoints/5")
    state = tmp_path / "run/checkpoints/3/state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    message = refused(start, tmp_path, kind=CheckpointError)
    assert "checkpoints/3: state.pt has 1,000 bytes; it was saved with" in message and "No step is whole" in message
    (tmp_path / "run/checkpoints/3/_CHECKPOINT_METADATA").touch()
    assert "checkpoints of `jax-simpo train`" in refused(start, tmp_path, kind=CheckpointError)


def test_a_run_killed_before_its_export_is_completed(start: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/model")
    assert [r["step"] for r in run(start, tmp_path, "--do_eval=true") if "step" in r] == [1, 2, 3, 4, 5]
    for name, weight in load_weights(finished / "run/model").items():
        assert torch.equal(load_weights(tmp_path / "run/model")[name], weight), name
    assert "finished at step 5" in refused(start, tmp_path, "--do_eval=true", kind=CheckpointError)


def test_a_run_that_starts_from_the_model_it_would_overwrite_is_refused(
    start: Path, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished / "run", tmp_path / "run")
    own = ["--overwrite_output_dir=true", f"--model_name_or_path={tmp_path}/run/model"]
    message = refused(start, tmp_path, *own, kind=CheckpointError)
    assert "`model_name_or_path`" in message and "which `overwrite_output_dir` would clear first" in message
    assert load_weights(tmp_path / "run/model").keys() == load_weights(finished / "run/model").keys()


def test_overwriting_keeps_the_finished_run_until_the_new_model_is_loaded(
    start: Path, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished / "run", tmp_path / "run")
    shutil.copytree(start, tmp_path / "broken")
    weights = tmp_path / "broken/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    broken = ["--overwrite_output_dir=true", f"--model_name_or_path={tmp_path}/broken"]
    assert "its weights cannot be loaded" in refused(start, tmp_path, *broken, kind=ModelError)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    records = run(start, tmp_path, "--overwrite_output_dir=true", "--max_steps=1", "--save_strategy=no")
    assert [r["step"] for r in records] == [1]
    assert not list((tmp_path / "run/checkpoints").glob("*"))


def test_files_of_the_users_are_not_touched(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config_file(start, tmp_path, steps=STEPS)  # config.yaml, in the folder that is to be the output directory
    texts = {"config.yaml": (tmp_path / "config.yaml").read_text(), "README.md": "# My project\n"}
    (tmp_path / "README.md").write_text(texts["README.md"])
    for overwrite in ("false", "true"):
        message = refused(
            start, tmp_path, "--output_dir=.", f"--overwrite_output_dir={overwrite}", kind=CheckpointError
        )
        assert "holds `config.yaml`, which no run of jax-simpo wrote" in message
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == texts


def test_a_checkpoint_holds_the_identity_that_both_trainers_use(start: Path, finished: Path) -> None:

    from jax_simpo.config import load_config
    from jax_simpo.run.resume import run_identity
    from torch_ref.setup import Setup

    config = load_config(config_file(start, finished, steps=STEPS), ["--do_eval=true"], torch=True)
    setup = Setup(config, Ranks(0, 1, torch.device("cpu"), launched=False))
    saved = json.loads((finished / "run/checkpoints/3/run.json").read_text())
    assert saved == {**run_identity(config, 6, setup.train_pairs()), "engine": "a single process"}


def test_micro_batches_of_automatic_size_hold_a_step_and_give_the_same_curve(
    start: Path, finished: Path, tmp_path: Path
) -> None:
    from jax_simpo.config import load_config
    from torch_ref.setup import Setup

    layout = ("--packing=false", "--rows_per_device=auto", "--save_strategy=no")
    config = load_config(config_file(start, tmp_path, steps=STEPS), list(layout), torch=True)
    setup = Setup(config, Ranks(0, 1, torch.device("cpu"), launched=False))
    plan = setup.step_plan(setup.train_pairs(), batch=6, seed=config.seed)
    assert plan.rows_per_micro_batch == 6 and plan.step(0).micro_batches == 1  # a step has six pairs
    ours, oracle = run(start, tmp_path, *layout), [r for r in read_metrics(finished / "run") if "step" in r]
    for name in ("loss", "grad_norm", "rewards/margins"):
        np.testing.assert_allclose([r[name] for r in ours], [r[name] for r in oracle], atol=1e-4, err_msg=name)


def test_several_evaluation_splits_have_figures_each_and_over_all_pairs(start: Path, tmp_path: Path) -> None:
    from jax_simpo.data.synthetic import make_rows

    for split, rows in {"train": slice(12), "helpful": slice(12, 18), "harmless": slice(18, 20)}.items():
        lines = [json.dumps(row) + "\n" for row in make_rows("cafe", "train")[rows]]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    data = [f"--dataset_mixer={{{tmp_path}: 1.0}}", "--dataset_splits=[train, helpful, harmless]"]
    record = run(start, tmp_path, *data, "--do_eval=true", "--max_steps=1", "--save_strategy=no")[-1]
    assert (record["eval_pairs"], record["eval_helpful_pairs"], record["eval_harmless_pairs"]) == (8, 6, 2)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen"):
        mean = (6 * record[f"eval_helpful_{name}"] + 2 * record[f"eval_harmless_{name}"]) / 8
        assert record[f"eval_{name}"] == pytest.approx(mean, abs=1e-9)
    assert {"eval_helpful_loss", "eval_harmless_sft_loss"} <= record.keys()


def test_a_run_goes_on_from_the_newest_whole_step_and_unfinished_ones_go(
    start: Path, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/model")
    steps = tmp_path / "run/checkpoints"
    (steps / "3").rename(steps / ".3.writing")  # sealed, so it only had to be moved to its place
    (steps / "5").rename(steps / ".5.writing")
    (steps / ".5.writing/seal.json").unlink()
    assert [r["step"] for r in run(start, tmp_path, "--do_eval=true") if "step" in r] == [1, 2, 3, 4, 5]
    assert sorted(path.name for path in steps.iterdir()) == ["3", "5"]
    for name, weight in load_weights(finished / "run/model").items():
        assert torch.equal(load_weights(tmp_path / "run/model")[name], weight), name


@pytest.mark.parametrize("wanted", ["flex", "flash_attention_2", "flash_attention_3"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_only_attention_is_refused_without_cuda(wanted: str, start: Path, tmp_path: Path) -> None:
    assert "needs a CUDA GPU" in refused(start, tmp_path, f"--torch_attention={wanted}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_quantised_weights_are_refused_without_cuda(start: Path, tmp_path: Path) -> None:
    assert "needs a CUDA GPU" in refused(start, tmp_path, "--load_in_4bit=true", "--use_peft=true")
    assert "add an adapter" in refused(start, tmp_path, "--load_in_8bit=true")


def test_flash_attention_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig

    from tests.torch_ref.support import settings

    monkeypatch.setattr("torch_ref.attention_choice._is_installed", lambda name: False)
    config = settings("stacked", torch_attention="flash_attention_2", dtype="bfloat16")
    with pytest.raises(ConfigError, match="`flash_attn` is not installed"):
        choose_attention(config, LlamaConfig(), torch.device("cuda"))
    rows = settings("packed", torch_attention="flash_attention_2")
    with pytest.raises(ConfigError, match="supports no masks of rows"):
        choose_attention(rows, LlamaConfig(), torch.device("cuda"))


def test_an_unknown_family_is_told(start: Path, tmp_path: Path) -> None:
    overrides = ["--model_name_or_path=null", "--tokenizer_name_or_path=builtin:cafe"]
    message = refused(start, tmp_path, *overrides, "--model_config={model_type: llamma}", kind=ModelError)
    assert "llamma" in message and "a family that transformers knows" in message
    message = refused(start, tmp_path, *overrides, "--model_config={model_type: t5}", kind=ModelError)
    assert "no causal language model" in message


def test_a_checkpoint_that_lacks_tensors_is_told(start: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(start, broken)
    weights = load_file(broken / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    message = refused(start, tmp_path, f"--model_name_or_path={broken}", kind=ModelError)
    assert "lacks 1 tensors, such as model.norm.weight" in message


def test_an_index_of_weights_names_files_of_its_folder_only(start: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(start, tmp_path / "model")
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refused(start, tmp_path, f"--model_name_or_path={folder}", kind=ModelError)
    assert "`weight_map` names '../outside.safetensors', which is no file of this folder" in message


def test_more_layers_than_any_model_has_are_refused_at_once(start: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(start, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**9}))
    message = refused(start, tmp_path, f"--model_name_or_path={folder}", kind=ModelError)
    assert "num_hidden_layers=1000000000, expected at most 10,000" in message


def test_a_batch_that_the_ranks_cannot_share_out_is_refused() -> None:

    from tests.torch_ref.support import settings
    from torch_ref.setup import Setup

    ranks = Ranks(0, 3, torch.device("cpu"), launched=True)
    with pytest.raises(ConfigError, match=r"16, which 3 ranks cannot share out equally.*such as 18"):
        Setup(settings(global_batch_size=16), ranks).global_batch_size()


def test_quantised_weights_and_dropout_belong_to_this_side(start: Path, tmp_path: Path) -> None:
    from jax_simpo.config import load_config

    file = config_file(start, tmp_path, steps=1)
    for key in ("--load_in_4bit=true", "--lora_dropout=0.1"):
        with pytest.raises(ConfigError, match=r"cannot be honoured.*torch_ref"):
            load_config(file, ["--use_peft=true", key])
        assert load_config(file, ["--use_peft=true", key], torch=True).use_peft


def test_an_adapter_needs_a_model_that_has_a_name(start: Path, tmp_path: Path) -> None:
    new = ["--model_name_or_path=null", "--model_config={model_type: llama}", "--tokenizer_name_or_path=builtin:cafe"]
    assert "adds to a model that exists" in refused(start, tmp_path, *new, "--use_peft=true")
