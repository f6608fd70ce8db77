"""ORPO: a supervised loss and the odds ratio of the two responses."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_simpo.objectives.base import Objective, Responses, logistic_losses


@dataclass(frozen=True, kw_only=True)
class ORPO(Objective):
    """ORPO: `-beta logsigmoid(log odds(y_w) - log odds(y_l))`, beside the cross-entropy with weight 1.

    Hong, Lee and Thorne, "ORPO: Monolithic Preference Optimization without Reference Model" (EMNLP 2024),
    arXiv 2403.07691, equations 4 and 7, where beta is called lambda. The odds are those of the mean probability
    `p = exp(mean log-prob)`. Rewards are beta times the mean log-prob, as TRL logs them.
    """

    def losses(self, chosen: Responses, rejected: Responses) -> Float[Array, "*P"]:
        log_odds_ratio = (chosen.mean - rejected.mean) - (log1mexp(chosen.mean) - log1mexp(rejected.mean))
        return self.beta * logistic_losses(log_odds_ratio)


def log1mexp(x: Float[Array, "*P"]) -> Float[Array, "*P"]:
    """Computes `log(1 - exp(x))` for `x <= 0` without cancellation.

    Mächler, "Accurately Computing log(1 - exp(-|a|))" (2012). Each of the two forms loses all digits in the range of
    the other. `x` is taken to be at most -1e-30, so that a probability of 1 gives a finite value and gradient.
    """
    x = jnp.minimum(x, -1e-30)
    near_zero = x > -math.log(2.0)
    # Each form is given an argument of its own range, because a NaN or infinity would reach the gradient otherwise.
    return jnp.where(
        near_zero,
        jnp.log(-jnp.expm1(jnp.where(near_zero, x, -1.0))),
        jnp.log1p(-jnp.exp(jnp.where(near_zero, -1.0, x))),
    )
