"""Writes the report of a comparison: `report.json` for programs, `report.md` and `report.html` for people."""

from __future__ import annotations

import base64
import json
import math
import platform
from collections.abc import Iterable, Sequence
from datetime import date
from html import escape
from importlib import metadata
from pathlib import Path
from typing import Any

from parity import plots
from parity.cases import LAYOUTS, Cell, Job
from parity.compare import BFLOAT16_RATIO, Comparison, Figure, Outcome
from parity.results import CellResults, read_results
from parity.variants import VARIANTS

PACKAGES = ("jax", "flax", "optax", "torch", "transformers", "deepspeed", "safetensors", "numpy")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2430; max-width: 1200px; margin: 2em auto; padding: 0 1.5em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin-top: 2em; }
table { border-collapse: collapse; font-size: 13px; } th, td { padding: .25em .8em; text-align: left; }
th { border-bottom: 2px solid #c9cdd6; } td { border-bottom: 1px solid #eceef2; font-variant-numeric: tabular-nums; }
.broken { color: #c92a2a; font-weight: 600; } .good { color: #2b8a3e; } img { max-width: 100%; }
"""

Table = tuple[Sequence[str], list[Sequence[str]]]


def write_report(job: Job, outcome: Outcome) -> Path:
    """Writes the three files into the job's folder and returns the page's path."""
    folder = Path(job.work)
    facts = {"date": date.today().isoformat(), "versions": versions(), "pairs": job.pairs, "steps": job.steps}
    text = json.dumps({**facts, **outcome.as_json()}, indent=1)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    (folder / "report.md").write_text(_markdown(job, outcome), encoding="utf-8")
    page = folder / "report.html"
    page.write_text(_page(job, outcome), encoding="utf-8")
    return page


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that the numbers depend on, as far as they are installed."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return installed


def verdict(outcome: Outcome) -> str:
    """States the outcome in a sentence."""
    broken = [c for c in outcome.cells if not c.holds]
    caught = len(outcome.variants) - len(outcome.passed_variants)
    cells = f"all {len(outcome.cells)} cells are within their bounds"
    if broken:
        cells = f"{len(broken)} of {len(outcome.cells)} cells are beyond a bound"
    variants = f"; {caught} of {len(outcome.variants)} wrong variants are caught" if outcome.variants else ""
    return f"{'PARITY' if outcome.holds else 'NO PARITY'}: {cells}{variants}."


# --- tables


def worst_table(comparisons: Sequence[Comparison]) -> Table:
    """Makes a table with the largest value of every figure over some comparisons."""
    rows: list[Sequence[str]] = []
    for name in dict.fromkeys(figure.name for c in comparisons for figure in c.figures):
        candidates = [(c, figure) for c in comparisons for figure in c.figures if figure.name == name]
        comparison, figure = max(candidates, key=lambda x: math.inf if math.isnan(x[1].share) else x[1].share)
        cell = comparison.cell.name + (f" ({figure.detail})" if figure.detail else "")
        rows.append((name, _value(figure.value), _value(figure.bound), _state(figure), cell))
    return ("figure", "largest", "bound", "", "where"), rows


def variant_table(outcome: Outcome) -> Table:
    """Makes a table of the wrong variants and the figures that caught them."""
    rows: list[Sequence[str]] = []
    for name, comparison in outcome.variants.items():
        caught_by = ", ".join(f"{figure.name} {_value(figure.value)}" for figure in comparison.broken[:4])
        rows.append((name, VARIANTS[name].mistake, caught_by or "NOT CAUGHT"))
    rows += [(name, VARIANTS[name].mistake, "not tried: makes no difference here") for name in outcome.not_tried]
    return ("wrong variant", "mistake", "caught by"), rows


def cell_table(comparisons: Iterable[Comparison]) -> Table:
    """Makes a table of every figure of every cell."""
    rows = [
        (c.cell.name, f.name, _value(f.value), _value(f.bound), _state(f), f.detail)
        for c in comparisons
        for f in c.figures
    ]
    return ("cell", "figure", "value", "bound", "", "detail"), list(rows)


def _sections(outcome: Outcome) -> list[tuple[str, str, Table]]:
    exact = [c for c in outcome.cells if c.cell.dtype == "float32"]
    rounded = [c for c in outcome.cells if c.cell.dtype != "float32"]
    text = "The distance from PyTorch in a single process, the largest over all cells."
    sections = [("float32", text, worst_table(exact))]
    if rounded:
        text = (
            "The distance of a run in bfloat16 from its own side's float32, divided by that of PyTorch in a single "
            f"process; the bound is {BFLOAT16_RATIO:g}. Figures over the steps take all layouts and orders of the "
            "pairs together."
        )
        sections.append(("bfloat16", text, worst_table(rounded)))
    text = "PyTorch in a single process against itself in another layout, which shows the effect of rounding alone."
    sections.append(("Noise of the reference", text, worst_table(outcome.noise)))
    if outcome.variants:
        text = "Mistakes that were put into the JAX side. Each has to break a bound."
        sections.append(("The check, checked", text, variant_table(outcome)))
    return sections


def _state(figure: Figure) -> str:
    return "holds" if figure.holds else "BROKEN"


def _value(value: float) -> str:
    return f"{value:.1e}" if not 0.1 <= abs(value) < 1000 else f"{value:.2f}"


# --- the two documents


def _markdown(job: Job, outcome: Outcome) -> str:
    lines = ["# Parity of JAX and PyTorch", "", verdict(outcome), "", _about(job), ""]
    sections = [*_sections(outcome), ("All figures", "", cell_table(outcome.cells))]
    for title, text, (head, rows) in sections:
        lines += [f"## {title}", "", *([text, ""] if text else [])]
        lines += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        lines.append("")
    return "\n".join(lines)


def _page(job: Job, outcome: Outcome) -> str:
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Parity of JAX and PyTorch</title>",
        f"<style>{STYLE}</style></head><body><h1>Parity of JAX and PyTorch</h1>",
        f"<p class='{'good' if outcome.holds else 'broken'}'>{escape(verdict(outcome))}</p>",
        f"<p>{escape(_about(job))}</p>",
    ]
    for title, text, table in _sections(outcome):
        parts += [f"<h2>{escape(title)}</h2><p>{escape(text)}</p>", _html_table(table)]
    runs = _runs(job)
    pictures = {
        "Every figure as a share of its bound": plots.draw_matrix(outcome.cells),
        "The steps": plots.draw_steps(runs),
        "The tokens": plots.draw_tokens(runs),
    }
    for title, picture in pictures.items():
        data = base64.b64encode(picture).decode()
        parts.append(f"<h2>{title}</h2><img alt='{title}' src='data:image/png;base64,{data}'>")
    figures = _html_table(cell_table(outcome.cells))
    parts.append(f"<h2>All figures</h2><details><summary>show</summary>{figures}</details></body></html>")
    return "\n".join(parts)


def _html_table(table: Table) -> str:
    head, rows = table
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = ""
    for row in rows:
        bad = " class='broken'" if {"BROKEN", "NOT CAUGHT"} & set(row) else ""
        body += f"<tr{bad}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
    return f"<table><tr>{cells}</tr>{body}</table>"


def _about(job: Job) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    injected = f" THE WRONG VARIANT `{job.inject}` IS INJECTED." if job.inject else ""
    return (
        f"{job.pairs} pairs, {job.batch} a step, {job.steps} optimizer steps from the same weights; layouts "
        f"{', '.join(LAYOUTS)}. {date.today().isoformat()}; {packages}.{injected}"
    )


def _runs(job: Job) -> dict[str, dict[str, CellResults]]:
    """Reads, per family, the results of all backends in the default layout."""
    layout = list(LAYOUTS)[-1]
    backends: dict[str, Any] = dict.fromkeys(cell.backend for cell in job.cells)
    return {
        f"{family}, {layout}": {
            b: read_results(job.results_folder(cell))
            for b in backends
            if (cell := Cell(family, layout, "float32", b)) in job.cells
        }
        for family in job.configs
    }
