"""`run.json`: the facts of a run that only the running program knows."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from jax_simpo.run import files
from jax_simpo.run.manifest import write_file

PACKAGES = ("jax-simpo", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers", "numpy")


def read_facts(output: Path) -> dict[str, Any]:
    """Returns the facts of an output directory; an empty mapping where there are none."""
    path = output / files.FACTS
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def write_facts(
    output: Path,
    *,
    mesh: Mapping[str, int],
    device: str,
    parameters: int,
    training_pairs: int,
    noun: str,
    total_steps: int,
    tokens_saved: float,
    remarks: Sequence[str] = (),
) -> None:
    """Writes the facts that a later report shows.

    Args:
        output: the output directory.
        mesh: devices per axis (`mesh.shape`).
        device: kind of device (`jax.devices()[0].device_kind`).
        parameters: numbers that are trained.
        training_pairs: pairs, or groups, of an epoch.
        noun: what they are called: "pairs" or "groups".
        total_steps: steps the run is to take.
        tokens_saved: share of the tokens that prefix sharing saves, 0 without it.
        remarks: sentences on the training pairs: what was cut, and how they were rendered.
    """
    _write(
        output,
        {
            "device": device,
            "mesh": dict(mesh),
            "parameters": parameters,
            "training_pairs": training_pairs,
            "noun": noun,
            "total_steps": total_steps,
            "tokens_saved": tokens_saved,
            "remarks": list(remarks),
            "versions": versions(),
        },
    )


def note_export(output: Path, step: int, *, model_step: int | None = None, ended_early: bool = False) -> None:
    """Notes that a run has exported its model.

    Args:
        output: the output directory.
        step: optimizer steps done.
        model_step: the step whose model it is, if that is another one (`load_best_model_at_end`).
        ended_early: early stopping has ended the run.
    """
    notes: dict[str, Any] = {"exported_step": step, "ended_early": ended_early}
    _write(output, {**read_facts(output), **notes, "model_step": step if model_step is None else model_step})


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that numbers depend on, those installed."""
    numbers = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            numbers[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # run from a source tree
            continue
    return numbers


def _write(output: Path, facts: Mapping[str, Any]) -> None:
    write_file(output, files.FACTS, json.dumps(facts, indent=2) + "\n")
