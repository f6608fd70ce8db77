"""The learning-rate schedules that take settings of their own, and the names of these settings.

They are transformers' names and meanings, so that a config of its trainer gives the same learning rates. Both trainers
read this table; each has its own formulas.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Schedule -> its settings in `lr_scheduler_kwargs`, with defaults. None: see the formula of the schedule.
SETTINGS: dict[str, dict[str, Any]] = {
    "cosine_with_min_lr": {"min_lr": None, "min_lr_rate": None},
    "polynomial": {"lr_end": 1e-7, "power": 1.0},
    "warmup_stable_decay": {"num_decay_steps": None, "min_lr_ratio": 0.0, "decay_type": "cosine"},
}
DECAY_TYPES = ("linear", "cosine", "1-sqrt")
DECAY_SHARE = 0.1  # of all steps, with `warmup_stable_decay` and no `num_decay_steps`


def settings_of(kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a schedule: those that are given, and else the defaults."""
    return {**SETTINGS.get(kind, {}), **given}


def check(kind: str, given: Mapping[str, Any], peak: float) -> str:
    """Returns what is wrong with the settings of a schedule, or an empty text.

    Args:
        kind: the value of `lr_scheduler_type`.
        given: the value of `lr_scheduler_kwargs`.
        peak: the value of `learning_rate`.
    """
    known = SETTINGS.get(kind, {})
    for name, value in given.items():
        if name not in known:
            takes = f"takes {', '.join(known)}" if known else "takes no settings; remove it"
            return f"`lr_scheduler_kwargs`: `lr_scheduler_type: {kind}` has no setting `{name}`; it {takes}"
        if name == "decay_type":
            if value not in DECAY_TYPES:
                return f"`lr_scheduler_kwargs`: `decay_type` is {value!r}; expected one of {', '.join(DECAY_TYPES)}"
        elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            return f"`lr_scheduler_kwargs`: `{name}` is {value!r}; expected a number >= 0"
    values = settings_of(kind, given)
    if kind == "cosine_with_min_lr" and (values["min_lr"] is None) == (values["min_lr_rate"] is None):
        return (
            "`lr_scheduler_kwargs`: `lr_scheduler_type: cosine_with_min_lr` needs either `min_lr`, the lowest learning "
            "rate, or `min_lr_rate`, its share of the peak, such as `lr_scheduler_kwargs: {min_lr_rate: 0.1}`"
        )
    for name in ("min_lr", "lr_end"):
        if (low := values.get(name)) is not None and low >= peak:
            return f"`lr_scheduler_kwargs`: `{name}` is {low}; expected less than `learning_rate` ({peak})"
    for name in ("min_lr_rate", "min_lr_ratio"):
        if (share := values.get(name)) is not None and share > 1:
            return f"`lr_scheduler_kwargs`: `{name}` is {share}; expected a share of the peak, from 0 to 1"
    if (steps := values.get("num_decay_steps")) is not None and (steps < 1 or steps != int(steps)):
        return f"`lr_scheduler_kwargs`: `num_decay_steps` is {steps}; expected a whole number >= 1"
    return ""
