"""The cache of reference log-probs: a float32 sum a response, kept between runs and written as they are computed.

An entry is a folder named by a hash of everything that its numbers depend on. It holds `identity.json`, which spells
that out, and a file for every few hundred groups, each with a checksum. So a pass that was interrupted goes on where it
was, and what was damaged, or put there from elsewhere, is found when it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jax_simpo.errors import DataError
from jax_simpo.gguf_files import gguf_parts, is_gguf
from jax_simpo.run.whole import writing

VERSION = 1
"""Raise this number with every change to the forward pass that moves a log-prob by more than rounding."""

_IDENTITY = "identity.json"
_DIGEST_BYTES = 32


@dataclass(frozen=True)
class ReferenceCache:
    """One entry of the cache: the sums of all responses of a data set under one reference.

    Attributes:
        root: the folder of all entries.
        identity: everything that the numbers depend on, representable in JSON.
        groups: the number of groups.
        responses: the number of their responses.
        groups_per_file: the number of groups whose sums are written at a time.
    """

    root: Path
    identity: Mapping[str, Any]
    groups: int
    responses: int
    groups_per_file: int

    @cached_property
    def _described(self) -> dict[str, Any]:
        sizes = {
            "version": VERSION,
            "groups_per_file": self.groups_per_file,
            "groups": self.groups,
            "responses": self.responses,
        }
        return dict(json.loads(json.dumps({**self.identity, **sizes})))

    @cached_property
    def folder(self) -> Path:
        """The folder of the entry."""
        text = json.dumps(self._described, sort_keys=True)
        return self.root / f"reference-{hashlib.sha256(text.encode()).hexdigest()[:32]}"

    @property
    def steps(self) -> int:
        """The number of files of a finished entry."""
        return -(-self.groups // self.groups_per_file)

    def read(self) -> list[Float[np.ndarray, " R"]]:
        """Reads the files that are there, from the first on, and returns the sums in each.

        Raises:
            DataError: a file is damaged, or the entry belongs to another reference or other groups.
        """
        if not self.folder.is_dir():
            return []
        self._check_identity()
        return [self._read_file(step) for step in takewhile(lambda n: self._file(n).exists(), range(self.steps))]

    def write(self, step: int, sums: Float[np.ndarray, " R"]) -> None:
        """Writes the sums of the responses of the groups from `step * groups_per_file` on.

        Raises:
            ConfigError: the file cannot be written.
        """
        identity = self.folder / _IDENTITY
        if not identity.exists():
            with writing(identity) as file:
                json.dump(self._described, file, indent=1)
        content = np.ascontiguousarray(sums, "<f4").tobytes()
        with writing(self._file(step), "wb") as file:
            file.write(self._digest(step, content) + content)

    def _file(self, step: int) -> Path:
        return self.folder / f"sums-{step:06d}.bin"

    def _digest(self, step: int, content: bytes) -> bytes:
        """Returns a checksum that no other entry's file and no other step's has."""
        return hashlib.sha256(f"{self.folder.name}/{step}/".encode() + content).digest()

    def _read_file(self, step: int) -> Float[np.ndarray, " R"]:
        file = self._file(step)
        data = file.read_bytes()
        digest, content = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        if digest != self._digest(step, content):
            raise DataError(
                f"{file}: these reference log-probs are damaged, or belong to another cache: their checksum does not "
                f"fit. Remove the folder {self.folder}; they are then computed again"
            )
        return np.frombuffer(content, "<f4")

    def _check_identity(self) -> None:
        file = self.folder / _IDENTITY
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            if not os.listdir(self.folder):
                return
            raise DataError(
                f"{file}: cannot be read ({error}), so nobody knows whose reference log-probs these are. Remove the "
                f"folder {self.folder}; they are then computed again"
            ) from error
        names = self._described.keys() | found.keys()
        if differing := sorted(name for name in names if found.get(name) != self._described.get(name)):
            values = "; ".join(f"{n} is {found.get(n)!r}, here {self._described.get(n)!r}" for n in differing)
            raise DataError(
                f"{file}: these reference log-probs are not those of this run ({values}). Remove the folder "
                f"{self.folder}, or set `data_cache_dir` to another one"
            )


def model_digest(folder: Path) -> str:
    """Returns a hash of a model's weights and configuration, from the content of its files.

    It reads every byte, several files at a time, and so takes about as long as loading the model.

    Args:
        folder: the folder of a model or of an adapter, or a GGUF file.
    """
    configs = [folder / name for name in ("config.json", "adapter_config.json")]
    files = [*filter(Path.exists, configs), *sorted(folder.glob("*.safetensors"))]
    if is_gguf(folder):
        files = [*gguf_parts(folder)]

    def of_file(path: Path) -> str:
        with path.open("rb") as file:
            return f"{path.name} {hashlib.file_digest(file, 'blake2b').hexdigest()}"

    with ThreadPoolExecutor(max_workers=min(8, max(1, len(files)))) as pool:
        return hashlib.sha256("\n".join(pool.map(of_file, files)).encode()).hexdigest()
