"""Computes the figures of a comparison and checks them against their bounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from parity.cases import REFERENCE, Cell, Job
from parity.results import JAX_IN_TRANSFORMERS, PYTORCH_IN_JAX, CellResults, read_results, read_tensors, was_run

# --- bounds, float32

TOKEN_LOGP = 2e-5  # nats, for every token
PAIR_LOSS = 2e-5  # absolute
BATCH_LOSS = 1e-6  # relative, before the first update
GRADIENT = 1e-5  # relative L2, for every tensor
NOISE_FACTOR = 3.0  # a tensor's bound is this times transformers' own float32 noise, where that is larger
STEP_LOSS = 1e-4  # over the steps
STEP_NORM = 1e-4  # relative, over the steps
STEP_MARGIN = 1e-4  # over the steps; margins are beta times log-probs
WEIGHT_MOVEMENT = 1e-4  # distance of the final weights, over how far they moved from the start

# --- bound, bfloat16: how far JAX may be from float32, over how far PyTorch is

BFLOAT16_RATIO = 1.5
ALL_RUNS = "all layouts and orders"


@dataclass(frozen=True)
class Figure:
    """One measured number and its bound."""

    name: str
    value: float
    bound: float
    detail: str = ""

    @property
    def holds(self) -> bool:
        return self.value <= self.bound  # false for NaN

    @property
    def share(self) -> float:
        """The value as a share of the bound."""
        return self.value / self.bound if math.isfinite(self.value) else math.inf


@dataclass(frozen=True)
class Comparison:
    """Two runs, or a run and a wrong variant of it."""

    cell: Cell
    against: str
    figures: Sequence[Figure]
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        return all(figure.holds for figure in self.figures)

    @property
    def broken(self) -> list[Figure]:
        return [figure for figure in self.figures if not figure.holds]

    def as_json(self) -> dict[str, Any]:
        figures = [{**asdict(f), "holds": f.holds, "value": _number(f.value)} for f in self.figures]
        return {**asdict(self.cell), "against": self.against, "holds": self.holds, "figures": figures, **self.notes}


@dataclass(frozen=True)
class Outcome:
    """All comparisons of a job.

    Attributes:
        cells: every cell against the reference.
        noise: the reference's layouts against one another, which shows transformers' own rounding.
        variants: name -> the wrong variant against the reference.
        not_tried: wrong variants that make no difference to this model and these pairs.
    """

    cells: Sequence[Comparison]
    noise: Sequence[Comparison]
    variants: Mapping[str, Comparison]
    not_tried: Sequence[str] = ()

    @property
    def passed_variants(self) -> list[str]:
        """Names of the wrong variants that break no bound, which are defects of the check."""
        return [name for name, comparison in self.variants.items() if comparison.holds]

    @property
    def holds(self) -> bool:
        return all(comparison.holds for comparison in self.cells) and not self.passed_variants

    def as_json(self) -> dict[str, Any]:
        return {
            "holds": self.holds,
            "cells": [comparison.as_json() for comparison in self.cells],
            "noise of the reference": [comparison.as_json() for comparison in self.noise],
            "wrong variants": {n: {**c.as_json(), "caught": not c.holds} for n, c in self.variants.items()},
            "wrong variants not tried": list(self.not_tried),
        }


def compare(job: Job) -> Outcome:
    """Compares the results of all cells and wrong variants of a job."""
    results_of = cache(lambda cell: read_results(job.results_folder(cell)))
    noise, cells = [], []
    gradient_noise: dict[str, dict[str, float]] = {}
    weight_noise: dict[str, dict[str, float]] = {}
    for family in job.configs:
        references = [Cell(family, layout, "float32", REFERENCE) for layout in job.layouts(family)]
        start = _start(job, family)
        gradient_noise[family], weight_noise[family] = {}, {}
        for other in references[1:]:
            a, b = results_of(other), results_of(references[0])
            noise.append(Comparison(other, references[0].layout, float32_figures(a, b, start, {}, {})))
            _keep_largest(gradient_noise[family], relative_distances(a.gradients, b.gradients))
            _keep_largest(weight_noise[family], relative_distances(a.weights, b.weights, start))
    for cell in job.cells:
        if cell.backend == REFERENCE or cell.order:
            continue
        ours, theirs = results_of(cell), results_of(cell.reference)
        if cell.dtype == "float32":
            noises = gradient_noise[cell.family], weight_noise[cell.family]
            figures = float32_figures(ours, theirs, _start(job, cell.family), *noises)
            figures += crosswise_figures(job, cell, ours, theirs)
        else:
            figures = bfloat16_figures(_rounding(cell, job, results_of))
        cells.append(Comparison(cell, REFERENCE, figures, {"facts": dict(ours.facts)}))
    for all_runs in dict.fromkeys(replace(c.cell, layout=ALL_RUNS) for c in cells if c.cell.dtype == "bfloat16"):
        cells_of = [c for c in job.cells if replace(c, layout=ALL_RUNS, order=0) == all_runs]
        runs = {f"order {c.order}" if c.order else c.layout: _rounding(c, job, results_of) for c in cells_of}
        cells.append(Comparison(all_runs, REFERENCE, bfloat16_step_figures(runs)))
    variants = {}
    for name in (n for n in job.variants if was_run(job.variant_folder(n))):
        base = job.variant_cell(name)
        theirs = results_of(base.on(REFERENCE))
        figures = first_step_figures(read_results(job.variant_folder(name)), theirs, gradient_noise[base.family])
        variants[name] = Comparison(base, REFERENCE, figures)
    return Outcome(cells, noise, variants, [name for name in job.variants if name not in variants])


# --- float32


def first_step_figures(ours: CellResults, theirs: CellResults, noise: Mapping[str, float]) -> list[Figure]:
    """Computes the figures of the first step: log-probs and losses before the update, and the gradients."""
    return [
        token_figure("token log-prob", ours.logps, theirs.logps, same=np.array_equal(ours.lengths, theirs.lengths)),
        Figure("mean log-prob", _largest(ours.means - theirs.means), TOKEN_LOGP),
        Figure("loss of a pair", _largest(ours.losses - theirs.losses), PAIR_LOSS),
        Figure("loss of the batch", _relative(ours.steps[0]["loss"], theirs.steps[0]["loss"]), BATCH_LOSS),
        *(
            Figure(key, abs(ours.steps[0][key] - theirs.steps[0][key]), TOKEN_LOGP)
            for key in ("rewards/chosen", "rewards/rejected", "rewards/margins")
        ),
        worst_tensor("gradients", relative_distances(ours.gradients, theirs.gradients), GRADIENT, noise),
    ]


def float32_figures(
    ours: CellResults,
    theirs: CellResults,
    start: Mapping[str, np.ndarray],
    gradient_noise: Mapping[str, float],
    weight_noise: Mapping[str, float],
) -> list[Figure]:
    """Computes all figures of two runs that should be the same to rounding."""
    loss, norm, margin = ((ours.curve(key), theirs.curve(key)) for key in ("loss", "grad_norm", "rewards/margins"))
    weights = relative_distances(ours.weights, theirs.weights, start)
    return [
        *first_step_figures(ours, theirs, gradient_noise),
        Figure(f"losses, {len(loss[0])} steps", _largest(loss[0] - loss[1]), STEP_LOSS),
        Figure(f"gradient norms, {len(loss[0])} steps", _largest(norm[0] / norm[1] - 1), STEP_NORM),
        Figure(f"margins, {len(loss[0])} steps", _largest(margin[0] - margin[1]), STEP_MARGIN),
        worst_tensor("final weights", weights, WEIGHT_MOVEMENT, weight_noise),
    ]


def crosswise_figures(job: Job, cell: Cell, ours: CellResults, theirs: CellResults) -> list[Figure]:
    """Compares the log-probs of exports loaded by the other side with those of the side that wrote them."""
    figures = []
    for file, written_by in ((JAX_IN_TRANSFORMERS, ours), (PYTORCH_IN_JAX, theirs)):
        path = job.results_folder(cell) / file
        if path.exists() and written_by.final_logps is not None:
            name = file.removesuffix(".npy").replace("_", " ")
            figures.append(token_figure(name, np.load(path), written_by.final_logps))
    return figures


def token_figure(name: str, ours: np.ndarray, theirs: np.ndarray, *, same: bool = True) -> Figure:
    """Returns the largest difference of a token's log-prob; infinite where the numbers of tokens differ."""
    if not same or ours.shape != theirs.shape:
        return Figure(name, math.inf, TOKEN_LOGP, "other numbers of targets")
    return Figure(name, _largest(ours - theirs), TOKEN_LOGP, f"rms {_rms(ours - theirs):.1e}, {len(ours)} tokens")


def relative_distances(
    ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], start: Mapping[str, np.ndarray] | None = None
) -> dict[str, float]:
    """Returns the relative L2 distance of each tensor; infinite if one side lacks the tensor.

    Args:
        ours: tensors by name.
        theirs: the tensors of the reference. A distance is divided by the L2 norm of their tensor.
        start: if given, a distance is divided by the norm of the reference's movement from these tensors.
    """
    distances = {}
    for name in sorted({*ours, *theirs}):
        if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape:
            distances[name] = math.inf
            continue
        a, b = ours[name].astype(np.float64), theirs[name].astype(np.float64)
        length = np.linalg.norm(b if start is None else b - start[name].astype(np.float64))
        distance = float(np.linalg.norm(a - b))
        distances[name] = distance / float(length) if distance else 0.0
    return distances


def worst_tensor(name: str, distances: Mapping[str, float], bound: float, noise: Mapping[str, float]) -> Figure:
    """Returns the figure of the tensor whose distance is the largest share of its bound."""
    bounds = {tensor: max(bound, NOISE_FACTOR * noise.get(tensor, 0.0)) for tensor in distances}
    worst = max(distances, key=lambda tensor: _nan_is_worst(distances[tensor] / bounds[tensor]))
    detail = f"{worst}, of {len(distances)} tensors"
    if bounds[worst] > bound:
        detail += f"; bound {NOISE_FACTOR:g} times transformers' own noise of {noise[worst]:.1e}"
    return Figure(name, distances[worst], bounds[worst], detail)


# --- bfloat16


class Rounding(NamedTuple):
    """Results of one computation in bfloat16 and in float32, by a backend and by the reference."""

    ours: CellResults
    ours_exact: CellResults
    theirs: CellResults
    theirs_exact: CellResults

    def distances(self, of: Callable[[CellResults], np.ndarray]) -> tuple[float, float]:
        """Returns the root mean square between bfloat16 and float32 of the backend, and that of the reference."""
        return _rms(of(self.ours) - of(self.ours_exact)), _rms(of(self.theirs) - of(self.theirs_exact))


def _rounding(cell: Cell, job: Job, results_of: Callable[[Cell], CellResults]) -> Rounding:
    exact = replace(cell, dtype="float32")
    reference = exact.on(REFERENCE)
    ours_exact = results_of(exact if exact in job.cells else reference)  # some backends compute in 16 bits only
    return Rounding(results_of(cell), ours_exact, results_of(cell.on(REFERENCE)), results_of(reference))


def bfloat16_figures(run: Rounding) -> list[Figure]:
    """Compares rounding errors of the first step and its gradients with those of the reference."""
    ours = _joint_distance(run.ours.gradients, run.ours_exact.gradients)
    reference = _joint_distance(run.theirs.gradients, run.theirs_exact.gradients)
    return [
        _ratio("token log-prob", *run.distances(lambda f: f.logps)),
        _ratio("mean log-prob", *run.distances(lambda f: f.means)),
        _ratio("loss of a pair", *run.distances(lambda f: f.losses)),
        _ratio("gradients", ours, reference),
    ]


def bfloat16_step_figures(runs: Mapping[str, Rounding]) -> list[Figure]:
    """Compares rounding errors of the curves with those of the reference, as root mean squares over `runs`.

    Later steps carry the rounding errors of early ones along, so the distance of one curve from its float32 curve is a
    single draw, and the ratio of two draws says little (docs/parity.md has the spread). All layouts and orders of the
    pairs together show how far a side is from float32.
    """
    steps = len(next(iter(runs.values())).ours.steps)

    def figure(name: str, key: str) -> Figure:
        distances = np.array([run.distances(lambda results: results.curve(key)) for run in runs.values()])
        detail = ", ".join(f"{run} {a / b:.2f}" for run, (a, b) in zip(runs, distances, strict=True))
        return _ratio(f"{name}, {steps} steps", _rms(distances[:, 0]), _rms(distances[:, 1]), detail)

    ours = [_joint_distance(run.ours.weights, run.ours_exact.weights) for run in runs.values()]
    reference = [_joint_distance(run.theirs.weights, run.theirs_exact.weights) for run in runs.values()]
    return [
        figure("losses", "loss"),
        figure("margins", "rewards/margins"),
        figure("gradient norms", "grad_norm"),
        _ratio("final weights", _rms(np.array(ours)), _rms(np.array(reference))),
    ]


def _ratio(name: str, ours: float, reference: float, detail: str = "") -> Figure:
    value = ours / reference if reference else (0.0 if not ours else math.inf)
    both = f"{ours:.2e} against {reference:.2e}"
    return Figure(name, value, BFLOAT16_RATIO, f"{both}; {detail}" if detail else both)


def _joint_distance(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> float:
    """Returns the relative L2 distance of all tensors taken as one."""
    names = sorted(b)
    distance = math.sqrt(sum(float(np.sum((a[n].astype(np.float64) - b[n]) ** 2)) for n in names))
    return distance / math.sqrt(sum(float(np.sum(b[n].astype(np.float64) ** 2)) for n in names))


# --- helpers


def _start(job: Job, family: str) -> dict[str, np.ndarray]:
    """Reads the trained weights that a family starts from."""
    if family in job.adapters:
        return _read_start(job.adapters[family], None)
    cell = next(c for c in job.cells if c.family == family)
    config = job.config(cell)
    assert config.model_name_or_path is not None
    return _read_start(config.model_name_or_path, config.model_revision)


@cache
def _read_start(name: str, revision: str | None) -> dict[str, np.ndarray]:
    if Path(name).is_dir():
        return read_tensors(Path(name))
    from huggingface_hub import snapshot_download

    return read_tensors(Path(snapshot_download(name, revision=revision, local_files_only=True)))


def _keep_largest(so_far: dict[str, float], distances: Mapping[str, float]) -> None:
    for name, distance in distances.items():
        so_far[name] = max(so_far.get(name, 0.0), distance)


def _largest(difference: np.ndarray) -> float:
    return float(np.abs(difference).max())


def _rms(difference: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(difference))))


def _relative(a: float, b: float) -> float:
    return abs(a - b) / abs(b)


def _nan_is_worst(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)  # JSON knows no infinity
