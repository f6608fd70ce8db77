"""What a run of one cell found, in files that either side writes and the comparison reads."""

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

from jax_simpo.data.pairs import PairLengths

GRADIENTS, EXPORT = "gradients", "model"  # folders of safetensors files
# Log-probs of an export under the other side, in the order of `Found.final_logps`.
PYTORCH_IN_JAX, JAX_IN_TRANSFORMERS = "PyTorch_export_in_JAX.npy", "JAX_export_in_transformers.npy"


class TokenTable:
    """The log-probs of all targets of a step, response after response: chosen and rejected of the first pair, ..."""

    def __init__(self, lengths: PairLengths) -> None:
        """Takes the lengths of the step's pairs."""
        self.lengths = np.stack([lengths.chosen_targets, lengths.rejected_targets], axis=1).astype(np.int64)
        self._start = np.concatenate([[0], np.cumsum(self.lengths.ravel())])
        self.logps = np.zeros(self._start[-1])

    def put(self, pair: int, rank: int, logps: Float[np.ndarray, " T"]) -> None:
        """Sets the log-probs of a response's tokens."""
        at = self._start[2 * pair + rank]
        self.logps[at : at + len(logps)] = logps


@dataclass(frozen=True)
class Found:
    """The results of one cell.

    Attributes:
        folder: where they lie.
        logps: log-prob of every target of the first step's pairs, before the first update.
        lengths: targets of each response.
        losses: the loss of each of these pairs.
        final_logps: as `logps`, after the last step; None where there were no steps.
        steps: the metrics of each step.
        facts: what computed it.
    """

    folder: Path
    logps: Float[np.ndarray, " N"]
    lengths: Int[np.ndarray, "P 2"]
    losses: Float[np.ndarray, " P"]
    final_logps: Float[np.ndarray, " N"] | None
    steps: Sequence[Mapping[str, float]]
    facts: Mapping[str, Any]

    @property
    def means(self) -> Float[np.ndarray, "P 2"]:
        """Mean log-prob of each response."""
        ends = np.cumsum(self.lengths.ravel())
        sums = np.add.reduceat(self.logps, np.concatenate([[0], ends[:-1]]))
        return sums.reshape(self.lengths.shape) / self.lengths

    def curve(self, key: str) -> Float[np.ndarray, " S"]:
        """A metric over the steps."""
        return np.array([record[key] for record in self.steps], np.float64)

    @cached_property
    def gradients(self) -> dict[str, np.ndarray]:
        """The first step's gradients under their Hugging Face names."""
        return read_tensors(self.folder / GRADIENTS)

    @cached_property
    def weights(self) -> dict[str, np.ndarray]:
        """The weights after the last step."""
        return read_tensors(self.folder / EXPORT)


def save_found(
    folder: Path,
    *,
    table: TokenTable,
    losses: np.ndarray,
    steps: Sequence[Mapping[str, float]],
    final: TokenTable | None = None,
    facts: Mapping[str, Any],
) -> None:
    """Writes what a cell found, next to the gradients and the export it wrote itself."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {"logps": table.logps, "lengths": table.lengths, "losses": np.asarray(losses, np.float64)}
    if final is not None:
        arrays["final_logps"] = final.logps
    np.savez(folder / "found.npz", **arrays)  # type: ignore[arg-type]
    text = json.dumps({"steps": list(steps), "facts": dict(facts)}, indent=1)
    (folder / "found.json").write_text(text, encoding="utf-8")


def read_found(folder: Path) -> Found:
    """Reads what a cell found."""
    with np.load(folder / "found.npz") as arrays:
        values = dict(arrays)
    text = json.loads((folder / "found.json").read_text(encoding="utf-8"))
    return Found(folder, values["logps"], values["lengths"], values["losses"], values.get("final_logps"), **text)


def was_run(folder: Path) -> bool:
    """Whether there are results."""
    return (folder / "found.npz").exists()


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of the safetensors files of a folder, by name."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
