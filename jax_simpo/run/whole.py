"""Writes and removes a file or a folder as a whole, so that a killed program leaves no half of it under its name.

Contents are written beside their place under a recognisable name, `.NAME.writing-PID`, brought to the disk, and then
renamed. What killed writers left under such names is removed by the next writer.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import IO, Any

from jax_simpo.errors import ConfigError, ModelError
from jax_simpo.run import signals
from jax_simpo.run.sums import write_model_sums

# The files that transformers and peft write to a model's folder, and the picture of its card. A folder with any other
# file is not only a model.
_MODEL_FILES = (
    *("config.json", "generation_config.json", "adapter_config.json", "adapter_model.safetensors", "README.md"),
    "curves.png",
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "vocab.txt", "*.model", "*.tiktoken", "chat_template.*", "additional_chat_templates"),
    *("SHA256SUMS", "processor_config.json", "preprocessor_config.json", "*.py"),
)
_LEFT_OVER = re.compile(r"\.(.+)\.writing-\d+")  # of a file that was being written


# --- files


@contextmanager
def writing(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Opens a file that takes its place only when the block ends without an error.

    The file is opened before the block runs, so a path that cannot be written is found before any work. If the block
    fails, a former file stays as it was, and folders that were made for the file are removed again. A device or a pipe
    (`/dev/stdout`, `/dev/null`) is written to directly; a symbolic link keeps pointing to the file, which is replaced.

    Args:
        path: the file; missing folders on the way to it are made.
        mode: "w" for text in UTF-8, "wb" for bytes.

    Raises:
        ConfigError: the file cannot be written.
    """
    shown, path = path, Path(path).absolute()
    missing = [folder for folder in path.parents if not os.path.exists(folder)]
    regular = os.path.isfile(path) or not os.path.exists(path)  # opening a folder fails below, with the system's reason
    path = path.resolve() if regular else path
    temporary = _temporary(path) if regular else path

    def remove_temporary() -> None:
        if regular:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    encoding = None if "b" in mode else "utf-8"
    try:
        with _cannot_be_written(shown):
            if missing:
                path.parent.mkdir(parents=True)
            if regular:
                _remove_left_overs(path)
            file = temporary.open(mode, encoding=encoding)
        with signals.before_ending(remove_temporary), _full_disk(shown), file:
            yield file
            if regular:
                with _cannot_be_written(shown):
                    file.flush()
                    os.fsync(file.fileno())
        if regular:
            with _cannot_be_written(shown):
                temporary.replace(path)
                sync_folder(path.parent)
    except BaseException:
        remove_temporary()
        for folder in missing:  # innermost first; a folder that somebody else has used by now is not empty and stays
            with suppress(OSError):
                folder.rmdir()
        raise


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file in UTF-8, whole or not at all.

    Raises:
        ConfigError: the file cannot be written.
    """
    with writing(path) as file:
        file.write(text)


@contextmanager
def _cannot_be_written(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}. Give another path") from error


@contextmanager
def _full_disk(path: str | Path) -> Iterator[None]:
    """Words the error of a full disk, which comes from within the block: while the caller writes to the file."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ConfigError(f"{path} cannot be written: {error.strerror}. Make room and start again") from error


# --- folders


def check_replaceable(folder: Path) -> None:
    """Makes sure that an export to this folder would replace nothing but a model.

    Raises:
        ModelError: the path is a file, or the folder holds a file that is no part of a model.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ModelError(f"{folder}: is a file; export to another folder")
    foreign = sorted(path.name for path in folder.iterdir() if not _is_of_model(path.name))
    if foreign:
        raise ModelError(
            f"{folder}: holds {foreign[0]!r}, which is not part of a model, and an export replaces the whole "
            "folder; export to another one"
        )


def _is_of_model(name: str) -> bool:
    """Returns True for the name of a model's file, and for what a killed writer of such a file left."""
    left_over = _LEFT_OVER.fullmatch(name)
    path = PurePath(left_over[1] if left_over else name)
    return any(path.match(pattern) for pattern in _MODEL_FILES)


@contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """Gives a new folder to write a model to, which takes the place of `folder` when the block ends without an error.

    The folder gets `SHA256SUMS`. The former folder is moved aside, the new one moved to its place, and the former one
    removed. If the program is killed between the two moves, the next call moves the former folder back.

    Raises:
        ModelError: `folder` is a file or holds anything that is no part of a model, or it cannot be written.
    """
    folder = Path(folder).absolute()
    former = folder.with_name(f".{folder.name}.former")
    temporary = _temporary(folder)
    try:
        if former.exists() and not folder.exists():
            former.rename(folder)
        check_replaceable(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_overs(folder)
        temporary.mkdir()
        yield temporary
        write_model_sums(temporary)
        if former.exists():
            shutil.rmtree(former)
        if folder.exists():
            folder.rename(former)
        temporary.rename(folder)
        sync_folder(folder.parent)
        shutil.rmtree(former, ignore_errors=True)
    except OSError as error:
        raise ModelError(f"{folder}: the model cannot be written there ({error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already, unless something failed


def remove(path: Path) -> None:
    """Removes a file or a folder; a killed removal leaves no half folder under its name. A missing path is no error."""
    removed = path.with_name(f".{path.name}.removed")
    if removed.exists():
        shutil.rmtree(removed)
    if path.is_dir() and not path.is_symlink():
        path.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)  # somebody may still read it; the next start removes the rest
    else:
        path.unlink(missing_ok=True)


# --- names beside the place, and the disk


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.writing-{os.getpid()}")


def _remove_left_overs(path: Path) -> None:
    """Removes what killed writers of this path left; a writer that still runs on this host keeps its own."""
    prefix = f".{path.name}.writing-"
    for left_over in [entry for entry in path.parent.iterdir() if entry.name.startswith(prefix)]:
        number = left_over.name.removeprefix(prefix)
        if number.isdecimal() and (int(number) == os.getpid() or not _runs(int(number))):
            shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink(missing_ok=True)


def _runs(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it runs, and belongs to another user
        return True
    return True


def sync_folder(folder: Path) -> None:
    """Brings a renaming to the disk, where the file system can do so."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
