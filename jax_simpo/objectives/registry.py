"""The objectives by name, their weighted sum, and the objective that a config asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from jaxtyping import Array, Float

from jax_simpo.objectives.apo import APODown, APOZero
from jax_simpo.objectives.base import Objective, Responses
from jax_simpo.objectives.cpo import CPO, SLiC
from jax_simpo.objectives.dpo import DPO, DPOP, IPO, EXOPair, LengthNormalizedDPO, RobustDPO
from jax_simpo.objectives.orpo import ORPO
from jax_simpo.objectives.pointwise import BCOPair, NCAPair, SPPOHard
from jax_simpo.objectives.simpo import AlphaPO, SimPER, SimPO

OBJECTIVES: dict[str, type[Objective]] = {
    "simpo": SimPO,
    "alphapo": AlphaPO,
    "simper": SimPER,
    "cpo": CPO,
    "slic": SLiC,
    "orpo": ORPO,
    "dpo": DPO,
    "robust": RobustDPO,
    "ipo": IPO,
    "sigmoid_norm": LengthNormalizedDPO,
    "dpop": DPOP,
    "exo_pair": EXOPair,
    "apo_zero": APOZero,
    "apo_down": APODown,
    "nca_pair": NCAPair,
    "bco_pair": BCOPair,
    "sppo_hard": SPPOHard,
}


@dataclass(frozen=True, kw_only=True)
class WeightedSum(Objective):
    """The sum of several objectives, each times its weight. Rewards and log-probs are logged as the first logs them.

    Attributes:
        terms: objectives and their weights.
    """

    terms: tuple[tuple[Objective, float], ...]

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        return any(objective.needs_reference for objective, _ in self.terms)

    def losses(self, chosen: Responses, rejected: Responses) -> Float[Array, "*P"]:
        losses = [weight * objective.losses(chosen, rejected) for objective, weight in self.terms]
        return sum(losses[1:], start=losses[0])

    def score(self, response: Responses) -> Float[Array, "*P"]:
        return self.terms[0][0].score(response)

    def logps(self, response: Responses) -> Float[Array, "*P"]:
        return self.terms[0][0].logps(response)


def make_objective(weights: Mapping[str, float], values: Mapping[str, Any]) -> Objective:
    """Makes an objective.

    Args:
        weights: names of `OBJECTIVES` and their weights.
        values: the settings by name. Each objective takes those that it has; None stands for a setting not given.
    """
    given = {key: value for key, value in values.items() if value is not None}

    def make(name: str, **more: Any) -> Objective:
        kind = OBJECTIVES[name]
        return kind(**{f.name: given[f.name] for f in fields(kind) if f.name in given} | more)

    if list(weights.values()) == [1.0]:
        return make(next(iter(weights)))
    terms = tuple((make(name, sft_weight=0.0, sft_over="response"), weight) for name, weight in weights.items())
    whole = [f.name for f in fields(Objective) if f.name != "beta"]
    return WeightedSum(terms=terms, beta=terms[0][0].beta, **{key: given[key] for key in whole if key in given})
