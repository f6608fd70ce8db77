"""The SimPO objective, as in the code that the published numbers come from (princeton-nlp/SimPO, `simpo_loss`).

Meng, Xia and Chen, "SimPO: Simple Preference Optimization with a Reference-Free Reward" (2024),
arXiv 2405.14734, equation 6.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

LossType = Literal["sigmoid", "hinge"]


def simpo_losses(
    chosen_logps: Float[Array, "*P"],
    rejected_logps: Float[Array, "*P"],
    *,
    beta: float,
    gamma_beta_ratio: float,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
) -> Float[Array, "*P"]:
    """The loss of each pair, from the mean log-probability of its two responses.

    With `z = chosen - rejected - gamma_beta_ratio`: sigmoid is `-(1-s) logsigmoid(beta z) - s logsigmoid(-beta z)`, `s`
    the label smoothing; hinge is `relu(1 - beta z)`, which knows no smoothing. The target margin gamma is
    `beta * gamma_beta_ratio`: the ratio stands inside beta, once.
    """
    z = beta * (chosen_logps - rejected_logps - gamma_beta_ratio)
    if loss_type == "hinge":
        return jax.nn.relu(1.0 - z)
    if loss_type == "sigmoid":
        return -(1.0 - label_smoothing) * jax.nn.log_sigmoid(z) - label_smoothing * jax.nn.log_sigmoid(-z)
    raise ValueError(f"loss_type {loss_type!r} is neither 'sigmoid' nor 'hinge'")


class ResponseLogps(NamedTuple):
    """Per response slot: the sum of its targets' log-probs and their number; empty slots hold zeros."""

    sum: Float[Array, "B R"]
    length: Float[Array, "B R"]

    @property
    def mean(self) -> Float[Array, "B R"]:
        """What SimPO calls the reward over beta. Empty slots give 0, not 0/0, in values and gradients."""
        return self.sum / jnp.maximum(self.length, 1.0)


def response_logps(target_logps: Float[Array, "B T"], target_response: Int[Array, "B T"], slots: int) -> ResponseLogps:
    """Adds up the targets of each response; targets that point at slot `slots` are padding."""
    belongs = (target_response[..., None] == jnp.arange(slots)).astype(target_logps.dtype)
    # The product in full float32: a TPU would round the log-probs to bfloat16.
    total = jnp.einsum("bt,btr->br", target_logps, belongs, precision=jax.lax.Precision.HIGHEST)
    return ResponseLogps(total, belongs.sum(1))


class PairLogps(NamedTuple):
    """Pairs at the slot of their chosen response; `valid` says which slots hold one."""

    chosen: Float[Array, "B R"]
    rejected: Float[Array, "B R"]
    valid: Bool[Array, "B R"]


def match_pairs(
    logps: Float[Array, "B R"], response_pair: Int[Array, "B R"], response_rank: Int[Array, "B R"]
) -> PairLogps:
    """Brings each chosen response together with its rejected one, which sits in the same row.

    Args:
        logps: one number per response slot, such as the mean log-probability.
        response_pair: pair number, -1 for an empty slot.
        response_rank: 0 chosen, 1 rejected.
    """
    valid = (response_pair >= 0) & (response_rank == 0)
    partner = (response_pair[:, :, None] == response_pair[:, None, :]) & (response_rank == 1)[:, None, :]
    rejected = jnp.where(partner & valid[:, :, None], logps[:, None, :], 0.0).sum(-1)
    return PairLogps(jnp.where(valid, logps, 0.0), rejected, valid)
