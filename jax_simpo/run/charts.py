"""The data of a run's curves, as the charts of a page read them, and the pages' common parts."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from hashlib import sha256
from importlib import resources
from typing import Any

import jinja2

from jax_simpo.run.metrics import ANSWERS
from jax_simpo.run.prose import pieces
from jax_simpo.terminal import visible

Columns = dict[str, list[float | None]]

_KEYS = (
    "loss",
    "rewards/accuracies",
    "rewards/margins",
    "rewards/chosen",
    "rewards/rejected",
    "logps/chosen",
    "logps/rejected",
)
_TRAIN = {key: key for key in (*_KEYS, "grad_norm", "learning_rate")}
_EVAL = {**{key: f"eval_{key}" for key in _KEYS}, "answers/length": f"{ANSWERS}length"}


def train_columns(records: Sequence[Mapping[str, Any]], *, starts_as_reference: bool = False) -> Columns:
    """Returns the columns of training records.

    Args:
        records: training records of `metrics.jsonl`.
        starts_as_reference: leave out the accuracy of the first step, in which all rewards are 0.
    """
    return _columns(records, "step", _TRAIN, 1 if starts_as_reference else 0)


def eval_columns(records: Sequence[Mapping[str, Any]], *, starts_as_reference: bool = False) -> Columns:
    """Returns the columns of evaluation records under the names of training; the arguments are as above."""
    return _columns(records, "eval_step", _EVAL, 0 if starts_as_reference else -1)


def _columns(records: Sequence[Mapping[str, Any]], step: str, keys: Mapping[str, str], meaningless: int) -> Columns:
    if not records:
        return {}
    columns: Columns = {"step": [record[step] for record in records]}
    for name, key in keys.items():
        if not any(key in record for record in records):
            continue
        means_something = [name != "rewards/accuracies" or record[step] > meaningless for record in records]
        values = zip(records, means_something, strict=True)
        columns[name] = [_number(record.get(key)) if meant else None for record, meant in values]
    return columns


def _number(value: Any) -> float | None:
    """JSON has no NaN; six digits are more than a picture shows."""
    return float(f"{value:.6g}") if isinstance(value, int | float) and math.isfinite(value) else None


# --- pages


def _as_json(data: Mapping[str, Any]) -> str:
    """Returns data as JSON that can stand in a page: it holds no markup, and no character that steers the reader."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@cache
def part(name: str) -> str:
    """Returns a file of `templates/`, such as the script of the charts."""
    return resources.files("jax_simpo.run").joinpath("templates", name).read_text(encoding="utf-8")


def render(template: str, data: Mapping[str, Any], *, live: bool = False, **values: Any) -> str:
    """Renders a page, which may run the script of the charts and load nothing from elsewhere.

    Args:
        template: its file in `templates/`.
        data: what the script reads.
        live: the page may ask the server that it came from for more.
        values: what the template shows. Texts are made visible and escaped.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jax_simpo.run", "templates"),
        autoescape=True,  # prompts and answers may hold markup
        finalize=lambda value: visible(value) if isinstance(value, str) else value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = part("charts.js")
    digest = base64.b64encode(sha256(script.encode()).digest()).decode()
    own = "connect-src 'self'; " if live else ""
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; {own}"
        "base-uri 'none'; form-action 'none'"
    )
    environment.filters["pieces"] = pieces
    # These are ours, or hold no markup, and the template must not escape them.
    as_it_is = {"policy": policy, "style": part("style.css"), "script": script, "data": _as_json(data)}
    return environment.get_template(template).render(**values, **as_it_is, live=live)
