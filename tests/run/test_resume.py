"""Both trainers continue the same step of the same run, and neither touches the checkpoints of the other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jax_simpo.config import TrainConfig
from jax_simpo.errors import CheckpointError, ConfigError
from jax_simpo.run.resume import Resume, check_same_run, check_trainer, choose_step

JAX, TORCH = "jax-simpo train", "python -m torch_ref train"


def whole(step: int) -> None:
    """Finds no damage in a step."""


@pytest.mark.parametrize(
    ("wanted", "steps", "step"),
    [
        (None, [], 0),
        (None, [4, 8], 8),
        (True, [4, 8], 8),
        (False, [], 0),
        (4, [4, 8], 4),
        ("4", [4, 8], 4),
        ("checkpoint-8", [4, 8], 8),
        ("run/checkpoints/4", [4, 8], 4),
    ],
)
def test_the_step_that_is_asked_for_is_continued(wanted: Any, steps: list[int], step: int) -> None:
    assert choose_step(wanted, steps, Path("run"), whole).step == step


@pytest.mark.parametrize(
    ("wanted", "error", "message"),
    [
        (True, CheckpointError, "`resume_from_checkpoint` is true, but run/checkpoints holds no checkpoint"),
        (7, CheckpointError, "run/checkpoints: there is no step 7; there are: none"),
        ("elsewhere/7", ConfigError, "expected true, false, a step number, or a folder run/checkpoints/STEP"),
        ("last", ConfigError, "`resume_from_checkpoint` is 'last'"),
    ],
)
def test_a_step_that_is_not_there_is_an_error(wanted: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        choose_step(wanted, [], Path("run"), whole)


def test_checkpoints_that_would_be_lost_are_named() -> None:
    with pytest.raises(CheckpointError, match=r"is false, but run holds checkpoints \(steps \[4, 8\]\)"):
        choose_step(False, [4, 8], Path("run"), whole)


def damaged(*steps: int) -> Callable[[int], str | None]:
    return lambda step: "params/d/0 is missing" if step in steps else None


def test_a_damaged_step_is_named_and_the_newest_whole_one_is_continued() -> None:
    resume = choose_step(None, [4, 8, 12], Path("run"), damaged(8, 12))
    assert resume == Resume(
        4,
        [
            "warning: run/checkpoints/12: params/d/0 is missing; run/checkpoints/8: params/d/0 is missing; the run "
            "goes on from step 4, the newest that is whole. The damaged ones are set aside: 8.damaged, 12.damaged"
        ],
        [8, 12],
    )
    with pytest.raises(CheckpointError, match=r"checkpoints/4: params/d/0 is missing. No step is whole, so the run"):
        choose_step(True, [4, 8], Path("run"), damaged(4, 8))
    with pytest.raises(CheckpointError, match=r"checkpoints/8: params/d/0 is missing. Take another step; .*: \[4\]"):
        choose_step(8, [4, 8], Path("run"), damaged(8))


def test_going_back_says_which_steps_it_will_cost() -> None:
    assert choose_step(8, [4, 8], Path("run"), whole).notes == []
    (note,) = choose_step(4, [4, 8, 12], Path("run"), whole).notes
    assert note == "note: the run goes back to step 4, and removes the later ones: 8, 12"


def test_another_run_is_refused_with_every_key_that_differs() -> None:
    saved = {"beta": 2.0, "seed": 1, "engine": "a single process"}
    check_same_run(saved, {"beta": 2.0, "seed": 1}, Path("run"))  # the engine is no part of the identity
    with pytest.raises(CheckpointError, match=r"run holds a checkpoint of another run.*:\n  beta: was 2.0, is 3.0\n"):
        check_same_run(saved, {"beta": 3.0, "seed": 1}, Path("run"))


def step_folder(output: Path, file: str, text: str = "") -> None:
    folder = output / "checkpoints" / "4"
    folder.mkdir(parents=True)
    (folder / file).write_text(text)


@pytest.mark.parametrize(
    ("file", "text", "reader", "message"),
    [
        ("_CHECKPOINT_METADATA", "", TORCH, r"checkpoints of `jax-simpo train` \(Orbax\), which `python -m torch_ref"),
        ("run.json", json.dumps({"engine": "DeepSpeed ZeRO-3 on 2 ranks"}), JAX,
         r"checkpoints of `python -m torch_ref train` \(DeepSpeed ZeRO-3 on 2 ranks\), which `jax-simpo train` cannot"),
        ("state.pt", "", JAX, r"checkpoints of `python -m torch_ref train`, which `jax-simpo train` cannot read"),
    ],
)  # fmt: skip
def test_the_checkpoints_of_the_other_trainer_are_refused(
    file: str, text: str, reader: Any, message: str, tmp_path: Path
) -> None:
    step_folder(tmp_path, file, text)
    with pytest.raises(CheckpointError, match=message):
        check_trainer(tmp_path, reader)
    check_trainer(tmp_path, JAX if reader == TORCH else TORCH)


def test_an_output_directory_without_checkpoints_is_read_by_both(tmp_path: Path) -> None:
    for reader in (JAX, TORCH):
        check_trainer(tmp_path, reader)
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)  # killed before anything was in it
    for reader in (JAX, TORCH):
        check_trainer(tmp_path, reader)


def test_a_run_is_identified_by_the_tokens_it_trains_on(tmp_path: Path) -> None:
    from jax_simpo.data import sources
    from jax_simpo.data.synthetic import make_tokenizer
    from jax_simpo.data.tokenize import tokenize_split
    from jax_simpo.run.resume import run_identity

    tokenizer = make_tokenizer("cafe")
    config = TrainConfig(model_name_or_path="a/b", dataset_mixer={"builtin:cafe": 1.0})

    def identity(fraction: float, batch: int = 16, beta: float = 2.0) -> dict[str, Any]:
        raw = sources.load_train({"builtin:cafe": fraction}, ["train"])
        pairs = tokenize_split(raw, tokenizer, max_length=128, max_prompt_length=64, cache_dir=tmp_path)
        return run_identity(config.model_copy(update={"beta": beta}), batch, pairs)

    first = identity(0.01)
    assert first == identity(0.01)
    assert first["training pairs"].startswith("40 pairs, tokens ")
    assert {key for key, value in identity(0.02, batch=8, beta=3.0).items() if value != first[key]} == {
        *("training pairs", "global_batch_size", "beta"),
    }
