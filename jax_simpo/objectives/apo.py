"""Anchored preference optimization: objectives that also say in which direction the chosen response is to move."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
from jaxtyping import Array, Float

from jax_simpo.objectives.base import Objective, Responses


@dataclass(frozen=True, kw_only=True)
class APOZero(Objective):
    """APO-zero: raises the chosen response above the reference and lowers the rejected one below it.

    D'Oosterlinck et al., "Anchored Preference Optimization and Contrastive Revisions" (2024), arXiv 2408.06266,
    equation 7. For chosen responses that are better than what the model writes.
    """

    needs_reference: ClassVar[bool] = True

    def losses(self, chosen: Responses, rejected: Responses) -> Float[Array, "*P"]:
        return jax.nn.sigmoid(-self.beta * chosen.ratio) + jax.nn.sigmoid(self.beta * rejected.ratio)


@dataclass(frozen=True, kw_only=True)
class APODown(Objective):
    """APO-down: lowers both responses, the rejected one more.

    D'Oosterlinck et al., "Anchored Preference Optimization and Contrastive Revisions" (2024), arXiv 2408.06266,
    equation 8. For chosen responses that are worse than what the model writes.
    """

    needs_reference: ClassVar[bool] = True

    def losses(self, chosen: Responses, rejected: Responses) -> Float[Array, "*P"]:
        margin = chosen.ratio - rejected.ratio
        return jax.nn.sigmoid(self.beta * chosen.ratio) + jax.nn.sigmoid(-self.beta * margin)
