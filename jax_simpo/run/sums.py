"""Sizes and checksums of files, and `SHA256SUMS` of an exported model.

A run's own files have XXH3 checksums of 128 bits. They find damage in a fraction of the time that SHA-256 takes, but
not somebody who changes a file on purpose. `SHA256SUMS` has the format of the command `sha256sum`, so
`sha256sum -c SHA256SUMS` checks a model too.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import xxhash

from jax_simpo.errors import ModelError
from jax_simpo.run.listed import is_inside

MODEL_SUMS = "SHA256SUMS"
_THREADS = 16  # reading waits for the disk as often as for a core


class Digest(Protocol):
    """A checksum that is computed piece by piece, as those of `hashlib` are."""

    def update(self, data: bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


CHECKSUM = "xxh3_128"  # the name of the checksum of a run's own files
new_digest: Callable[[], Digest] = xxhash.xxh3_128


@dataclass(frozen=True)
class Sum:
    """The size of some bytes, and their checksum as hexadecimal text."""

    bytes: int
    digest: str

    @classmethod
    def of_file(cls, path: Path, *, first: int | None = None, new: Callable[[], Digest] = new_digest) -> Self:
        """Reads a file and returns its sum.

        Args:
            path: the file.
            first: the number of bytes to read; None reads all. A shorter file gives the sum of what it has.
            new: begins a checksum.
        """
        digest, left, size = new(), first, 0
        with path.open("rb") as file:
            while block := file.read(1 << 20 if left is None else min(1 << 20, left)):
                digest.update(block)
                size += len(block)
                left = None if left is None else left - len(block)
        return cls(size, digest.hexdigest())

    def to_json(self) -> list[Any]:
        """Returns the sum as it stands in a seal."""
        return [self.bytes, self.digest]


NOTHING = Sum(0, new_digest().hexdigest())


def sums_of(
    folder: Path, names: Sequence[str], *, to_disk: bool = False, new: Callable[[], Digest] = new_digest
) -> dict[str, Sum]:
    """Computes the sums of files, several at a time.

    Args:
        folder: the folder of the files.
        names: their paths in it.
        to_disk: bring the files to the disk too.
        new: begins a checksum.
    """

    def of(name: str) -> tuple[str, Sum]:
        if to_disk:
            with (folder / name).open("rb") as file:
                os.fsync(file.fileno())
        return name, Sum.of_file(folder / name, new=new)

    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(pool.map(of, names))


def write_model_sums(folder: Path) -> None:
    """Writes `SHA256SUMS` of all files in a model's folder, and brings them to the disk."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    sums = sums_of(folder, names, to_disk=True, new=hashlib.sha256)
    (folder / MODEL_SUMS).write_text("".join(f"{sums[name].digest}  {name}\n" for name in names), encoding="utf-8")


def check_model_sums(folder: Path, *, share: int = 0, shares: int = 1) -> None:
    """Makes sure that the weights of an exported model are as they were exported.

    Other files, such as a chat template, may have been edited. A folder without `SHA256SUMS` is not checked.

    Args:
        folder: the folder.
        share: which share of the files to read, from 0: of several processes each reads its own.
        shares: the number of shares.

    Raises:
        ModelError: a file of weights is missing or has changed, or lies elsewhere.
    """
    file = folder / MODEL_SUMS
    if not file.exists():
        return
    lines = [line.split("  ", 1) for line in file.read_text(encoding="utf-8", errors="replace").splitlines()]
    known = {line[-1]: line[0] for line in lines if line[-1].endswith(".safetensors")}
    if outside := [name for name in known if not is_inside(name)]:
        raise ModelError(
            f"{file}: lists {outside[0]!r}, which is no file of this folder. If you trust this model, remove "
            f"{MODEL_SUMS}: it is then not checked"
        )
    try:
        found = sums_of(folder, list(known)[share::shares], new=hashlib.sha256)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder}: a file that {MODEL_SUMS} lists cannot be read ({error}). Export the model again, or put a good "
            "copy back"
        ) from error
    for name, own in found.items():
        if own.digest != known[name]:
            raise ModelError(
                f"{folder / name}: is not the file that was exported: its checksum is another one than {MODEL_SUMS} "
                f"lists. Put a good copy back or export again; if you changed the file yourself, remove {MODEL_SUMS}"
            )
