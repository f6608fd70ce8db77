"""Finds a checkpoint's files, and reads its weights in the files' precision, one tensor at a time."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from jax_simpo.errors import ModelError

_FILES = ["model*.safetensors", "config.json"]


def weights_folder(name: str, revision: str | None, *, download: bool = True) -> Path:
    """Returns the folder of a checkpoint: the path itself, or the local copy of a hub id.

    Args:
        name: a folder or hub id.
        revision: branch, tag or commit of a hub id.
        download: fetch the files of a hub id that are missing here.

    Raises:
        ModelError: there is no such folder, and no such model on a hub that can be reached.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_FILES, local_files_only=not download))
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(f"model {name}: its weights cannot be found ({reason}). Give a folder or a hub id") from error


class StartWeights:
    """Reads tensors by name from a checkpoint that transformers has already loaded. Use it as a context manager.

    Args:
        name: a folder or hub id.
        revision: branch, tag or commit of a hub id.
    """

    def __init__(self, name: str, revision: str | None) -> None:
        self._name, self._revision = name, revision

    def __enter__(self) -> Self:
        from safetensors import safe_open

        with ExitStack() as stack:
            # transformers has just loaded the files, so those of a hub id are in the cache.
            paths = weights_folder(self._name, self._revision, download=False).glob("model*.safetensors")
            files = [stack.enter_context(safe_open(path, framework="pt")) for path in sorted(paths)]
            self._file_of = {key: file for file in files for key in file.keys()}  # not a mapping
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def more_exact(self, name: str, dtype: torch.dtype) -> Tensor | None:
        """Returns a tensor as float32, or None if the checkpoint does not store it with more bits than `dtype` has."""
        file = self._file_of.get(name)
        if file is None:
            return None
        tensor = file.get_tensor(name)
        return tensor.float() if tensor.dtype.itemsize > dtype.itemsize else None
