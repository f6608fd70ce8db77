"""The figures of a comparison, and the bounds they are held to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from parity.cases import REFERENCE, Cell, Job
from parity.results import JAX_IN_TRANSFORMERS, PYTORCH_IN_JAX, Found, read_found, read_tensors, was_run

# --- bounds, float32

TOKEN_LOGP = 2e-5  # nats, of every token
PAIR_LOSS = 2e-5  # absolute
BATCH_LOSS = 1e-6  # relative, before the first update
GRADIENT = 1e-5  # relative L2, of every tensor
NOISE_FACTOR = 3.0  # times transformers' own float32 noise, where that is larger
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
        return self.value <= self.bound  # NaN does not

    @property
    def share(self) -> float:
        """Of the bound."""
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
        noise: the reference's layouts against one another: what transformers' own rounding amounts to.
        variants: name -> the wrong variant against the reference.
        not_tried: wrong variants that are not wrong for this model and these pairs.
    """

    cells: Sequence[Comparison]
    noise: Sequence[Comparison]
    variants: Mapping[str, Comparison]
    not_tried: Sequence[str] = ()

    @property
    def passed_variants(self) -> list[str]:
        """Wrong variants that break no bound: defects of the check."""
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
    """Compares all that a job's processes have found."""
    found = cache(lambda cell: read_found(job.found(cell)))
    noise, cells = [], []
    gradient_noise: dict[str, dict[str, float]] = {}
    weight_noise: dict[str, dict[str, float]] = {}
    for family in job.configs:
        own = [Cell(family, layout, "float32", REFERENCE) for layout in job.layouts(family)]
        start = _start(job, family)
        gradient_noise[family], weight_noise[family] = {}, {}
        for other in own[1:]:
            a, b = found(other), found(own[0])
            noise.append(Comparison(other, own[0].layout, float32_figures(a, b, start, {}, {})))
            _worst(gradient_noise[family], relative_distances(a.gradients, b.gradients))
            _worst(weight_noise[family], relative_distances(a.weights, b.weights, start))
    for cell in job.cells:
        if cell.backend == REFERENCE or cell.order:
            continue
        ours, theirs = found(cell), found(cell.on(REFERENCE))
        if cell.dtype == "float32":
            noises = gradient_noise[cell.family], weight_noise[cell.family]
            figures = float32_figures(ours, theirs, _start(job, cell.family), *noises)
            figures += crosswise_figures(job, cell, ours, theirs)
        else:
            figures = bfloat16_figures(_rounding(cell, job, found))
        cells.append(Comparison(cell, REFERENCE, figures, {"facts": dict(ours.facts)}))
    for whole in dict.fromkeys(replace(c.cell, layout=ALL_RUNS) for c in cells if c.cell.dtype == "bfloat16"):
        cells_of = [c for c in job.cells if replace(c, layout=ALL_RUNS, order=0) == whole]
        runs = {f"order {c.order}" if c.order else c.layout: _rounding(c, job, found) for c in cells_of}
        cells.append(Comparison(whole, REFERENCE, bfloat16_step_figures(runs)))
    variants = {}
    for name in (n for n in job.variants if was_run(job.variant(n))):
        base = job.variant_cell(name)
        theirs = found(base.on(REFERENCE))
        figures = first_step_figures(read_found(job.variant(name)), theirs, gradient_noise[base.family])
        variants[name] = Comparison(base, REFERENCE, figures)
    return Outcome(cells, noise, variants, [name for name in job.variants if name not in variants])


# --- float32


def first_step_figures(ours: Found, theirs: Found, noise: Mapping[str, float]) -> list[Figure]:
    """What is known before the first update, and the gradients."""
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
    ours: Found,
    theirs: Found,
    start: Mapping[str, np.ndarray],
    gradient_noise: Mapping[str, float],
    weight_noise: Mapping[str, float],
) -> list[Figure]:
    """All figures of two runs that should be the same to rounding."""
    loss, norm, margin = ((ours.curve(key), theirs.curve(key)) for key in ("loss", "grad_norm", "rewards/margins"))
    weights = relative_distances(ours.weights, theirs.weights, start)
    return [
        *first_step_figures(ours, theirs, gradient_noise),
        Figure(f"losses, {len(loss[0])} steps", _largest(loss[0] - loss[1]), STEP_LOSS),
        Figure(f"gradient norms, {len(loss[0])} steps", _largest(norm[0] / norm[1] - 1), STEP_NORM),
        Figure(f"margins, {len(loss[0])} steps", _largest(margin[0] - margin[1]), STEP_MARGIN),
        worst_tensor("final weights", weights, WEIGHT_MOVEMENT, weight_noise),
    ]


def crosswise_figures(job: Job, cell: Cell, ours: Found, theirs: Found) -> list[Figure]:
    """Exports loaded by the other side: log-probs there against those of the side that wrote them."""
    figures = []
    for file, written_by in ((JAX_IN_TRANSFORMERS, ours), (PYTORCH_IN_JAX, theirs)):
        path = job.found(cell) / file
        if path.exists() and written_by.final_logps is not None:
            name = file.removesuffix(".npy").replace("_", " ")
            figures.append(token_figure(name, np.load(path), written_by.final_logps))
    return figures


def token_figure(name: str, ours: np.ndarray, theirs: np.ndarray, *, same: bool = True) -> Figure:
    """The largest difference of a token's log-prob; infinite where there are other tokens."""
    if not same or ours.shape != theirs.shape:
        return Figure(name, math.inf, TOKEN_LOGP, "other numbers of targets")
    return Figure(name, _largest(ours - theirs), TOKEN_LOGP, f"rms {_rms(ours - theirs):.1e}, {len(ours)} tokens")


def relative_distances(
    ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], start: Mapping[str, np.ndarray] | None = None
) -> dict[str, float]:
    """Per tensor, the L2 distance over the length of `theirs`, or of its way from `start`; infinite if one lacks it."""
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
    """The tensor that comes closest to its bound, or is farthest beyond it."""
    bounds = {tensor: max(bound, NOISE_FACTOR * noise.get(tensor, 0.0)) for tensor in distances}
    worst = max(distances, key=lambda tensor: _nan_is_worst(distances[tensor] / bounds[tensor]))
    detail = f"{worst}, of {len(distances)} tensors"
    if bounds[worst] > bound:
        detail += f"; bound {NOISE_FACTOR:g} times transformers' own noise of {noise[worst]:.1e}"
    return Figure(name, distances[worst], bounds[worst], detail)


# --- bfloat16


class Rounding(NamedTuple):
    """One computation four times: in bfloat16 and in float32, by a backend and by the reference."""

    ours: Found
    ours_exact: Found
    theirs: Found
    theirs_exact: Found

    def distances(self, of: Callable[[Found], np.ndarray]) -> tuple[float, float]:
        """How far bfloat16 is from its own side's float32, root mean square: the backend, the reference."""
        return _rms(of(self.ours) - of(self.ours_exact)), _rms(of(self.theirs) - of(self.theirs_exact))


def _rounding(cell: Cell, job: Job, found: Callable[[Cell], Found]) -> Rounding:
    exact = replace(cell, dtype="float32")
    reference = exact.on(REFERENCE)
    ours_exact = found(exact if exact in job.cells else reference)  # a backend may know 16 bits only
    return Rounding(found(cell), ours_exact, found(cell.on(REFERENCE)), found(reference))


def bfloat16_figures(run: Rounding) -> list[Figure]:
    """What rounding does before the first update and to the gradients, over what it does to the reference."""
    mine = _whole(run.ours.gradients, run.ours_exact.gradients)
    reference = _whole(run.theirs.gradients, run.theirs_exact.gradients)
    return [
        _ratio("token log-prob", *run.distances(lambda f: f.logps)),
        _ratio("mean log-prob", *run.distances(lambda f: f.means)),
        _ratio("loss of a pair", *run.distances(lambda f: f.losses)),
        _ratio("gradients", mine, reference),
    ]


def bfloat16_step_figures(runs: Mapping[str, Rounding]) -> list[Figure]:
    """What rounding does to the curves, over what it does to the reference's: root mean square over `runs`.

    The rounding errors of early steps are carried along, so a curve's distance from its float32 is a single draw, and
    the ratio of two draws says little (docs/parity.md has the spread). Layouts and orders of the pairs together say how
    far a side is from float32.
    """
    steps = len(next(iter(runs.values())).ours.steps)

    def figure(name: str, key: str) -> Figure:
        each = np.array([run.distances(lambda found: found.curve(key)) for run in runs.values()])
        detail = ", ".join(f"{run} {a / b:.2f}" for run, (a, b) in zip(runs, each, strict=True))
        return _ratio(f"{name}, {steps} steps", _rms(each[:, 0]), _rms(each[:, 1]), detail)

    each = list(runs.values())
    mine = [_whole(run.ours.weights, run.ours_exact.weights) for run in each]
    reference = [_whole(run.theirs.weights, run.theirs_exact.weights) for run in each]
    return [
        figure("losses", "loss"),
        figure("margins", "rewards/margins"),
        figure("gradient norms", "grad_norm"),
        _ratio("final weights", _rms(np.array(mine)), _rms(np.array(reference))),
    ]


def _ratio(name: str, mine: float, reference: float, detail: str = "") -> Figure:
    value = mine / reference if reference else (0.0 if not mine else math.inf)
    found = f"{mine:.2e} against {reference:.2e}"
    return Figure(name, value, BFLOAT16_RATIO, f"{found}; {detail}" if detail else found)


def _whole(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> float:
    """Relative L2 distance of all tensors taken as one."""
    names = sorted(b)
    distance = math.sqrt(sum(float(np.sum((a[n].astype(np.float64) - b[n]) ** 2)) for n in names))
    return distance / math.sqrt(sum(float(np.sum(b[n].astype(np.float64) ** 2)) for n in names))


# --- helpers


def _start(job: Job, family: str) -> dict[str, np.ndarray]:
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


def _worst(so_far: dict[str, float], distances: Mapping[str, float]) -> None:
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
