"""The run as a whole: its files, resuming, and what it refuses."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from jax_simpo import hf
from jax_simpo.config import TrainConfig
from jax_simpo.data.groups import GroupLengths
from jax_simpo.errors import CheckpointError, ConfigError, DataError, MeshError, ModelError, TrainingError, UserError
from jax_simpo.run import files
from jax_simpo.run.checkpoint import Checkpoints
from jax_simpo.run.manifest import claim, read_manifest
from jax_simpo.run.metrics import read_metrics
from jax_simpo.run.resume import run_identity
from jax_simpo.run.sums import write_model_sums
from jax_simpo.training import trainer
from jax_simpo.training.evaluate import GroupScores, evaluation_metrics, split_metrics
from jax_simpo.training.setup import Setup
from tests.pairs import random_pairs
from tests.training.runs import MODEL, Records, config_of, losses, run, stop_after


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Records]:
    config = config_of(tmp_path_factory.mktemp("finished"))
    return config, run(config)


def test_a_run_writes_its_records_and_a_model(finished: tuple[TrainConfig, Records]) -> None:
    config, records = finished
    output = Path(config.output_dir)
    assert [r["step"] for r in records] == list(range(1, 13))
    assert [r["pairs"] for r in records] == [16, 16, 16, 16, 16, 1] * 2
    assert records[-1]["epoch"] == 2.0 and records[0]["learning_rate"] == 0.0
    names = "rewards/chosen rewards/rejected rewards/accuracies rewards/margins logps/chosen logps/rejected grad_norm"
    rates = "tokens tokens_per_second pairs_per_second packing_fill"
    assert set(f"{names} {rates}".split()) < set(records[0])
    assert all(0 <= r["idle"] <= 1 for r in records)
    assert records[-1]["total_waited"] <= records[-1]["total_seconds"]
    assert sorted(p.name for p in (output / "checkpoints").iterdir()) == ["12", "4", "8"]
    assert (output / "config.yaml").read_text() == config.to_yaml()

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(output / "model")
    assert model.config.use_cache


def test_a_killed_run_goes_on_with_the_same_numbers_to_the_bit(
    finished: tuple[TrainConfig, Records], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = find_spec("tensorboard") is not None
    config = config_of(tmp_path, report_to="tensorboard" if watched else "none")
    with monkeypatch.context() as patch:
        stop_after(6, patch)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    records = run(config)
    assert [r["step"] for r in records] == list(range(1, 13))
    assert losses(records) == losses(finished[1])
    for name in ("grad_norm", "learning_rate", "rewards/margins", "tokens"):
        assert [r[name] for r in records] == [r[name] for r in finished[1]]
    if not watched:
        return
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(Path(config.output_dir) / "tensorboard")).Reload()
    for name in set(records[0]) - {"step"}:
        expected = [(r["step"], pytest.approx(r[name])) for r in records]
        assert [(event.step, event.value) for event in shown.Scalars(name)] == expected


@pytest.mark.slow  # the quick test of two hosts does so too
def test_a_run_goes_on_with_the_same_batches_on_another_mesh(
    finished: tuple[TrainConfig, Records], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = {"global_batch_size": None, "per_device_train_batch_size": 2}
    with monkeypatch.context() as patch:
        stop_after(6, patch)
        with pytest.raises(KeyboardInterrupt):
            run(config_of(tmp_path, mesh={"fsdp": 8}, **batch))
    records = run(config_of(tmp_path, mesh={"fsdp": 4, "tensor": 2}, **batch))
    assert [r["pairs"] for r in records] == [r["pairs"] for r in finished[1]]
    np.testing.assert_allclose(losses(records), losses(finished[1]), atol=1e-5)


def test_a_finished_run_is_not_trained_again(finished: tuple[TrainConfig, Records]) -> None:
    with pytest.raises(CheckpointError, match="finished at step 12: nothing is left to train"):
        run(finished[0])


def test_a_checkpoint_of_another_run_is_refused_with_the_keys_that_differ(
    finished: tuple[TrainConfig, Records],
) -> None:
    folder = Path(finished[0].output_dir).parent
    with pytest.raises(CheckpointError, match=r"another run; these settings differ:\n  beta: was 2.0, is 3.0\n"):
        run(config_of(folder, beta=3.0))
    with pytest.raises(CheckpointError, match="global_batch_size: was 16, is 8"):
        run(config_of(folder, global_batch_size=8))
    with pytest.raises(CheckpointError, match=r"training pairs: was '81 pairs, .* is '122 pairs"):
        run(config_of(folder, dataset_mixer={"builtin:cafe": 0.03}))


def test_overwriting_starts_afresh_and_touches_no_other_file(tmp_path: Path) -> None:
    config = config_of(tmp_path, max_steps=2)
    run(config)
    mine = Path(config.output_dir) / "notes.txt"
    mine.write_text("mine")
    records = run(config_of(tmp_path, max_steps=3, overwrite_output_dir=True))
    assert [r["step"] for r in records] == [1, 2, 3] and mine.read_text() == "mine"


def test_evaluation_records_carry_their_own_keys(tmp_path: Path) -> None:
    config = config_of(tmp_path, do_eval=True, eval_strategy="steps", eval_steps=2, max_steps=3, save_strategy="no")
    run(config)
    records = [r for r in read_metrics(tmp_path / "run") if "step" not in r]
    assert [r["eval_step"] for r in records] == [0, 2, 3]
    assert all(name.startswith("eval_") for record in records for name in record)
    assert records[0]["eval_pairs"] == 512
    # Two log-probs a model has not learned to tell apart: a loss near softplus(beta * gamma_beta_ratio).
    assert records[0]["eval_loss"] == pytest.approx(np.logaddexp(0, 2.0 * 0.25), abs=0.05)
    with pytest.raises(CheckpointError, match="finished run without checkpoints"):
        run(config)


def test_several_evaluation_splits_have_figures_each_and_over_all_pairs(tmp_path: Path) -> None:
    from jax_simpo.data.synthetic import make_rows

    for split, rows in {"train": slice(40), "helpful": slice(40, 70), "harmless": slice(70, 80)}.items():
        lines = [json.dumps(row) + "\n" for row in make_rows("cafe", "train")[rows]]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    splits = {"dataset_mixer": {str(tmp_path): 1.0}, "dataset_splits": ["train", "helpful", "harmless"]}
    run(config_of(tmp_path, **splits, do_eval=True, max_steps=1, save_strategy="no", sft_weight=0.5))
    record = read_metrics(tmp_path / "run")[-1]
    assert (record["eval_pairs"], record["eval_helpful_pairs"], record["eval_harmless_pairs"]) == (40, 30, 10)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen"):
        mean = (30 * record[f"eval_helpful_{name}"] + 10 * record[f"eval_harmless_{name}"]) / 40
        assert record[f"eval_{name}"] == pytest.approx(mean, abs=1e-9)
    assert {"eval_helpful_loss", "eval_harmless_sft_loss"} <= record.keys()
    assert "By split, at step 1" in (tmp_path / "run" / "README.md").read_text()


def test_the_figures_of_a_split_are_those_of_its_pairs_alone_to_the_bit() -> None:
    rng = np.random.default_rng(0)
    groups = random_pairs(rng, 30, 50, prompt=(1, 9), response=(1, 40))
    sums = -50 * rng.random(60, np.float32)
    scores = GroupScores(GroupLengths.of(groups), sums, np.zeros(30, np.float32), np.zeros(30, int))
    objective = trainer.Setup(config_of(Path("."), sft_weight=0.5)).objective
    splits = {"a": np.arange(0, 30, 2), "b": np.arange(1, 30, 2)}
    figures = split_metrics(scores, objective, splits)
    overall = {**evaluation_metrics(scores, objective), "pairs": 30}
    for prefix, metrics in (
        ("eval_", overall),
        *((f"eval_{name}_", evaluation_metrics(scores.of_groups(own), objective)) for name, own in splits.items()),
    ):
        assert {f"{prefix}{name}": value for name, value in metrics.items()}.items() <= figures.items()
    assert split_metrics(scores, objective, {"a": np.arange(30)}) == {f"eval_{k}": v for k, v in overall.items()}


def test_a_split_whose_figures_would_have_the_names_of_others_is_refused(tmp_path: Path) -> None:
    changes = {"do_eval": True, "sft_weight": 1.0, "dataset_splits": ["train", "test", "sft"]}
    pair = {"prompt": "Anna", "chosen": "One tea", "rejected": "One coffee"}
    for split in changes["dataset_splits"]:
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(pair) + "\n")
    with pytest.raises(ConfigError, match="`eval_sft_loss` of the split `sft` would have the name of another metric"):
        run(config_of(tmp_path, dataset_mixer={str(tmp_path): 1.0}, **changes))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_max_steps_goes_round_the_data_as_often_as_needed(tmp_path: Path) -> None:
    records = run(config_of(tmp_path, max_steps=13, logging_steps=13, num_train_epochs=1, save_strategy="no"))
    assert [r["step"] for r in records] == [13] and records[0]["epoch"] > 2


def test_accumulation_does_not_change_the_numbers(finished: tuple[TrainConfig, Records], tmp_path: Path) -> None:
    one_row_at_a_time = run(config_of(tmp_path, row_length=128, save_strategy="no", mesh={"data": 8, "fsdp": 1}))
    np.testing.assert_allclose(losses(one_row_at_a_time), losses(finished[1]), atol=1e-5)


def test_a_run_killed_before_its_export_is_completed(finished: tuple[TrainConfig, Records], tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished[0].output_dir, output)
    exported = (output / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(output / "model")
    assert losses(run(config_of(tmp_path))) == losses(finished[1])
    assert (output / "model" / "model.safetensors").read_bytes() == exported


def test_a_mistake_found_early_leaves_the_run_that_was_to_be_overwritten(tmp_path: Path) -> None:
    config = config_of(tmp_path, max_steps=1)
    run(config)
    with pytest.raises(MeshError):
        run(config_of(tmp_path, max_steps=1, overwrite_output_dir=True, mesh={"fsdp": 3}))
    assert (tmp_path / "run" / "model" / "config.json").exists()


def test_a_run_in_the_users_own_folder_touches_none_of_his_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    texts = {"config.yaml": "# my config\nbeta: 2.0\n", "README.md": "# My project\n", "train.py": "print()\n"}
    for name, text in texts.items():
        Path(name).write_text(text)
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match=r"holds `config.yaml`, `README.md`, which no run of jax-simpo wrote"):
            run(config_of(tmp_path, output_dir=".", overwrite_output_dir=overwrite))
    assert {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()} == texts


def test_everything_a_run_leaves_is_in_its_manifest(finished: tuple[TrainConfig, Records]) -> None:
    output = Path(finished[0].output_dir)
    assert {path.name for path in output.iterdir()} == {*read_manifest(output), files.MANIFEST}


def test_a_run_of_an_older_version_is_continued_and_overwritten(
    finished: tuple[TrainConfig, Records], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished[0].output_dir, output)
    names = read_manifest(output)
    (output / files.MANIFEST).unlink()
    assert read_manifest(output) == names
    with pytest.raises(CheckpointError, match="finished at step 12"):
        run(config_of(tmp_path))
    assert len(run(config_of(tmp_path, overwrite_output_dir=True, max_steps=1, save_strategy="no"))) == 1
    assert not (output / "checkpoints").exists()


def cut_short(start: Path) -> None:
    weights = start / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def of_another_shape(start: Path) -> None:
    config = json.loads((start / "config.json").read_text())
    (start / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))


def changed_since_its_export(start: Path) -> None:
    write_model_sums(start)
    weights = start / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")


def without_weights(start: Path) -> None:
    (start / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "changes", "error", "message"),
    [
        (cut_short, {}, ModelError, "model.safetensors: cannot be read as safetensors .* it may be cut short"),
        (of_another_shape, {}, ModelError, "has shape .*, but config.json makes it"),
        (without_weights, {}, ModelError, "no model.safetensors"),
        (changed_since_its_export, {}, ModelError, r"model.safetensors: is not the file that was exported"),
        (None, {"mesh": {"fsdp": -1, "tensor": 4}}, MeshError, "do not divide the model's num_attention_heads=2"),
        (None, {"tokenizer_name_or_path": "nowhere/"}, UserError, "nowhere"),
        (None, {"dataset_mixer": {"nowhere.jsonl": 1.0}}, DataError, "nowhere.jsonl: no such file"),
    ],
)
def test_overwriting_keeps_the_finished_run_until_all_that_the_new_one_needs_is_known_to_be_good(
    damage: Any,
    changes: dict[str, Any],
    error: type[UserError],
    message: str,
    finished: tuple[TrainConfig, Records],
    tmp_path: Path,
) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished[0].output_dir, output)
    # A model from elsewhere, which has no checksums.
    shutil.copytree(output / "model", tmp_path / "start", ignore=shutil.ignore_patterns("SHA256SUMS"))
    if damage is not None:
        damage(tmp_path / "start")
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    start = {"model_config": None, "model_name_or_path": str(tmp_path / "start")}
    with pytest.raises(error, match=message):
        run(config_of(tmp_path, overwrite_output_dir=True, **{**start, **changes}))
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_checkpoints_of_the_pytorch_reference_are_refused(tmp_path: Path) -> None:
    step = tmp_path / "run" / "checkpoints" / "3"
    step.mkdir(parents=True)
    (step / "run.json").write_text(json.dumps({"beta": 2.0, "engine": "a single process"}))
    with pytest.raises(CheckpointError, match=r"of `python -m torch_ref train` \(a single process\), which `jax-simpo"):
        run(config_of(tmp_path))


def test_a_checkpoint_holds_the_identity_that_both_trainers_use(
    finished: tuple[TrainConfig, Records],
) -> None:
    config = finished[0]
    with Checkpoints(Path(config.output_dir) / "checkpoints") as checkpoints:
        saved = checkpoints.run(12)
    assert saved == run_identity(config, 16, trainer.Setup(config).train_pairs())


def test_a_diverged_step_does_not_replace_a_good_checkpoint(tmp_path: Path) -> None:
    config = config_of(
        tmp_path, learning_rate=1e30, warmup_ratio=0, logging_steps=5, save_steps=1, save_total_limit=1, max_steps=10
    )
    with pytest.raises(TrainingError, match="The newest checkpoint is of step 1"):
        run(config)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["1"]


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    run(config_of(tmp_path, save_steps=1, save_total_limit=2, max_steps=4))
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["3", "4"]


def test_a_run_made_longer_and_killed_before_its_export_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"lr_scheduler_type": "constant", "warmup_ratio": 0, "save_steps": 1}
    run(config_of(tmp_path, max_steps=1, **settings))
    first = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(hf, "save_model", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(config_of(tmp_path, max_steps=3, **settings))
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == first
    run(config_of(tmp_path, max_steps=3, **settings))
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() != first
    with pytest.raises(CheckpointError, match="finished at step 3"):
        run(config_of(tmp_path, max_steps=3, **settings))


def test_what_a_run_starts_from_is_never_overwritten(tmp_path: Path) -> None:
    run(config_of(tmp_path, max_steps=1))
    start = str(tmp_path / "run" / "model")
    second = {"model_config": None, "model_name_or_path": start, "overwrite_output_dir": True}
    with pytest.raises(CheckpointError, match=r"`model_name_or_path` .*model lies in `output_dir`"):
        run(config_of(tmp_path, **second))
    assert (tmp_path / "run" / "model" / "config.json").exists()


def test_a_model_folder_with_files_of_somebody_else_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    claim(tmp_path / "run", files.MODEL, files.CHECKPOINTS)
    (tmp_path / "run" / "model").mkdir()
    (tmp_path / "run" / "model" / "notes.md").write_text("mine")
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "checkpoints" / "note").write_text("")
    with pytest.raises(ModelError, match=r"holds 'notes.md', which is not part of a model"):
        run(config_of(tmp_path))


def test_settings_that_json_writes_differently_are_still_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"model_config": {**MODEL, "id2label": {0: "a"}}, "max_steps": 4, "save_steps": 2}
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(KeyboardInterrupt):
            run(config_of(tmp_path, **changes))
    assert [r["step"] for r in run(config_of(tmp_path, **changes))] == [1, 2, 3, 4]


def test_totals_are_counted_over_the_whole_run_also_after_a_resume(
    finished: tuple[TrainConfig, Records], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path, logging_steps=5)
    with monkeypatch.context() as patch:
        stop_after(5, patch)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    records = run(config)
    assert [r["step"] for r in records] == [5, 10, 12]
    assert records[-1]["total_pairs"] == 162 == finished[1][-1]["total_pairs"]
    assert records[-1]["total_tokens"] == sum(r["tokens"] for r in finished[1]) == finished[1][-1]["total_tokens"]
    assert 0 < records[-1]["total_seconds"] < 600


def test_a_learning_rate_nobody_chose_is_pointed_out(finished: tuple[TrainConfig, Records], tmp_path: Path) -> None:
    console = Console(record=True, quiet=False, file=open(tmp_path / "log", "w"), width=200)
    settings = config_of(tmp_path, max_steps=1).model_dump(by_alias=True, exclude={"learning_rate"})
    settings |= {"model_name_or_path": f"{finished[0].output_dir}/model", "model_config": None}
    trainer.train(TrainConfig(**settings), console)
    console.file.close()
    assert "`learning_rate` is not set; 5e-05 is used, published SimPO runs use 3e-7" in console.export_text()


def test_resume_from_checkpoint_takes_the_step_it_is_given(
    finished: tuple[TrainConfig, Records], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished[0].output_dir, output)
    config = config_of(tmp_path, resume_from_checkpoint=4)
    records = run(config)
    assert losses(records) == losses(finished[1])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mesh": {"fsdp": 3}}, MeshError, r"mesh \(data=1, fsdp=3, tensor=1\) does not divide the 8 cpu device"),
        ({"mesh": {"fsdp": -1, "tensor": 4}}, MeshError, "do not divide the model's num_attention_heads=2"),
        ({"row_length": 128, "max_length": 600, "prefix_sharing": False, "dataset_mixer": {"LONG": 1.0}}, DataError,
         r"long.jsonl, row 1: its 2 responses take \d+ tokens, but a row holds 128"),
        ({"do_eval": True, "dataset_splits": ["train"]}, ConfigError, "names no split to evaluate"),
        ({"model_config": {**MODEL, "vocab_size": 50}}, ModelError, "the tokenizer has .* the model only 50"),
        ({"learning_rate": 1e30, "warmup_ratio": 0}, TrainingError,
         r"step 2: the loss is .*, the gradient norm nan\. .*Lower `learning_rate`"),
        ({"resume_from_checkpoint": True}, CheckpointError, "holds no checkpoint"),
        ({"resume_from_checkpoint": 7}, CheckpointError, "there is no step 7; there are: none"),
        ({"resume_from_checkpoint": "elsewhere/7"}, ConfigError, "expected true, false, a step number, or a folder"),
        ({"attention": "splash"}, ConfigError, "`attention: splash` needs a TPU"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_an_error_that_says_why(
    changes: dict[str, Any], error: type[UserError], message: str, tmp_path: Path
) -> None:
    if "LONG" in changes.get("dataset_mixer", {}):
        rows = [
            {"prompt": "Anna", "chosen": "One tea", "rejected": "One coffee"},
            {"prompt": "Anna", "chosen": "One" + " tea" * 200, "rejected": "One coffee"},
        ]
        file = tmp_path / "long.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        changes = {**changes, "dataset_mixer": {str(file): 1.0}}
    with pytest.raises(error, match=message):
        run(config_of(tmp_path, **changes))


def test_an_evaluation_split_that_is_not_there_is_found_before_training_pairs_are_tokenised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Setup, "train_pairs", lambda _: pytest.fail("the training pairs are tokenised"))
    with pytest.raises(DataError, match="has no split `dev`"):
        run(config_of(tmp_path, do_eval=True, dataset_splits=["train", "dev"]))


def test_an_output_directory_that_cannot_be_written_is_refused_before_anything_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"`output_dir` .*file/run cannot be written to: Not a directory"):
        run(config_of(tmp_path, output_dir=str(tmp_path / "file" / "run")))


def test_no_parameter_is_ever_unsharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    init = trainer.make_train_functions

    def spy(*args: Any, **options: Any) -> Any:
        functions = init(*args, **options)

        def update(params: Any, state: Any, gradients: Any) -> Any:
            result = functions.update(params, state, gradients)
            seen.extend(jax.tree.leaves((result, gradients)))
            return result

        from dataclasses import replace

        return replace(functions, update=update)

    monkeypatch.setattr(trainer, "make_train_functions", spy)
    run(config_of(tmp_path, max_steps=1, save_strategy="no", mesh={"fsdp": 8}))
    arrays = [x for x in seen if x.ndim]
    assert len(arrays) > 40
    assert all(x.addressable_shards[0].data.size * 8 == x.size for x in arrays)
