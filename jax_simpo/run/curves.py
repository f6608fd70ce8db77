"""The picture of a run: loss, reward accuracy and reward margin over the steps."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter

Theme = Literal["light", "dark"]

# Above this number of points the line is a running mean, with the points themselves faint behind it.
_SMOOTH_ABOVE = 60


@dataclass(frozen=True)
class _Colors:
    paper: str
    text: str
    faint: str
    training: str
    evaluation: str


_THEMES = {
    "light": _Colors("#ffffff", "#1f2430", "#c9cdd6", "#2f6fde", "#d9480f"),
    "dark": _Colors("#171a21", "#e4e7ee", "#414857", "#6ea8fe", "#ff9a5c"),
}


@dataclass(frozen=True)
class _Panel:
    title: str
    key: str
    guide: float | None = None  # the value of a dashed line to compare with
    guide_label: str = ""


def draw_curves(
    train: Sequence[Mapping[str, Any]],
    evals: Sequence[Mapping[str, Any]],
    *,
    eval_name: str = "evaluation",
    target_margin: float | None = None,
    starts_as_reference: bool = False,
    theme: Theme = "light",
) -> bytes:
    """Draws a PNG with three panels: training as a line, evaluations as points with the value of the last.

    Args:
        train: training records of `metrics.jsonl`.
        evals: evaluation records, with their `eval_` keys.
        eval_name: the label of the evaluations in the legend.
        target_margin: gamma, drawn as a dashed line into the panel of the margin; None draws no line.
        starts_as_reference: leave out the accuracy before the first update. All rewards of a run that starts from its
            reference are 0 there, so none of them is higher than another.
        theme: the theme of the page that shows the picture.
    """
    colors = _THEMES[theme]
    panels = (
        _Panel("Loss", "loss"),
        _Panel("Reward accuracy", "rewards/accuracies", 0.5, "coin toss"),
        _Panel("Reward margin", "rewards/margins", target_margin, "target margin"),
    )
    # The style applies to this picture alone, and a user's matplotlibrc does not apply.
    style = {"font.family": "DejaVu Sans", "font.size": 10.5, "path.simplify": True}
    with rc_context({**style, "text.parse_math": False}):  # a split may be named `$x$`, which is no formula
        layout = ConstrainedLayoutEngine(w_pad=0.16, h_pad=0.08)
        figure = Figure(figsize=(13.5, 4.1), dpi=150, facecolor=colors.paper, layout=layout)
        all_axes = figure.subplots(1, 3)
        for axes, panel in zip(all_axes, panels, strict=True):
            shown_train, shown_evals = train, evals
            if starts_as_reference and panel.key == "rewards/accuracies":
                shown_train = [record for record in train if record["step"] > 1]
                shown_evals = [record for record in evals if record["eval_step"] > 0]
            _draw_panel(axes, panel, shown_train, shown_evals, colors, eval_name)
            last = max([train[-1]["step"], *(record["eval_step"] for record in evals)])
            _style_axes(axes, panel, colors, first=0.0 if evals else train[0]["step"], last=last)
        picture = io.BytesIO()
        FigureCanvasAgg(figure).print_png(picture)
    return picture.getvalue()


def _draw_panel(
    axes: Axes,
    panel: _Panel,
    train: Sequence[Mapping[str, Any]],
    evals: Sequence[Mapping[str, Any]],
    colors: _Colors,
    eval_name: str,
) -> None:
    steps = np.array([record["step"] for record in train], np.float64)
    values = np.array([record[panel.key] for record in train], np.float64)
    if panel.guide is not None:
        axes.axhline(panel.guide, color=colors.faint, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            panel.guide_label,
            (1.0, panel.guide),
            xycoords=axes.get_yaxis_transform(),
            xytext=(-2, -3),
            textcoords="offset points",
            color=colors.text,
            alpha=0.65,
            ha="right",
            va="top",
            fontsize=8.5,
        )
    smooth = len(values) > _SMOOTH_ABOVE
    if smooth:
        axes.plot(steps, values, color=colors.training, linewidth=0.8, alpha=0.28, zorder=2)
    line = _running_mean(values) if smooth else values
    label = "training (running mean)" if smooth else "training"
    marker = "o" if len(values) <= 12 else None
    axes.plot(steps, line, color=colors.training, linewidth=2.0, marker=marker, markersize=4, label=label, zorder=3)
    if evals:
        eval_steps, eval_values = [r["eval_step"] for r in evals], [r[f"eval_{panel.key}"] for r in evals]
        axes.plot(
            eval_steps,
            eval_values,
            color=colors.evaluation,
            linewidth=1.2,
            linestyle=(0, (1, 1.4)),
            marker="o",
            markersize=7,
            markeredgecolor=colors.paper,
            markeredgewidth=1.4,
            label=eval_name,
            zorder=4,
            clip_on=False,
        )
        axes.annotate(
            f"{eval_values[-1]:.1%}" if panel.key == "rewards/accuracies" else f"{eval_values[-1]:.3g}",
            (eval_steps[-1], eval_values[-1]),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=colors.evaluation,
            fontweight="bold",
            annotation_clip=False,
        )


def _style_axes(axes: Axes, panel: _Panel, colors: _Colors, *, first: float, last: float) -> None:
    axes.set_title(panel.title, loc="left", color=colors.text, fontsize=12.5, fontweight="bold", pad=10)
    axes.set_xlabel("step", color=colors.text)
    axes.set_facecolor(colors.paper)
    axes.set_xlim(first, last if last > first else first + 1)
    axes.margins(y=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    if panel.key == "rewards/accuracies":
        low, high = axes.get_ylim()
        axes.set_ylim(max(0.0, min(low, 0.42)), min(1.02, max(high, 0.75)))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(axis="y", color=colors.faint, linewidth=0.7, alpha=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=colors.text, length=0, labelsize=9.5)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(colors.faint)
    if panel.key == "loss":
        axes.legend(frameon=False, labelcolor=colors.text, loc="best", fontsize=9.5)


def _running_mean(values: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Averages each value with its neighbours: a fortieth of the run on either side, fewer at the ends."""
    half = max(2, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    start, stop = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[stop] - sums[start]) / (stop - start)
