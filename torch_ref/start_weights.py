"""Reads the start weights from a checkpoint's files, in the files' precision, one tensor at a time."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Self

import torch
from torch import Tensor


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
            files = [stack.enter_context(safe_open(file, framework="pt")) for file in sorted(self._files())]
            self._file_of = {key: file for file in files for key in file.keys()}  # not a mapping
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _files(self) -> list[Path]:
        folder = Path(self._name)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            # transformers has just loaded the files, so they are in the cache.
            folder = Path(snapshot_download(self._name, revision=self._revision, local_files_only=True))
        return list(folder.glob("model*.safetensors"))

    def more_exact(self, name: str, dtype: torch.dtype) -> Tensor | None:
        """Returns a tensor as float32, or None if the checkpoint does not store it with more bits than `dtype` has."""
        file = self._file_of.get(name)
        if file is None:
            return None
        tensor = file.get_tensor(name)
        return tensor.float() if tensor.dtype.itemsize > dtype.itemsize else None
