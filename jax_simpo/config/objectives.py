"""The names of the objectives, and the config keys that each of them reads, with their defaults.

Both trainers read this table; the mathematics is in `jax_simpo.objectives` and, written a second time, in `torch_ref`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

# Objective -> the keys that it reads, with the values that its paper or the field uses.
REFERENCE_FREE: dict[str, dict[str, Any]] = {
    "simpo": {"beta": 2.0, "gamma_beta_ratio": 0.25, "loss_type": "sigmoid", "label_smoothing": 0.0},
    "alphapo": {"beta": 2.0, "gamma_beta_ratio": 0.25, "alpha": 0.25, "label_smoothing": 0.0},
    "simper": {},
    "cpo": {"beta": 0.1, "loss_type": "sigmoid", "label_smoothing": 0.0, "sft_weight": 1.0},
    "slic": {"delta": 1.0, "sft_weight": 0.1},
    "orpo": {"beta": 0.1, "sft_weight": 1.0},
}
WITH_REFERENCE: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.1, "loss_type": "sigmoid", "label_smoothing": 0.0},
    "robust": {"beta": 0.1, "label_smoothing": 0.1},
    "ipo": {"beta": 0.1},
    "sigmoid_norm": {"beta": 5.0, "label_smoothing": 0.0},
    "dpop": {"beta": 0.3, "dpop_lambda": 50.0},
    "exo_pair": {"beta": 0.1, "label_smoothing": 1e-3},
    "apo_zero": {"beta": 0.1},
    "apo_down": {"beta": 0.1},
    "nca_pair": {"beta": 0.1},
    "bco_pair": {"beta": 0.1},
    "sppo_hard": {"beta": 1e-3},
}
OBJECTIVE_KEYS = {**REFERENCE_FREE, **WITH_REFERENCE}
SFT = "sft"  # in a weighted sum, the cross-entropy of the chosen responses
_EVERY_OBJECTIVE = {"sft_weight": 0.0}
REFERENCE_KEY = "ref_model_name_or_path"
ALL_KEYS = tuple(dict.fromkeys(key for keys in (*OBJECTIVE_KEYS.values(), _EVERY_OBJECTIVE) for key in keys))


def parts(objective: str | Mapping[str, float]) -> dict[str, float]:
    """Returns the objectives of a config's `objective` and their weights, without `sft`."""
    weights = {objective: 1.0} if isinstance(objective, str) else objective
    return {name: weight for name, weight in weights.items() if name != SFT}


def defaults(objective: str | Mapping[str, float]) -> dict[str, Any]:
    """Returns the keys that an objective reads and their defaults; of a sum, those of the first that reads a key."""
    names = [name for name in parts(objective) if name in OBJECTIVE_KEYS]
    keys: dict[str, Any] = {}
    for name in names:
        keys = {**OBJECTIVE_KEYS[name], **keys}
    if not isinstance(objective, str):
        keys["sft_weight"] = objective.get(SFT, 0.0)  # a sum names all of its terms
    reference = {} if WITH_REFERENCE.keys().isdisjoint(names) else {REFERENCE_KEY: None}
    return {**_EVERY_OBJECTIVE, **reference, **keys}


def default_beta(objective: Any) -> float:
    """Returns the beta of a config that gives none."""
    known = isinstance(objective, str | Mapping) and not check(objective)
    return float(defaults(objective if known else "simpo").get("beta", 1.0))


def check(objective: str | Mapping[str, float]) -> str:
    """Returns what is wrong with the value of `objective`, or an empty text."""
    weights = {objective: 1.0} if isinstance(objective, str) else objective
    for name, weight in weights.items():
        if name not in OBJECTIVE_KEYS and (name != SFT or isinstance(objective, str)):
            near = difflib.get_close_matches(str(name).lower(), OBJECTIVE_KEYS, 1, 0.6)
            hint = f"Did you mean `{near[0]}`?" if near else f"Expected one of {', '.join(OBJECTIVE_KEYS)}"
            return f"`objective` {name} is not known. {hint}"
        if not isinstance(weight, int | float) or weight < 0:
            return f"`objective`: the weight of {name} is {weight!r}; expected a number >= 0"
    if not parts(objective):
        return f"`objective` {dict(weights)} names no preference objective; add one, such as `simpo: 1.0`"
    if not any(parts(objective).values()):
        return "`objective` gives every preference objective the weight 0; give one of them a weight above 0"
    return ""


def keys_without_effect(objective: str | Mapping[str, float], values: Mapping[str, Any]) -> list[str]:
    """Lists the keys that have a value but are not read by the objective."""
    read = defaults(objective)
    return [key for key in (*ALL_KEYS, REFERENCE_KEY) if values.get(key) is not None and key not in read]


def described(objective: str | Mapping[str, float]) -> str:
    """Returns the objective as one would write it in a sentence: `dpo`, or `dpo + 0.1 sft`."""
    if isinstance(objective, str):
        return objective
    return " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in objective.items())
