"""A run replaces and removes only the files that it wrote, and says which other files are in its way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jax_simpo.config import TrainConfig
from jax_simpo.errors import CheckpointError, ModelError
from jax_simpo.run import files
from jax_simpo.run.manifest import CARD_SENTENCE, claim, read_manifest, write_file
from jax_simpo.run.output import check_output, prepare_output, remove_run


def config_of(output: Path, **changes: Any) -> TrainConfig:
    settings = {"model_name_or_path": "someone/some-model", "dataset_mixer": {"builtin:cafe": 1.0}}
    return TrainConfig(**{**settings, "output_dir": str(output), **changes})


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def make_older_run(output: Path) -> None:
    """Files as a version without a manifest wrote them."""
    record = {"step": 1, "loss": 0.5, "rewards/margins": 0.1}
    (output / "checkpoints" / "4").mkdir(parents=True)
    (output / "checkpoints" / "4" / "_CHECKPOINT_METADATA").touch()
    (output / "checkpoints" / "5.orbax-checkpoint-tmp-17").mkdir()
    (output / "model").mkdir()
    (output / "model" / "config.json").touch()
    texts = {
        files.CONFIG: config_of(output).to_yaml(),
        files.METRICS: json.dumps(record) + "\n",
        files.FACTS: json.dumps({"versions": {}, "total_steps": 4}),
        files.SAMPLES: json.dumps({key: "" for key in ("prompt", "chosen", "rejected", "before", "after")}) + "\n",
        files.CARD: f"---\n---\n# run\n\nTrained from `x` on the preference pairs of `y` {CARD_SENTENCE}.\n",
        files.REPORT: '<p class="kind">SimPO training run</p>',
        files.CURVES: "",
    }
    for name, text in texts.items():
        (output / name).write_text(text)


def test_a_small_file_that_changed_since_the_run_wrote_it_is_named(tmp_path: Path) -> None:
    for name, texts in {files.FACTS: ["{}", '{"a": 1}'], files.SAMPLES: ["x"], files.CONFIG: ["beta: 2.0\n"]}.items():
        for text in texts:
            write_file(tmp_path, name, text)
    check_output(config_of(tmp_path), tmp_path)
    for name in (files.FACTS, files.SAMPLES):
        content = (tmp_path / name).read_bytes()
        for changed in (content[:-1] + bytes([content[-1] ^ 1]), content[:-1], b""):
            (tmp_path / name).write_bytes(changed)
            with pytest.raises(CheckpointError, match=rf"{name} has changed since the run wrote it. Put a good copy"):
                check_output(config_of(tmp_path), tmp_path)
        check_output(config_of(tmp_path, overwrite_output_dir=True), tmp_path)
        (tmp_path / name).unlink()
        check_output(config_of(tmp_path), tmp_path)


def test_a_kill_between_the_manifest_and_the_file_leaves_a_file_that_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_file(tmp_path, files.FACTS, "former")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    for text in ("new", "newer"):
        with monkeypatch.context() as patch:
            patch.setattr("jax_simpo.run.manifest.writing", killed)
            with pytest.raises(KeyboardInterrupt):
                write_file(tmp_path, files.FACTS, text)
        check_output(config_of(tmp_path), tmp_path)
    write_file(tmp_path, files.FACTS, "new")
    check_output(config_of(tmp_path), tmp_path)


# --- files in the way


def test_a_file_that_no_run_wrote_is_refused_by_its_name_and_stays(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("My project")
    (tmp_path / "config.yaml").write_text("beta: 2.0\n")
    (tmp_path / "train.py").write_text("")
    for overwrite in (False, True):
        config = config_of(tmp_path, overwrite_output_dir=overwrite)
        with pytest.raises(CheckpointError, match=r"holds `config.yaml`, `README.md`, which no run of jax-simpo wrote"):
            check_output(config, tmp_path)
    assert names(tmp_path) == {"README.md", "config.yaml", "train.py"}
    assert (tmp_path / "README.md").read_text() == "My project"


def test_other_files_of_the_user_are_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "train.py").touch()
    (tmp_path / ".writable").write_text("mine")
    (tmp_path / "model").mkdir()  # nothing can be lost of what is empty
    (tmp_path / "metrics.jsonl").touch()
    check_output(config_of(tmp_path), tmp_path)
    assert names(tmp_path) == {"train.py", ".writable", "model", "metrics.jsonl"}


def test_a_model_of_the_users_is_not_taken_for_an_export(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    with pytest.raises(CheckpointError, match="holds `model`, which no run of jax-simpo wrote"):
        check_output(config_of(tmp_path), tmp_path)


def test_only_the_names_that_a_trainer_writes_are_in_its_way(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    check_output(config_of(tmp_path), tmp_path, writes=files.OF_TORCH_REF)


def test_a_file_that_appears_during_the_run_is_not_replaced_either(tmp_path: Path) -> None:
    check_output(config_of(tmp_path), tmp_path)
    prepare_output(config_of(tmp_path), tmp_path)
    write_file(tmp_path, files.CONFIG, "beta: 2.0\n")
    (tmp_path / "README.md").write_text("notes on this run")
    with pytest.raises(CheckpointError, match=r"holds `README.md`"):
        write_file(tmp_path, files.CARD, "card")
    assert (tmp_path / "README.md").read_text() == "notes on this run"
    write_file(tmp_path, files.CONFIG, "beta: 3.0\n")  # its own file
    assert (tmp_path / "config.yaml").read_text() == "beta: 3.0\n"


def test_the_manifest_lists_a_file_before_it_is_there(tmp_path: Path) -> None:
    claim(tmp_path, files.MODEL, files.CHECKPOINTS)
    claim(tmp_path, files.CARD)
    assert read_manifest(tmp_path) == {files.MODEL, files.CHECKPOINTS, files.CARD}
    assert names(tmp_path) == {files.MANIFEST}


@pytest.mark.parametrize("text", ["", "[]", '{"names": []}', "\0"])
def test_a_damaged_manifest_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / files.MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=r"jax-simpo.json: is not the list of files of a run"):
        check_output(config_of(tmp_path), tmp_path)


# --- overwriting


def make_run(output: Path) -> None:
    for name in (files.CHECKPOINTS, files.MODEL):
        claim(output, name)
        (output / name).mkdir()
    (output / "model" / "config.json").touch()
    (output / "checkpoints" / "4").mkdir()
    (output / "checkpoints" / "4" / "state.pt").touch()
    (output / "checkpoints" / "zero_to_fp32.py").touch()
    for name in (files.METRICS, files.CONFIG, files.FACTS):
        write_file(output, name, "{}\n")


def test_overwriting_removes_what_the_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    make_run(tmp_path)
    (tmp_path / "README.md").write_text("mine")  # the run has written none
    (tmp_path / "notes").mkdir()
    remove_run(tmp_path)
    assert names(tmp_path) == {files.MANIFEST, "README.md", "notes"}
    assert read_manifest(tmp_path) == set()


def test_overwriting_leaves_a_file_of_the_users_in_the_checkpoints(tmp_path: Path) -> None:
    make_run(tmp_path)
    (tmp_path / "checkpoints" / "note").write_text("mine")
    remove_run(tmp_path)
    assert names(tmp_path / "checkpoints") == {"note"}
    check_output(config_of(tmp_path), tmp_path)
    prepare_output(config_of(tmp_path), tmp_path)  # the next run may write there


def test_a_file_of_the_users_in_the_model_folder_stops_a_run_from_replacing_it(tmp_path: Path) -> None:
    make_run(tmp_path)
    (tmp_path / "model" / "notes.md").write_text("mine")
    for overwrite in (False, True):
        config = config_of(tmp_path, overwrite_output_dir=overwrite)
        with pytest.raises(ModelError, match=r"holds 'notes.md', which is not part of a model"):
            check_output(config, tmp_path)
    with pytest.raises(ModelError, match=r"holds 'notes.md'"):
        remove_run(tmp_path)
    assert (tmp_path / "checkpoints" / "4" / "state.pt").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_name_or_path", "{output}/model"),
        ("ref_model_name_or_path", "{output}/model"),
        ("tokenizer_name_or_path", "{output}/model"),
        ("dataset_mixer", "{output}/metrics.jsonl"),
    ],
)
def test_what_a_run_starts_from_is_never_removed(key: str, value: str, tmp_path: Path) -> None:
    make_run(tmp_path)
    start = value.format(output=tmp_path)
    changes: dict[str, Any] = {key: {start: 1.0} if key == "dataset_mixer" else start}
    if key == "ref_model_name_or_path":
        changes["objective"] = "dpo"
    with pytest.raises(CheckpointError, match=rf"`{key}.*lies in `output_dir` .*, which `overwrite_output_dir` would"):
        check_output(config_of(tmp_path, overwrite_output_dir=True, **changes), tmp_path)


def test_a_start_that_no_run_wrote_may_lie_in_the_output_directory(tmp_path: Path) -> None:
    make_run(tmp_path)
    (tmp_path / "pairs.jsonl").touch()
    mixer = {str(tmp_path / "pairs.jsonl"): 1.0}
    check_output(config_of(tmp_path, overwrite_output_dir=True, dataset_mixer=mixer), tmp_path)


# --- older output directories


def test_a_run_of_an_older_version_is_continued_and_overwritten(tmp_path: Path) -> None:
    make_older_run(tmp_path)
    of_older_runs = set(files.OF_EVERY_RUN) - {files.BAD_STEPS, files.FINDINGS}  # which they did not write
    assert read_manifest(tmp_path) == of_older_runs
    check_output(config_of(tmp_path), tmp_path)
    write_file(tmp_path, files.METRICS, "")
    assert read_manifest(tmp_path) == of_older_runs  # now from a manifest
    remove_run(tmp_path)
    assert names(tmp_path) == {files.MANIFEST}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.yaml", "beta: 2.0\nlearning_rate: 1e-6\n"),
        ("README.md", "# My project\n\nTrained with jax-simpo.\n"),
        ("metrics.jsonl", '{"step": 1, "loss": 0.5}\n'),
        ("run.json", '{"name": "my run"}'),
        ("samples.jsonl", '{"prompt": "a"}\n'),
        ("report.html", "<html></html>"),
        ("checkpoints/epoch-1.pt", ""),
        ("model/notes.md", ""),
    ],
)
def test_a_file_of_the_users_is_not_taken_for_that_of_an_older_run(name: str, text: str, tmp_path: Path) -> None:
    make_older_run(tmp_path)
    if "/" not in name:
        (tmp_path / name).unlink()
    (tmp_path / name).write_text(text)
    own = name.partition("/")[0]
    assert own not in read_manifest(tmp_path)
    with pytest.raises(CheckpointError, match=rf"holds `{own}`"):
        check_output(config_of(tmp_path, overwrite_output_dir=True), tmp_path)


def test_a_removal_that_was_killed_half_way_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jax_simpo.run import output

    make_older_run(tmp_path)
    (tmp_path / "notes.txt").touch()
    removed: list[str] = []

    def killed(path: Path) -> None:
        if len(removed) == 3:
            raise KeyboardInterrupt
        removed.append(path.name)
        remove(path)

    remove = output.remove
    with monkeypatch.context() as patch:
        patch.setattr(output, "remove", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_run(tmp_path)
    assert len(removed) == 3
    check_output(config_of(tmp_path, overwrite_output_dir=True), tmp_path)
    remove_run(tmp_path)
    assert names(tmp_path) == {files.MANIFEST, "notes.txt"}
