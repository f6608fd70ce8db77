"""Adds the log-probs of single targets up to those of responses, and matches responses to pairs."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class ResponseLogps(NamedTuple):
    """Per response slot: the sum of its targets' log-probs and their number; empty slots hold zeros.

    `prompt_sum` and `prompt_length` are the same for the targets in the response's prompt; None if nobody asked.
    """

    sum: Float[Array, "B R"]
    length: Float[Array, "B R"]
    prompt_sum: Float[Array, "B R"] | None = None
    prompt_length: Float[Array, "B R"] | None = None


def sum_responses(
    target_logps: Float[Array, "B T"], target_response: Int[Array, "B T"], slots: int, prompts: bool = False
) -> ResponseLogps:
    """Adds up the targets of each response.

    Args:
        target_logps: the log-prob of every target.
        target_response: as in `RowBatch`: targets that point at slot `slots` are padding.
        slots: the number of response slots, R.
        prompts: adds up the targets of prompts too, which point at the slots after `slots`.
    """

    def add_up(first: int) -> tuple[Array, Array]:
        belongs = (target_response[..., None] == first + jnp.arange(slots)).astype(target_logps.dtype)
        # Full float32 precision, because a TPU would round the log-probs to bfloat16.
        total = jnp.einsum("bt,btr->br", target_logps, belongs, precision=jax.lax.Precision.HIGHEST)
        return total, belongs.sum(1)

    return ResponseLogps(*add_up(0), *(add_up(slots + 1) if prompts else ()))


class MatchedPairs(NamedTuple):
    """Pairs at the slot of their chosen response; `valid` says which slots hold one. All others hold zeros.

    `chosen` and `rejected` have the type of what was matched: an array, or a tuple of arrays.
    """

    chosen: Any
    rejected: Any
    valid: Bool[Array, "B R"]


def match_pairs(responses: Any, response_pair: Int[Array, "B R"], response_rank: Int[Array, "B R"]) -> MatchedPairs:
    """Brings each chosen response together with its rejected one, which is in the same row.

    Args:
        responses: arrays [B, R] with a number per response slot, such as a `ResponseLogps`.
        response_pair: pair number, -1 for an empty slot.
        response_rank: 0 chosen, 1 rejected.
    """
    valid = (response_pair >= 0) & (response_rank == 0)
    partner = (response_pair[:, :, None] == response_pair[:, None, :]) & (response_rank == 1)[:, None, :]
    partner &= valid[:, :, None]

    def chosen(numbers: Array) -> Array:
        return jnp.where(valid, numbers, 0.0)

    def rejected(numbers: Array) -> Array:
        return jnp.where(partner, numbers[:, None, :], 0.0).sum(-1)

    return MatchedPairs(jax.tree.map(chosen, responses), jax.tree.map(rejected, responses), valid)
