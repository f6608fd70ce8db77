"""The results of one cell, in files that each side writes and the comparison reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from safetensors.numpy import load_file

from jax_simpo.data.groups import GroupLengths

GRADIENTS, EXPORT = "gradients", "model"  # folders of safetensors files
# Log-probs of an export loaded by the other side, in the order of `CellResults.final_logps`.
PYTORCH_IN_JAX, JAX_IN_TRANSFORMERS = "PyTorch_export_in_JAX.npy", "JAX_export_in_transformers.npy"


class TokenTable:
    """The log-probs of all targets of a step: group after group, and of each the responses from the best on."""

    def __init__(self, lengths: GroupLengths) -> None:
        """Takes the lengths of the step's groups."""
        self.lengths = lengths.targets.astype(np.int64)
        self._first = lengths.starts
        self._start = np.cumsum(self.lengths) - self.lengths
        self.logps = np.zeros(self.lengths.sum())

    def put(self, group: int, place: int, logps: Float[np.ndarray, " T"]) -> None:
        """Sets the log-probs of a response's tokens."""
        start = self._start[self._first[group] + place]
        self.logps[start : start + len(logps)] = logps

    @property
    def sums(self) -> Float[np.ndarray, " R"]:
        """The sum of the log-probs of each response."""
        return np.add.reduceat(self.logps, self._start)


@dataclass(frozen=True)
class CellResults:
    """The results of one cell.

    Attributes:
        folder: the folder of the results.
        logps: log-prob of every target of the first step's groups, before the first update.
        lengths: number of targets of each response.
        losses: the loss of each of these groups.
        final_logps: as `logps`, after the last step; None where no step was made.
        steps: the metrics of each step.
        facts: the attention implementation and the versions that computed them.
    """

    folder: Path
    logps: Float[np.ndarray, " N"]
    lengths: Int[np.ndarray, " R"]
    losses: Float[np.ndarray, " G"]
    final_logps: Float[np.ndarray, " N"] | None
    steps: Sequence[Mapping[str, float]]
    facts: Mapping[str, Any]

    @property
    def means(self) -> Float[np.ndarray, " R"]:
        """Mean log-prob of each response."""
        return np.add.reduceat(self.logps, np.cumsum(self.lengths) - self.lengths) / self.lengths

    def curve(self, key: str) -> Float[np.ndarray, " S"]:
        """Returns a metric over the steps."""
        return np.array([record[key] for record in self.steps], np.float64)

    @cached_property
    def gradients(self) -> dict[str, np.ndarray]:
        """The first step's gradients under their Hugging Face names."""
        return read_tensors(self.folder / GRADIENTS)

    @cached_property
    def weights(self) -> dict[str, np.ndarray]:
        """The weights after the last step."""
        return read_tensors(self.folder / EXPORT)


def save_results(
    folder: Path,
    *,
    table: TokenTable,
    losses: np.ndarray,
    steps: Sequence[Mapping[str, float]],
    final: TokenTable | None = None,
    facts: Mapping[str, Any],
) -> None:
    """Writes a cell's results next to its gradients and its export, which the side writes itself."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {"logps": table.logps, "lengths": table.lengths, "losses": np.asarray(losses, np.float64)}
    if final is not None:
        arrays["final_logps"] = final.logps
    np.savez(folder / "results.npz", **arrays)  # type: ignore[arg-type]
    text = json.dumps({"steps": list(steps), "facts": dict(facts)}, indent=1)
    (folder / "results.json").write_text(text, encoding="utf-8")


def read_results(folder: Path) -> CellResults:
    """Reads a cell's results."""
    with np.load(folder / "results.npz") as arrays:
        values = dict(arrays)
    text = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return CellResults(folder, values["logps"], values["lengths"], values["losses"], values.get("final_logps"), **text)


def was_run(folder: Path) -> bool:
    """Returns True if the folder has results."""
    return (folder / "results.npz").exists()


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Reads all tensors of a folder's safetensors files, by name."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
