"""The losses of TRL's trainers, which other trainers call too, as objectives of ours.

Read off TRL 1.16 (`experimental/cpo`, `experimental/orpo`, `trainer/dpo_trainer.py`); our objectives are tested against
that code (tests/objectives).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax_simpo.config.convert.common import beside
from jax_simpo.config.convert.rules import Draft
from jax_simpo.pages import page_url

# `loss_type` of DPOTrainer -> the objective and its loss_type.
DPO_LOSSES: dict[str, tuple[str, str | None]] = {
    "sigmoid": ("dpo", "sigmoid"),
    "hinge": ("dpo", "hinge"),
    **{
        name: (name, None)
        for name in ("robust", "ipo", "sigmoid_norm", "exo_pair", "apo_zero", "apo_down", "nca_pair", "bco_pair")
    },
    "sppo_hard": ("sppo_hard", None),
}
SMOOTHING_NOTE = "here as in TRL 0.24 (cDPO); TRL 0.29 and 1.16 do not read it with the loss sigmoid"
_SMOOTHED = ("dpo", "robust", "exo_pair", "sigmoid_norm")


def is_number(value: Any) -> bool:
    """Returns True for a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def set_simpo(
    draft: Draft, beta: tuple[str, Any], gamma: tuple[str, Any], sft: tuple[str, Any], origin: str, alpha: Any = 0.0
) -> None:
    """Sets SimPO, or AlphaPO where `alpha` is not 0. Each of the other arguments is a key of theirs and its value.

    The loss is -logsigmoid(beta * (mean log-prob of chosen - of rejected - gamma / beta)) + sft * cross-entropy.
    """
    draft.set("objective", "alphapo" if alpha else "simpo", origin)
    if alpha:
        draft.set("alpha", alpha, f"alpha: {alpha}", of="alpha")
    draft.set("beta", beta[1], _said(draft, *beta), of=beta[0])
    if not (is_number(beta[1]) and is_number(gamma[1]) and beta[1] > 0):
        draft.refuse(gamma[0], f"the margin is {gamma[0]} / {beta[0]}, and both must be numbers above 0")
        return
    quotient = f"{_said(draft, *gamma)} / {_said(draft, *beta)}"
    draft.set("gamma_beta_ratio", beside(gamma[1], beta[1]), f"gamma / beta: {quotient}", of=gamma[0])
    draft.set("sft_weight", sft[1], _said(draft, *sft), of=sft[0])


def set_cpo(draft: Draft, loss_type: str, beta: tuple[str, Any], sft: tuple[str, Any], origin: str) -> None:
    """Sets CPO: -logsigmoid(beta * difference of summed log-probs), or its hinge, + sft * cross-entropy."""
    draft.set("objective", "cpo", origin)
    draft.set("loss_type", loss_type, f"loss_type: {loss_type}", of="loss_type")
    draft.set("beta", beta[1], _said(draft, *beta), of=beta[0])
    draft.set("sft_weight", sft[1], _said(draft, *sft), of=sft[0])


def set_orpo(draft: Draft, beta: tuple[str, Any], origin: str) -> None:
    """Sets ORPO: the cross-entropy of prompt and chosen response + beta * the loss of the odds ratio."""
    draft.set("objective", "orpo", origin)
    draft.set("beta", beta[1], f"{_said(draft, *beta)} (the paper's lambda)", of=beta[0])


def set_dpo(
    draft: Draft,
    losses: tuple[str, Any],
    weights: tuple[str, Any],
    beta: tuple[str, Any],
    smoothing: tuple[str, Any],
    origin: str,
    *,
    smoothing_note: str = SMOOTHING_NOTE,
) -> None:
    """Sets one of the losses with a reference, or a weighted sum of them. The first arguments are keys and values.

    `smoothing_note` is what is to be known of label smoothing beside the loss `sigmoid`.
    """
    key, value = losses
    names: Sequence[Any] = value if isinstance(value, list) else [value]
    unknown = [name for name in names if name not in DPO_LOSSES and name != "sft"]
    if unknown or set(names) == {"sft"}:
        missing = ", ".join(map(str, unknown)) or "preference"
        draft.refuse(key, f"there is no {missing} loss here ({page_url('objectives')})")
        return
    shares = weights[1] if weights[1] is not None else [1.0] * len(names)
    if not isinstance(shares, list) or len(shares) != len(names):
        draft.refuse(weights[0], f"expected a weight for each of {', '.join(map(str, names))}")
        return
    objectives = [("sft", None) if name == "sft" else DPO_LOSSES[name] for name in names]
    said = draft.pairs(key, weights[0])
    origin = f"{origin}, {said}" if said else origin
    if len(names) == 1 and shares[0] == 1:
        draft.set("objective", objectives[0][0], origin)
    else:
        draft.set("objective", {ours: share for (ours, _), share in zip(objectives, shares, strict=True)}, origin)
    forms = {form for _, form in objectives if form is not None}
    if len(forms) > 1:
        draft.refuse(key, "sigmoid and hinge in one sum are two forms of one objective here")
    elif forms:
        draft.set("loss_type", forms.pop(), f"{key}: {', '.join(map(str, names))}", of=key)
    draft.set("beta", beta[1], _said(draft, *beta), of=beta[0])
    if smoothing[1]:
        if any(ours in _SMOOTHED for ours, _ in objectives):
            note = smoothing_note if any(ours == "dpo" for ours, _ in objectives) else ""
            draft.set("label_smoothing", smoothing[1], _said(draft, *smoothing), note, of=smoothing[0])
        else:
            draft.refuse(smoothing[0], "the loss has no label smoothing; remove it")


def _said(draft: Draft, key: str, value: Any) -> str:
    """Says where a value comes from: the key, or the default of a key that is not given."""
    return f"{key}: {value}" if draft.get(key) is not None else f"{key}: {value}, its default"
