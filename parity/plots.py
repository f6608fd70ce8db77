"""Draws the pictures of a report, as PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure as Picture
from matplotlib.ticker import MaxNLocator

from parity.cases import GPU_BACKENDS, MESHES, REFERENCE, TORCH, ZERO3
from parity.compare import Comparison
from parity.results import CellResults

PYTORCH_COLOR, JAX_COLOR = "#d9480f", "#2f6fde"
TEXT, FAINT = "#1f2430", "#c9cdd6"
COLORS = {
    TORCH: PYTORCH_COLOR,
    ZERO3: "#f59f00",
    **dict(zip(MESHES, (JAX_COLOR, "#12b886", "#7048e8"), strict=True)),
    **dict(zip(GPU_BACKENDS, ("#1098ad", "#c2255c", "#868e96"), strict=True)),
}
# Shares of the bound at which the color changes, and the colors from far below the bound to beyond it.
_STEPS = (0.01, 0.03, 0.1, 0.3, 1.0)
_SHADES = ListedColormap(["#e7f5ec", "#c8ead3", "#a0d9b4", "#f3e3a2", "#f4c27a", "#e8590c"])


def draw_matrix(comparisons: Sequence[Comparison]) -> bytes:
    """Draws every figure of every cell as a share of its bound."""
    names = list(dict.fromkeys(figure.name for c in comparisons for figure in c.figures))
    shares = np.full((len(comparisons), len(names)), np.nan)
    for row, comparison in enumerate(comparisons):
        for figure in comparison.figures:
            shares[row, names.index(figure.name)] = min(figure.share, 1e9)
    picture = _picture(3.5 + 0.62 * len(names), 1.9 + 0.24 * len(comparisons))
    axes = picture.add_subplot()
    axes.imshow(
        np.where(np.isnan(shares), np.nan, np.digitize(shares, _STEPS)), cmap=_SHADES, vmin=0, vmax=5, aspect="auto"
    )
    for (row, column), share in np.ndenumerate(shares):
        if not np.isnan(share):
            axes.text(column, row, f"{share:.2g}", ha="center", va="center", fontsize=7, color=TEXT)
    axes.set_xticks(range(len(names)), names, rotation=40, ha="left", rotation_mode="anchor")
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(comparisons)), [c.cell.name for c in comparisons])
    axes.tick_params(length=0, labelsize=8)
    for side in axes.spines.values():
        side.set_visible(False)
    return _png(picture)


def draw_steps(runs: Mapping[str, Mapping[str, CellResults]]) -> bytes:
    """Draws, per title, the losses of all backends over the steps and their distances from the reference's losses."""
    picture = _picture(6.2 * len(runs), 6.4)
    columns = picture.subplots(2, len(runs), squeeze=False, sharex="col")
    for (title, by_backend), (above, below) in zip(runs.items(), columns.T, strict=True):
        reference = by_backend[REFERENCE].curve("loss")
        steps = np.arange(1, len(reference) + 1)
        for number, (backend, run) in enumerate(by_backend.items()):
            dashes = (0, (2, 1 + number)) if number else "solid"
            above.plot(steps, run.curve("loss"), color=COLORS[backend], linestyle=dashes, label=backend)
            if backend != REFERENCE:
                distance = np.abs(run.curve("loss") - reference)
                below.semilogy(steps, np.maximum(distance, 1e-9), color=COLORS[backend], label=backend)
        _style(above, f"Loss: {title}")
        _style(below, "Distance from the reference", "step")
        above.legend(frameon=False, fontsize=8)
    return _png(picture)


def draw_tokens(runs: Mapping[str, Mapping[str, CellResults]]) -> bytes:
    """Draws how far the log-probs of single tokens are from those of the reference."""
    picture = _picture(6.2 * len(runs), 3.4)
    for axes, (title, by_backend) in zip(picture.subplots(1, len(runs), squeeze=False)[0], runs.items(), strict=True):
        bins = np.logspace(-8, -4, 41)
        for backend, run in by_backend.items():
            if backend != REFERENCE:
                distance = np.clip(np.abs(run.logps - by_backend[REFERENCE].logps), bins[0], bins[-1])
                axes.hist(distance, bins, histtype="step", color=COLORS[backend], label=backend, linewidth=1.4)
        axes.set_xscale("log")
        _style(axes, f"Tokens by distance of their log-probs: {title}", "nats")
        axes.legend(frameon=False, fontsize=8)
    return _png(picture)


def draw_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]], caption: str) -> bytes:
    """Draws the training curves of two runs in one picture, and their distances below.

    Args:
        runs: name -> the records of `metrics.jsonl`; first PyTorch's, then JAX's.
        caption: the caption of the picture.
    """
    panels = {
        "loss": "Loss",
        "rewards/margins": "Reward margin",
        "grad_norm": "Gradient norm",
        "rewards/accuracies": "Reward accuracy",
    }
    (_, theirs), (_, ours) = runs.items()
    steps = [record["step"] for record in theirs]
    picture = _picture(15.0, 5.6)
    columns = picture.subplots(2, len(panels), sharex=True, height_ratios=(3, 1)).T
    for (key, title), (above, below) in zip(panels.items(), columns, strict=True):
        values = [np.array([record[key] for record in records], np.float64) for records in (theirs, ours)]
        for name, curve, color, style in zip(
            runs, values, (PYTORCH_COLOR, JAX_COLOR), ("solid", (0, (3, 2))), strict=True
        ):
            width = 4.0 if style == "solid" else 1.6
            shade = 0.45 if style == "solid" else 1.0
            above.plot(steps, curve, color=color, linestyle=style, linewidth=width, alpha=shade, label=name)
        below.semilogy(steps, np.maximum(np.abs(values[1] - values[0]), 1e-8), color=TEXT, linewidth=1.0)
        below.set_ylim(1e-8, 1e-2)
        _style(above, title)
        _style(below, "", "step")
    columns[0][0].legend(frameon=False)
    columns[0][1].set_ylabel("distance")
    picture.suptitle(caption, fontsize=11, color=TEXT)
    return _png(picture)


def _picture(width: float, height: float) -> Picture:
    return Picture(figsize=(width, height), dpi=120, facecolor="#ffffff", layout="constrained")


def _style(axes: Axes, title: str, label: str = "") -> None:
    axes.set_title(title, fontsize=10.5, color=TEXT, loc="left")
    axes.set_xlabel(label)
    axes.grid(color=FAINT, linewidth=0.6, alpha=0.6)
    if axes.get_xscale() == "linear":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.minorticks_off()  # those of logarithmic axes would take half of the time to draw
    axes.tick_params(colors=TEXT, labelsize=8.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _png(picture: Picture) -> bytes:
    file = io.BytesIO()
    with rc_context({"font.family": "DejaVu Sans"}):
        FigureCanvasAgg(picture).print_png(file)
    return file.getvalue()
