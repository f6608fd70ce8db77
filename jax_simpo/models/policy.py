"""The policy: takes the rows of a batch and returns the log-probs of their targets, or sums of them per response."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from jaxtyping import Array, Float

from jax_simpo.models.transformer import Model, Params
from jax_simpo.ops import logprobs
from jax_simpo.ops.attention import Room, prepare_mask
from jax_simpo.ops.responses import ResponseLogps, sum_responses

Rows = Mapping[str, Array]  # the arrays of a RowBatch by name, int32 [B, L], [B, T] or [B, R]


@dataclass(frozen=True)
class Forward:
    """Computes log-probs with a model. Its other settings change no number beyond rounding.

    Attributes:
        model: the decoder.
        attention: the name of the attention backend.
        logprob_chunk: most hidden states of a tile of logits; `auto` takes what is fastest on the device.
        logits_bytes: memory of a device, in bytes, that training may spend on keeping a micro-batch's logits.
        longest: most input tokens of a response, where known; `None` stands for the row's length.
        span: most tokens of a row from one to another that sees it, both counted, where known. Attention takes static
            sizes from both numbers, and gives NaN for rows that go beyond.
        loss_head: the name of the loss head's backend.
    """

    model: Model
    attention: str
    logprob_chunk: int | Literal["auto"] = "auto"
    logits_bytes: int = 0
    longest: int | None = None
    span: int | None = None
    loss_head: str = "xla"

    def up_to(self, longest: int, span: int) -> Forward:
        """Returns the forward pass of the rows of a step plan, given its `longest` and `span`."""
        return replace(self, longest=longest, span=span)

    def response_logps(self, params: Params, rows: Rows, prompts: bool = False) -> ResponseLogps:
        """Returns the sum of log-probs and the length of every response slot, float32 [B, R]; of prompts if asked."""
        return self.sum_responses(self.target_logps(params, rows), rows, prompts)

    def sum_responses(self, target_logps: Float[Array, "B T"], rows: Rows, prompts: bool = False) -> ResponseLogps:
        """Adds the log-probs of the targets up to those of their responses, and of their prompts if asked."""
        return sum_responses(target_logps, rows["target_response"], rows["response_group"].shape[1], prompts)

    def target_logps(self, params: Params, rows: Rows) -> Float[Array, "B T"]:
        """Returns the log-prob of every target, float32; padding targets get 0."""
        slots = rows["response_group"].shape[1]
        length = rows["tokens"].shape[1]
        room = Room(slots, self.longest or length, self.span or length)
        mask = prepare_mask(rows["key_end"], rows["positions"], self.model.config.windows, self.attention, room=room)
        hidden = self.model.hidden_states(params, rows["tokens"], rows["positions"], mask)
        return logprobs.target_logps(
            hidden,
            self.model.head(params),
            rows["target_index"],
            rows["target_token"],
            counts=(rows["target_response"] != slots).sum(1),
            softcap=self.model.config.logit_softcap,
            chunk=None if self.logprob_chunk == "auto" else self.logprob_chunk,
            keep_bytes=self.logits_bytes,
            frozen=self.model.lora is not None,
            backend=self.loss_head,
        )
