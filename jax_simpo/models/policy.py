"""The policy: the rows of a batch in, the sum of log-probs and the length of every response out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Array, Int

from jax_simpo.models.transformer import Model, Params
from jax_simpo.ops.attention import prepare_mask
from jax_simpo.ops.logprobs import target_logps
from jax_simpo.ops.responses import ResponseLogps, sum_responses

Rows = Mapping[str, Int[Array, "B _"]]  # the arrays of a RowBatch by name


@dataclass(frozen=True)
class Forward:
    """How log-probs are computed: the model, and the settings that change no number beyond rounding."""

    model: Model
    attention: str
    logprob_chunk: int | Literal["auto"] = "auto"
    logits_bytes: int = 0  # memory of a device that training may spend on keeping a micro-batch's logits

    def response_logps(self, params: Params, rows: Rows) -> ResponseLogps:
        """Sum of log-probs and length of every response slot, float32 [B, R]."""
        slots = rows["response_pair"].shape[1]
        mask = prepare_mask(
            rows["key_end"], rows["positions"], self.model.config.windows, self.attention, sequences=slots
        )
        hidden = self.model.hidden_states(params, rows["tokens"], rows["positions"], mask)
        logps = target_logps(
            hidden,
            self.model.head(params),
            rows["target_index"],
            rows["target_token"],
            counts=(rows["target_response"] < slots).sum(1),
            softcap=self.model.config.logit_softcap,
            chunk=None if self.logprob_chunk == "auto" else self.logprob_chunk,
            keep_bytes=self.logits_bytes,
            frozen=self.model.lora is not None,
        )
        return sum_responses(logps, rows["target_response"], slots)
