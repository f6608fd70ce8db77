"""Adds the log-probs of single targets up to those of responses, and matches responses to pairs."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class ResponseLogps(NamedTuple):
    """Per response slot: the sum of its targets' log-probs and their number; empty slots hold zeros."""

    sum: Float[Array, "B R"]
    length: Float[Array, "B R"]

    @property
    def mean(self) -> Float[Array, "B R"]:
        """Mean log-prob, SimPO's reward over beta. Empty slots give 0, not 0/0, in values and gradients."""
        return self.sum / jnp.maximum(self.length, 1.0)


def sum_responses(target_logps: Float[Array, "B T"], target_response: Int[Array, "B T"], slots: int) -> ResponseLogps:
    """Adds up the targets of each response; targets that point at slot `slots` are padding."""
    belongs = (target_response[..., None] == jnp.arange(slots)).astype(target_logps.dtype)
    # Full float32 precision, because a TPU would round the log-probs to bfloat16.
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
    """Brings each chosen response together with its rejected one, which is in the same row.

    Args:
        logps: one number per response slot, such as the mean log-probability.
        response_pair: pair number, -1 for an empty slot.
        response_rank: 0 chosen, 1 rejected.
    """
    valid = (response_pair >= 0) & (response_rank == 0)
    partner = (response_pair[:, :, None] == response_pair[:, None, :]) & (response_rank == 1)[:, None, :]
    rejected = jnp.where(partner & valid[:, :, None], logps[:, None, :], 0.0).sum(-1)
    return PairLogps(jnp.where(valid, logps, 0.0), rejected, valid)
