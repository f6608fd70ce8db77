"""Names of files that another file lists: an index of weights, checksums, a seal. None may lead out of its folder.

The name itself is looked at, not where it leads: in the cache of the hub every file of a model is a link to elsewhere.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from jax_simpo.errors import ModelError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def is_inside(name: Any) -> bool:
    """Returns True for the name of a file in a folder, or in a folder therein, on every system."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    return all(not path.anchor and ".." not in path.parts for path in (PurePosixPath(name), PureWindowsPath(name)))


def weight_files(folder: Path) -> list[str]:
    """Returns the names of a model's safetensors files: the single one, or those of its index; empty without either.

    Raises:
        ModelError: the index cannot be read, or names something else than files of the folder.
    """
    if (folder / SINGLE).is_file():
        return [SINGLE]
    if not (folder / INDEX).is_file():
        return []
    try:
        names = list(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{folder / INDEX}: not an index of safetensors files ({error!r})") from error
    if not names:
        raise ModelError(f"{folder / INDEX}: names no file in `weight_map`; download the model again")
    for name in names:
        if not is_inside(name) or "/" in name or "\\" in name:
            raise ModelError(
                f"{folder / INDEX}: `weight_map` names {name!r}, which is no file of this folder. Do not use this "
                "model; download it again from a source that you trust"
            )
    return sorted(set(names))
