"""Adds the log-probs of single targets up to those of responses."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


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
