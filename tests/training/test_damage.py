"""Whatever happens to the files of a run, it goes on with the same numbers or says what is wrong, before it trains."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from jax_simpo.config import TrainConfig
from jax_simpo.errors import CheckpointError
from jax_simpo.run.checkpoint import Checkpoints, starting_point
from tests.training.runs import Records, config_of, losses, run, run_printing


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Records]:
    config = config_of(tmp_path_factory.mktemp("finished"), max_steps=3, save_steps=1)
    return config, run(config)


def copy_of(finished: tuple[TrainConfig, Records], folder: Path) -> TrainConfig:
    """Copies a run and takes its export away, so that the same command goes on."""
    config = finished[0].model_copy(update={"output_dir": str(folder)})
    shutil.copytree(finished[0].output_dir, folder)
    shutil.rmtree(folder / "model")
    return config


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("harm", [flip_a_bit, cut, Path.unlink])
def test_every_file_of_a_step_is_missed_or_found_changed(
    harm: Callable[[Path], None], finished: tuple[TrainConfig, Records], tmp_path: Path
) -> None:
    newest = Path(finished[0].output_dir) / "checkpoints" / "3"
    names = [path.relative_to(newest) for path in sorted(newest.rglob("*")) if path.is_file() and path.stat().st_size]
    assert len(names) > 20 and {name.parts[0] for name in names} > {"params", "optimizer", "run", "seal.json"}
    output = Path(copy_of(finished, tmp_path / "run").output_dir)
    for name in names:
        shutil.rmtree(output / "checkpoints" / "3")
        shutil.copytree(newest, output / "checkpoints" / "3")
        harm(output / "checkpoints" / "3" / name)
        resume, _ = starting_point(finished[0], output, Checkpoints(output / "checkpoints"))
        assert resume.step == 2, name
        assert f"checkpoints/3: {name} " in resume.notes[0] and "\n" not in resume.notes[0]


def test_a_run_goes_on_from_the_newest_whole_step_with_the_same_numbers(
    finished: tuple[TrainConfig, Records], tmp_path: Path
) -> None:
    config = copy_of(finished, tmp_path / "run")
    output = Path(config.output_dir)
    shutil.rmtree(output / "checkpoints" / "2" / "optimizer")
    shutil.copytree(
        output / "checkpoints" / "1" / "params", output / "checkpoints" / "3" / "params", dirs_exist_ok=True
    )
    records, printed = run_printing(config)
    assert "checkpoints/3: params/" in printed and "checkpoints/2: optimizer/" in printed
    assert "the newest that is whole. The damaged ones are set aside: 2.damaged, 3.damaged" in printed
    assert (output / "checkpoints" / "2.damaged").is_dir()
    assert losses(records) == losses(finished[1]) and [r["step"] for r in records] == [1, 2, 3]
    weights = [Path(run) / "model" / "model.safetensors" for run in (output, finished[0].output_dir)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_run_without_a_whole_step_is_refused_and_a_renamed_one_is_none(
    finished: tuple[TrainConfig, Records], tmp_path: Path
) -> None:
    config = copy_of(finished, tmp_path / "run")
    steps = tmp_path / "run" / "checkpoints"
    shutil.rmtree(steps / "1")
    (steps / "2").rename(steps / "5")
    flip_a_bit(steps / "3" / "seal.json")
    with pytest.raises(CheckpointError, match=r"5: seal.json is that of step 2; .*3: seal.json is damaged .*No step"):
        run(config)
    with pytest.raises(CheckpointError, match=r"checkpoints/5: seal.json is that of step 2. Take another step"):
        run(config.model_copy(update={"resume_from_checkpoint": 5}))


def test_changed_records_are_refused_and_missing_ones_are_said(
    finished: tuple[TrainConfig, Records], tmp_path: Path
) -> None:
    config = copy_of(finished, tmp_path / "run")
    records = tmp_path / "run" / "metrics.jsonl"
    flip_a_bit(records)
    with pytest.raises(CheckpointError, match=r"metrics.jsonl: its first .* bytes are not the records that the run"):
        run(config)
    records.unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "3")
    _, printed = run_printing(config)
    assert "metrics.jsonl is missing: the records of the steps before are lost" in printed


def test_going_back_to_a_step_takes_the_later_ones_with_the_next_save(
    finished: tuple[TrainConfig, Records], tmp_path: Path
) -> None:
    config = copy_of(finished, tmp_path / "run").model_copy(update={"resume_from_checkpoint": 1})
    records, printed = run_printing(config)
    assert "the run goes back to step 1, and removes the later ones: 2, 3" in printed
    assert losses(records) == losses(finished[1])
    assert json.loads((tmp_path / "run" / "run.json").read_text())["exported_step"] == 3


def test_a_disk_without_room_is_an_error_and_the_former_steps_stay(
    finished: tuple[TrainConfig, Records], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = copy_of(finished, tmp_path / "run").model_copy(update={"resume_from_checkpoint": 1})

    def full(*_: object, **__: object) -> None:
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device\n[tensorstore spec of 200 lines]")

    with monkeypatch.context() as patch:
        patch.setattr("orbax.checkpoint.AsyncCheckpointer.save", full)
        with pytest.raises(CheckpointError, match=r"step 2 cannot be saved: No space left on device\. Make room"):
            run(config)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(CheckpointError, match=r"takes up to .* GB, but the disk has 1e-06 GB left\. Make room"):
            run(config)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["1"]
    assert losses(run(config)) == losses(finished[1])
