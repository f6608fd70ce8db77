"""The manifest of an output directory, `.jax-simpo.json`: the names of what a run wrote there.

A run replaces and removes these only. A name enters the manifest before its file is first written, so a killed run
leaves no file of its own that the manifest lacks. Of the small files that a run reads again it holds checksums too.
Older output directories have no manifest: there a file belongs to the run if its contents show it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from jax_simpo.config import yaml_files
from jax_simpo.errors import CheckpointError, ConfigError, ModelError
from jax_simpo.run import files
from jax_simpo.run.steps import is_beside_steps
from jax_simpo.run.whole import check_replaceable, write_text, writing

CARD_SENTENCE = ", using jax-simpo."  # ends the first sentence of a model card
REPORT_SENTENCE = " training run</p>"  # ends the line above the title of a report
_RESOLVED_KEYS = 40  # a config that a run wrote gives every key there is; nobody writes so many by hand

_READ_AGAIN = (files.CONFIG, files.FACTS, files.SAMPLES)

# A step folder of either trainer bears one of these.
_STEP_MARKS = ("_CHECKPOINT_METADATA", files.STEP_RUN, "*.pt")


def read_manifest(output: Path) -> set[str]:
    """Returns the names of what a run wrote to an output directory.

    Raises:
        CheckpointError: the manifest is damaged, or a file of the user's.
    """
    return _read(output)[0] if (output / files.MANIFEST).exists() else _recognise(output)


def _read(output: Path) -> tuple[set[str], dict[str, list[str]]]:
    """Returns the names, and of some of them the checksums of their former and their new content."""
    path = output / files.MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {name for name in files.ALL if name in content["files"]}, dict(content.get("sha256", {}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: is not the list of files of a run ({error!r}). Give another `output_dir`, or remove the file if "
            "nothing else in the folder is needed"
        ) from error


def write_manifest(output: Path, names: Collection[str], sums: Mapping[str, list[str]] | None = None) -> None:
    """Writes the names of what a run wrote, and checksums of some of them."""
    note = "The files that jax-simpo wrote here. It replaces and removes no others."
    own = {name: found for name, found in (sums or {}).items() if name in names}
    content = {"note": note, "files": sorted(names), "sha256": own}
    write_text(output / files.MANIFEST, json.dumps(content, indent=2) + "\n")


def check_unchanged(output: Path, names: Collection[str]) -> None:
    """Makes sure that small files of a run are those that it wrote.

    Args:
        output: the output directory.
        names: the files that are to be read.

    Raises:
        CheckpointError: a file has changed since.
    """
    sums = _read(output)[1] if (output / files.MANIFEST).exists() else {}
    for name, known in sums.items():
        path = output / name
        if name in names and path.is_file() and sha256(path.read_bytes()).hexdigest() not in known:
            raise CheckpointError(
                f"{path} has changed since the run wrote it. Put a good copy back, or remove the file"
            )


def check_free(output: Path, names: Collection[str]) -> None:
    """Makes sure that a run may write files of these names: each is missing, empty, or written by a run.

    Raises:
        CheckpointError: there is a file that no run wrote.
    """
    own = read_manifest(output)
    foreign = [f"`{name}`" for name in names if name not in own and _is_in_the_way(output / name)]
    if foreign:
        raise CheckpointError(
            f"`output_dir` {output} holds {', '.join(foreign)}, which no run of jax-simpo wrote and this one would "
            "replace. Give another `output_dir`, such as a new folder, or move what is there away"
        )


def claim(output: Path, *names: str) -> None:
    """Enters names into the manifest. A run calls it before it writes their files.

    Raises:
        CheckpointError: there is a file of such a name that no run wrote.
    """
    check_free(output, names)
    if not (output / files.MANIFEST).exists():
        write_manifest(output, _recognise(output).union(names))
        return
    own, sums = _read(output)
    if not own.issuperset(names):
        write_manifest(output, own.union(names), sums)


def write_file(output: Path, name: str, content: str | bytes) -> Path:
    """Writes a file of a run whole, once it is in the manifest, and returns its path.

    Raises:
        CheckpointError: there is such a file, and no run wrote it.
    """
    claim(output, name)
    data = content if isinstance(content, bytes) else content.encode()
    own, sums = _read(output)
    new = sha256(data).hexdigest()
    if name in _READ_AGAIN:  # whichever content a kill leaves is known
        former = [sha256((output / name).read_bytes()).hexdigest()] if (output / name).is_file() else []
        write_manifest(output, own, {**sums, name: [*former, new]})
    with writing(output / name, "wb") as file:
        file.write(data)
    if name in _READ_AGAIN:
        write_manifest(output, own, {**sums, name: [new]})
    return output / name


def _is_in_the_way(path: Path) -> bool:
    if path.is_symlink():
        return True
    if path.is_dir():
        return any(path.iterdir())
    return path.exists() and path.stat().st_size > 0


# --- output directories without a manifest


def _recognise(output: Path) -> set[str]:
    """The names whose contents show that a run wrote them.

    Everything that a user may have too (a config, a README, a folder `model`) counts only beside the metrics or the
    facts of a run.
    """
    own = {name for name, is_own in _BY_THEMSELVES.items() if _holds(output / name, is_own)}
    if own & {files.METRICS, files.FACTS}:
        own |= {name for name, is_own in _BESIDE_A_RUN.items() if _holds(output / name, is_own)}
    if files.REPORT in own and (output / files.CURVES).is_file():  # written together
        own.add(files.CURVES)
    return own


def _holds(path: Path, is_own: Callable[[Path], bool]) -> bool:
    try:
        return path.exists() and is_own(path)
    except (OSError, ValueError, TypeError, KeyError, IndexError, ConfigError, ModelError):
        return False


def _first_line(path: Path) -> dict[str, Any]:
    with path.open(encoding="utf-8") as file:
        return dict(json.loads(file.readline()))


def _is_metrics(path: Path) -> bool:
    return bool({"rewards/margins", "eval_rewards/margins"} & _first_line(path).keys())


def _is_facts(path: Path) -> bool:
    return {"versions", "total_steps"} <= json.loads(path.read_text(encoding="utf-8")).keys()


def _is_checkpoints(path: Path) -> bool:
    entries = [entry for entry in path.iterdir() if not is_beside_steps(entry.name)]
    return bool(entries) and all(
        entry.name.isdecimal() and any(any(entry.glob(mark)) for mark in _STEP_MARKS) for entry in entries
    )


def _is_samples(path: Path) -> bool:
    return {"prompt", "chosen", "rejected", "before", "after"} <= _first_line(path).keys()


def _is_config(path: Path) -> bool:
    return len(yaml_files.read_file(path)[0]) >= _RESOLVED_KEYS


def _is_model(path: Path) -> bool:
    check_replaceable(path)
    return path.is_dir()


_BY_THEMSELVES = {files.METRICS: _is_metrics, files.FACTS: _is_facts, files.CHECKPOINTS: _is_checkpoints}
_BESIDE_A_RUN = {
    files.CONFIG: _is_config,
    files.SAMPLES: _is_samples,
    files.MODEL: _is_model,
    files.REPORT: lambda path: REPORT_SENTENCE in path.read_text(encoding="utf-8"),
    files.CARD: lambda path: CARD_SENTENCE in path.read_text(encoding="utf-8"),
}
