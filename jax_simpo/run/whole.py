"""Writes a folder whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from jax_simpo.errors import ModelError

# What an export may replace: a folder with anything else in it is not only a model.
_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model", "README.md")


def check_replaceable(folder: Path) -> None:
    """Makes sure that an export to this folder would replace nothing but a model.

    Raises:
        ModelError: it would.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ModelError(f"{folder}: is a file; export to another folder")
    foreign = [path.name for path in folder.iterdir() if not any(path.match(p) for p in _MODEL_FILES)]
    if foreign:
        raise ModelError(
            f"{folder}: holds {foreign[0]!r}, which is not part of a model, and an export replaces the whole "
            "folder; export to another one"
        )


def fresh_folder_beside(folder: Path) -> Path:
    former = _former(folder)
    if former.exists() and not folder.exists():  # killed between the two moves of the last export
        former.rename(folder)
    check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left_over in folder.parent.glob(f".{folder.name}.writing-*"):
        shutil.rmtree(left_over)
    temporary = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
    temporary.mkdir()
    return temporary


def move_into_place(temporary: Path, folder: Path) -> None:
    for path in temporary.iterdir():  # on the disk before the name says that it is there
        with path.open("rb") as file:
            os.fsync(file.fileno())
    former = _former(folder)
    shutil.rmtree(former, ignore_errors=True)
    if folder.exists():
        folder.rename(former)
    temporary.rename(folder)
    shutil.rmtree(former, ignore_errors=True)


def _former(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.former")
