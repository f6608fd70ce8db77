"""The seal of a checkpoint: `seal.json`, written last, with the size and the checksum of every other file of its step.

A step without a seal was not finished. With one, a file that was cut, changed, removed, added, or brought from another
step is found before anything is read from it. Both trainers seal their steps.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from jax_simpo.errors import CheckpointError
from jax_simpo.run import files
from jax_simpo.run.listed import is_inside
from jax_simpo.run.sums import CHECKSUM, Sum, sums_of
from jax_simpo.run.whole import write_text

_NOTE = "Sizes and checksums of the files of this step. A step without this file was not finished."


@dataclass(frozen=True)
class Seal:
    """Holds the sums of a step's files and of the records so far, as they were when the step was saved.

    Attributes:
        step: optimizer steps done.
        metrics: the sum of `metrics.jsonl` when the step was saved; later records follow these bytes.
        sums: the sums of the step's files, by their paths in the step's folder.
    """

    step: int
    metrics: Sum
    sums: Mapping[str, Sum]

    def write(self, folder: Path) -> None:
        """Writes the seal into a step's folder."""
        content: dict[str, Any] = {
            "note": _NOTE,
            "step": self.step,
            "checksum": CHECKSUM,
            files.METRICS: self.metrics.to_json(),
            "files": {name: self.sums[name].to_json() for name in sorted(self.sums)},
        }
        write_text(folder / files.SEAL, json.dumps({**content, "sha256": _own_sum(content)}, indent=1))

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Reads the seal of a step's folder.

        Raises:
            ValueError: it is missing or damaged; the text begins with the file's name.
        """
        try:
            content = dict(json.loads((folder / files.SEAL).read_text(encoding="utf-8")))
            if content.pop("sha256") != _own_sum(content):
                raise ValueError("its own checksum does not fit")
            if content.get("checksum") != CHECKSUM:
                raise ValueError("another version of the program wrote it, with other checksums")
            sums = {name: Sum(*values) for name, values in content["files"].items()}
            if outside := [name for name in sums if not is_inside(name)]:
                raise ValueError(f"it lists {outside[0]!r}, which is no file of this step")
            return cls(content["step"], Sum(*content[files.METRICS]), sums)
        except FileNotFoundError:
            raise ValueError(
                f"{files.SEAL} is missing: the step was not finished, or an earlier version of the program wrote it"
            ) from None
        except (IsADirectoryError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{files.SEAL} is damaged ({error})") from error


def _own_sum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_names(folder: Path) -> list[str]:
    """Lists the files of a step's folder but its seal, by their paths in it. Hidden files are not the run's."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    names = (path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts))
    return sorted(name for name in names if name != files.SEAL)


def find_damage(folder: Path, step: int, *, share: int = 0, shares: int = 1) -> str | None:
    """Returns what is wrong with a step's folder in a line that begins with the file's name; None if it is as sealed.

    Args:
        folder: the folder.
        step: the number of the step that it must hold.
        share: which share of the files to read, from 0: of several processes each reads its own.
        shares: the number of shares.

    Raises:
        CheckpointError: a file is there and cannot be read, which need not be damage.
    """
    try:
        seal = Seal.read(folder)
        if seal.step != step:
            return f"{files.SEAL} is that of step {seal.step}"
        if share == 0:
            names = file_names(folder)
            if missing := sorted(seal.sums.keys() - set(names)):
                return f"{missing[0]} is missing"
            if added := sorted(set(names) - seal.sums.keys()):
                return f"{added[0]} is no file of this step"
        return _first_difference(seal, sums_of(folder, sorted(seal.sums)[share::shares]).items())
    except ValueError as error:
        return str(error)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        return f"{error.filename} is missing"
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or folder} cannot be read: {error.strerror}. Mend that and start the same command again"
        ) from error


def _first_difference(seal: Seal, sums: Iterable[tuple[str, Sum]]) -> str | None:
    for name, found in sums:
        sealed = seal.sums[name]
        if found.bytes != sealed.bytes:
            return f"{name} has {found.bytes:,} bytes; it was saved with {sealed.bytes:,}"
        if found != sealed:
            return f"{name} has changed since it was saved: its checksum does not fit"
    return None
