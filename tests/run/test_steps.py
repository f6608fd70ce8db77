"""A step appears, is replaced and disappears as a whole, at whichever moment the program is killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jax_simpo.run.steps import StepFolders, is_beside_steps

SAVE = """
import os, shutil, signal, sys
from pathlib import Path
from jax_simpo.run import seal, sums
from jax_simpo.run.steps import StepFolders

calls, dies_at = 0, int(sys.argv[2])


def killed_in(module, name):
    original = getattr(module, name)

    def call(*args, **options):
        global calls
        calls += 1
        if calls == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **options)

    setattr(module, name, call)


for name in ("rename", "replace", "mkdir"):
    killed_in(Path, name)
for name in ("rmdir", "unlink", "fsync"):
    killed_in(os, name)
steps = StepFolders(Path(sys.argv[1]))
steps.begin()
folder = steps.writing(8)
folder.mkdir()
for name in ("params", "run"):
    (folder / name).write_text(sys.argv[3])
own = sums.sums_of(folder, seal.file_names(folder), to_disk=True)
seal.Seal(8, sums.NOTHING, own).write(folder)
steps.finish(8)
steps.thin_out(1, besides=(8,))
"""


def save(folder: Path, text: str, dies_at: int = 0) -> int:
    return subprocess.run([sys.executable, "-c", SAVE, str(folder), str(dies_at), text]).returncode


def text_of(step: Path) -> str:
    first, second = ((step / name).read_text() for name in ("params", "run"))
    assert first == second
    return first


def make_steps(directory: Path, *steps: int) -> StepFolders:
    for step in steps:
        (directory / str(step)).mkdir(parents=True)
        for name in ("params", "run", "seal.json"):
            (directory / str(step) / name).write_text("former")
    return StepFolders(directory)


def test_a_replaced_step_is_the_former_or_the_new_one_wherever_the_program_is_killed(tmp_path: Path) -> None:
    outcomes = []
    for dies_at in range(1, 100):
        directory = tmp_path / str(dies_at)
        steps = make_steps(directory, 4, 8)
        killed = save(directory, "new", dies_at) != 0
        steps.clean()
        assert steps.all()[-1] == 8 and {path.name for path in directory.iterdir()} <= {"4", "8"}
        outcomes.append(text_of(steps[8]))
        if not killed:
            break
    assert dies_at > 15 and steps.all() == [8]
    assert outcomes == sorted(outcomes) and set(outcomes) == {"former", "new"}  # never back from the new to the former


def test_steps_are_listed_by_number_and_unfinished_ones_are_not(tmp_path: Path) -> None:
    assert StepFolders(tmp_path / "missing").all() == []
    steps = make_steps(tmp_path, 8, 12, 4)
    (tmp_path / "16").touch()  # no folder
    for name in (".16.writing", ".16.writing.orbax-checkpoint-tmp-3", "9.orbax-checkpoint-tmp-17", ".2.removed"):
        (tmp_path / name).mkdir()
        assert is_beside_steps(name)
    assert steps.all() == [4, 8, 12] and not is_beside_steps("8") and not is_beside_steps("notes")
    steps.begin()
    assert sorted(os.listdir(tmp_path)) == ["12", "16", "4", "8"]


@pytest.mark.parametrize(
    ("newest", "besides", "kept"),
    [(None, (16,), [4, 8, 12, 16]), (1, (16,), [16]), (2, (16, 4), [4, 12, 16]), (1, (16, None), [16])],
)
def test_which_steps_stay_after_a_save(
    newest: int | None, besides: tuple[int | None, ...], kept: list[int], tmp_path: Path
) -> None:
    steps = make_steps(tmp_path, 4, 8, 12, 16)
    steps.thin_out(newest, besides=besides)
    assert steps.all() == kept


def test_a_run_that_goes_back_leaves_damaged_steps_aside_and_no_later_ones(tmp_path: Path) -> None:
    steps = make_steps(tmp_path, 4, 8, 12)
    for _ in range(2):
        make_steps(tmp_path, *{8, 12} - set(steps.all()))
        steps.leave_behind(4, damaged=[12])
        assert steps.all() == [4] and sorted(os.listdir(tmp_path)) == ["12.damaged", "4"]
        assert is_beside_steps("12.damaged") and text_of(tmp_path / "12.damaged") == "former"
