"""The names of the objectives, and the config keys that each of them reads, with their defaults.

Both trainers read this table; the mathematics is in `jax_simpo.objectives` and, written a second time, in `torch_ref`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

# Objective -> the keys that it reads, with the values that its paper or the field uses.
REFERENCE_FREE: dict[str, dict[str, Any]] = {
    "simpo": {"beta": 2.0, "gamma_beta_ratio": 0.25, "loss_type": "sigmoid", "label_smoothing": 0.0},
    "alphapo": {"beta": 2.0, "gamma_beta_ratio": 0.25, "alpha": 0.25, "label_smoothing": 0.0},
    "simper": {},
    "cpo": {"beta": 0.1, "loss_type": "sigmoid", "label_smoothing": 0.0, "sft_weight": 1.0},
    "slic": {"delta": 1.0, "sft_weight": 0.1},
    "orpo": {"beta": 0.1, "sft_weight": 1.0, "sft_over": "prompt_and_response"},
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
_EVERY_OBJECTIVE = {"sft_weight": 0.0, "sft_over": "response"}
GROUP_KEYS = ("group_loss", "compare_weights", "mean_over")
LOGISTIC = ("simpo", "alphapo", "cpo", "dpo", "sigmoid_norm")
"""The objectives that are the logistic loss of a difference of rewards, as `group_loss: plackett_luce` needs."""
REFERENCE_KEY = "ref_model_name_or_path"
ALL_KEYS = tuple(dict.fromkeys(key for keys in (*OBJECTIVE_KEYS.values(), _EVERY_OBJECTIVE) for key in keys))


@runtime_checkable
class OwnObjective(Protocol):
    """An objective made in Python, such as one of your own (docs/objectives.md)."""

    needs_reference: ClassVar[bool]

    def losses(self, chosen: Any, rejected: Any) -> Any:
        """Computes the loss of each pair."""


# A name, names with weights, a class of the user's as `FILE.py:CLASS`, or an object.
ObjectiveValue = str | Mapping[str, float] | OwnObjective


def code_of(objective: Any) -> tuple[str, str] | None:
    """Returns the file and the class that an `objective` of the form `FILE.py:CLASS` names; None for other values."""
    found = re.fullmatch(r"(.+\.py):([A-Za-z_]\w*)", objective) if isinstance(objective, str) else None
    return None if found is None else (found[1], found[2])


def is_own(objective: Any) -> bool:
    """Returns True for an objective that does not come with the program."""
    return not isinstance(objective, str | Mapping) or code_of(objective) is not None


def parts(objective: ObjectiveValue) -> dict[str, float]:
    """Returns the objectives of a config's `objective` and their weights, without `sft`; empty for one's own."""
    if isinstance(objective, Mapping):
        return {name: weight for name, weight in objective.items() if name != SFT}
    return {objective: 1.0} if isinstance(objective, str) and not is_own(objective) else {}


def defaults(objective: ObjectiveValue) -> dict[str, Any]:
    """Returns the keys that an objective reads and their defaults; of a sum, those of the first that reads a key."""
    names = [name for name in parts(objective) if name in OBJECTIVE_KEYS]
    keys: dict[str, Any] = {}
    for name in names:
        keys = {**OBJECTIVE_KEYS[name], **keys}
    if isinstance(objective, Mapping):
        keys["sft_weight"] = objective.get(SFT, 0.0)  # a sum names all of its terms
    reference = {} if WITH_REFERENCE.keys().isdisjoint(names) else {REFERENCE_KEY: None}
    return {} if is_own(objective) else {**_EVERY_OBJECTIVE, **reference, **keys}


def default_beta(objective: Any) -> float:
    """Returns the beta of a config that gives none."""
    return float(defaults("simpo" if check(objective) else objective).get("beta", 1.0))


def check(objective: Any) -> str:
    """Returns what is wrong with the value of `objective`, or an empty text."""
    if is_own(objective):
        return ""
    weights = {objective: 1.0} if isinstance(objective, str) else objective
    for name, weight in weights.items():
        if name not in OBJECTIVE_KEYS and (name != SFT or isinstance(objective, str)):
            return f"`objective` {name} is not known. {_hint(str(name))}"
        if not isinstance(weight, int | float) or weight < 0:
            return f"`objective`: the weight of {name} is {weight!r}; expected a number >= 0"
    if not parts(objective):
        return f"`objective` {dict(weights)} names no preference objective; add one, such as `simpo: 1.0`"
    if not any(parts(objective).values()):
        return "`objective` gives every preference objective the weight 0; give one of them a weight above 0"
    return ""


def _hint(name: str) -> str:
    if name.endswith(")"):
        return "It was made in Python, so it cannot be read from a file; give it in Python again (`objective=...`)"
    near = difflib.get_close_matches(name.lower(), OBJECTIVE_KEYS, 1, 0.6)
    return f"Did you mean `{near[0]}`?" if near else f"Expected one of {', '.join(OBJECTIVE_KEYS)}, or FILE.py:CLASS"


def check_keys(objective: ObjectiveValue, values: Mapping[str, Any]) -> str:
    """Returns what is wrong with the keys beside a known `objective`, or an empty text.

    Which keys an objective of one's own reads, only its class knows.
    """
    if is_own(objective):
        return ""
    read = defaults(objective)
    for key in (*ALL_KEYS, REFERENCE_KEY):
        if values.get(key) is not None and key not in read:
            return f"`{key}` has no effect with `objective: {described(objective)}`; remove it, or set it to null"
    if isinstance(objective, Mapping) and values["sft_weight"] != objective.get(SFT, 0.0):
        return "`sft_weight` beside an `objective` with weights; write `sft: WEIGHT` among them instead"
    if values["label_smoothing"] and values["loss_type"] == "hinge":
        return "`label_smoothing` has no effect with `loss_type: hinge`; remove one of them"
    if values["group_loss"] == "plackett_luce":
        if list(parts(objective).values()) != [1.0] or parts(objective).keys().isdisjoint(LOGISTIC):
            return f"`group_loss: plackett_luce` needs one objective alone, with the weight 1: {', '.join(LOGISTIC)}"
        if values["label_smoothing"] or values["loss_type"] == "hinge":
            return "`group_loss: plackett_luce` has neither `label_smoothing` nor `loss_type: hinge`; remove them"
        for key, usual in (("compare_weights", "equal"), ("mean_over", "groups")):
            if values[key] != usual:
                return f"`{key}` has no effect with `group_loss: plackett_luce`; remove it"
    if "exo_pair" in parts(objective) and not values["label_smoothing"]:
        return "`label_smoothing` is 0; `objective: exo_pair` needs a number above 0, such as 0.001"
    return ""


def described(objective: ObjectiveValue) -> str:
    """Returns the objective as one would write it in a sentence: `dpo`, or `dpo + 0.1 sft`."""
    if isinstance(objective, Mapping):
        return " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in objective.items())
    return objective if isinstance(objective, str) else repr(objective)
