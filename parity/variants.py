"""Wrong variants of the JAX side, each a mistake that implementations of SimPO or of prefix sharing have made.

A variant gives the program other rows, another objective, another forward pass or other denominators; the program
itself is not changed. Each variant must break a bound: one that passes is a defect of the check.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jax_simpo.data.loader import PairSource, StepBatch
from jax_simpo.data.pairs import Response, TokenizedPair, common_prefix_length
from jax_simpo.data.rows import RowBatch
from jax_simpo.models.config import Rope
from jax_simpo.models.policy import Forward, Rows
from jax_simpo.objectives import DPO, Objective, Responses, SimPO
from jax_simpo.objectives.dpo import LengthNormalizedDPO
from jax_simpo.ops.responses import ResponseLogps
from jax_simpo.training.step import MicroBatch, split_step


def _same_pair(pair: TokenizedPair) -> TokenizedPair:
    return pair


def _same_rows(rows: RowBatch) -> RowBatch:
    return rows


def _same_forward(forward: Forward) -> Forward:
    return forward


@dataclass(frozen=True)
class Variant:
    """A mistake, as changes to the parts of a run. Every change defaults to none.

    Attributes:
        mistake: a description for the report.
        pair: changes a tokenised pair.
        rows: changes the rows that were built from the pairs.
        batches: splits a step into micro-batches with their denominators.
        objective: changes the objective.
        reference: changes the reference's sums of all pairs, chosen and rejected.
        reference_pair: changes the tokenised pairs that the reference is given.
        prompt_targets: lists the tokens of prompts as targets too.
        forward: changes the forward pass.
        changes_program: True if the variant needs functions of its own to be compiled.
        applies: returns False where the mistake makes no difference to this model, objective and first step.
    """

    mistake: str
    pair: Callable[[TokenizedPair], TokenizedPair] = _same_pair
    rows: Callable[[RowBatch], RowBatch] = _same_rows
    batches: Callable[[StepBatch], list[MicroBatch]] = split_step
    objective: Callable[[Any], Objective] = lambda objective: objective
    reference: Callable[[np.ndarray], np.ndarray] = lambda sums: sums
    reference_pair: Callable[[TokenizedPair], TokenizedPair] = _same_pair
    prompt_targets: bool = False
    forward: Callable[[Forward], Forward] = _same_forward
    changes_program: bool = False
    applies: Callable[[Forward, Objective, StepBatch], bool] = lambda forward, objective, step: True

    @property
    def changes_forward(self) -> bool:
        return self.forward is not _same_forward

    @property
    def changes_reference_pairs(self) -> bool:
        return self.reference_pair is not _same_pair

    @property
    def changes_pairs(self) -> bool:
        return self.pair is not _same_pair

    def micro_batches(self, step: StepBatch) -> list[MicroBatch]:
        """Splits a step into this variant's micro-batches."""
        return [batch._replace(rows=self.rows(batch.rows)) for batch in self.batches(step)]


@dataclass(frozen=True)
class VariantPairs:
    """A source whose pairs are each changed by a function."""

    source: PairSource
    change: Callable[[TokenizedPair], TokenizedPair]

    def pairs(self, indices: Int[np.ndarray, " P"]) -> list[TokenizedPair]:
        return [self.change(pair) for pair in self.source.pairs(indices)]


# --- rows


def _pair_start(rows: RowBatch) -> Int[np.ndarray, "B L"]:
    """Returns the index in the row at which the pair of each token begins.

    A pair's positions begin at 0, once if its responses share anything.
    """
    index = np.arange(rows.tokens.shape[1])
    starts = np.where((rows.positions == 0) & (rows.key_end > 0), index, 0)
    return np.maximum.accumulate(starts, axis=1)


def _plain_causal(rows: RowBatch) -> RowBatch:
    pair_end = np.take_along_axis(rows.key_end, _pair_start(rows), axis=1)
    return replace(rows, key_end=np.where(rows.key_end > 0, pair_end, 0).astype(np.int32))


def _positions_go_on(rows: RowBatch) -> RowBatch:
    positions = np.arange(rows.tokens.shape[1]) - _pair_start(rows)
    return replace(rows, positions=np.where(rows.key_end > 0, positions, 0).astype(np.int32))


# --- pairs


def _each_response(change: Callable[[Response], Response]) -> Callable[[TokenizedPair], TokenizedPair]:
    return lambda pair: TokenizedPair(tuple(change(response) for response in pair.responses))


def _double_bos(response: Response) -> Response:
    return Response(np.concatenate([response.ids[:1], response.ids]), response.prompt_length + 1)


def _without_eos(response: Response) -> Response:
    return replace(response, ids=response.ids[:-1]) if len(response.targets) > 1 else response


def _without_first_token(response: Response) -> Response:
    return replace(response, prompt_length=response.prompt_length + 1) if len(response.targets) > 1 else response


def _shared_tokens_not_scored(pair: TokenizedPair) -> TokenizedPair:
    shared = common_prefix_length(pair.chosen.inputs, pair.rejected.inputs)
    change = lambda r: replace(r, prompt_length=min(max(r.prompt_length, shared), len(r.ids) - 1))  # noqa: E731
    return _each_response(change)(pair)


# --- the program


class _LengthAfterSharing(Forward):
    """Divides the sum over the whole response by the number of its tokens that are not shared."""

    def sum_responses(self, target_logps: Array, rows: Rows, prompts: bool = False) -> ResponseLogps:
        responses = super().sum_responses(target_logps, rows, prompts)
        slots = rows["response_pair"].shape[1]
        index, response = rows["target_index"], rows["target_response"]
        other = (index[:, :, None] == index[:, None, :]) & (response[:, :, None] != response[:, None, :])
        shared = (other & (response < slots)[:, None, :]).any(-1)
        count = (shared[..., None] & (response[..., None] == jnp.arange(slots))).sum(1)
        return responses._replace(length=jnp.maximum(responses.length - count, 1.0))


@dataclass(frozen=True, kw_only=True)
class _Swapped(DPO):
    """DPO whose reference is the model that is trained, and the reverse."""

    def losses(self, chosen: Responses, rejected: Responses) -> Array:
        swapped = (r._replace(sum=r.reference_sum, reference_sum=r.sum) for r in (chosen, rejected))
        return super().losses(*swapped)


def _with(**changes: Any) -> Callable[[Forward], Forward]:
    """Returns a function that changes fields of the model's config."""
    return lambda f: replace(f, model=replace(f.model, config=replace(f.model.config, **changes)))


def _without_windows(forward: Forward) -> Forward:
    return _with(layer_windows=(None,) * forward.model.config.num_layers)(forward)


def _mean_of_device_means(step: StepBatch) -> list[MicroBatch]:
    """Takes every row as the share of one device, which divides by its own pairs; then averages over the devices."""
    shares: list[tuple[MicroBatch, int]] = []
    for batch in split_step(step):
        for row in range(len(batch.rows.tokens)):
            pairs = int(((batch.rows.response_pair[row] >= 0) & (batch.rows.response_rank[row] == 0)).sum())
            if pairs:
                shares.append((batch._replace(rows=_only_row(batch.rows, row)), pairs))
    return [
        share._replace(denominators=share.denominators._replace(pairs=jnp.float32(pairs * len(shares))))
        for share, pairs in shares
    ]


def _relative_weights(step: StepBatch) -> list[MicroBatch]:
    """Scales the weights so that the number of pairs, by which the loss is divided, is also their sum."""
    if step.weights is None:
        return split_step(step)
    relative = step.weights * np.float32(len(step.weights) / step.weights.sum())
    return split_step(replace(step, weights=relative))


def _only_row(batch: RowBatch, row: int) -> RowBatch:
    """Empties all rows but one."""
    arrays = {name: array.copy() for name, array in batch.arrays().items()}
    empty = {"target_response": batch.response_pair.shape[1], "response_pair": -1}
    for name, array in arrays.items():
        array[np.arange(len(array)) != row] = empty.get(name, 0)
    return RowBatch(**arrays)


def _uneven(_: Forward, __: Objective, step: StepBatch) -> bool:
    counts = {int((row >= 0).sum()) for batch in step.micro_batches for row in batch.response_pair}
    return len(counts - {0}) > 1


def _shares_targets(_: Forward, __: Objective, step: StepBatch) -> bool:
    """Returns True if a response token is predicted in the part that both responses share."""
    for batch in step.micro_batches:
        for index, response in zip(batch.target_index, batch.target_response, strict=True):
            real = index[response < batch.response_pair.shape[1]]
            if len(np.unique(real)) < len(real):
                return True
    return False


def _has_margin(_: Forward, objective: Objective, __: StepBatch) -> bool:
    return isinstance(objective, SimPO) and objective.gamma_beta_ratio > 0 and objective.beta != 1.0


def _has_reference(_: Forward, objective: Objective, __: StepBatch) -> bool:
    return objective.needs_reference


def _is(kind: type[Objective]) -> Callable[[Forward, Objective, StepBatch], bool]:
    return lambda _, objective, __: isinstance(objective, kind)


def _has_sft_term(_: Forward, objective: Objective, __: StepBatch) -> bool:
    return bool(objective.sft_weight) and not objective.reads_prompts


def _has_uneven_weights(_: Forward, __: Objective, step: StepBatch) -> bool:
    """Returns True if the pairs have weights whose sum is not the number of pairs."""
    return step.weights is not None and float(step.weights.sum()) not in (0.0, float(len(step.pairs)))


def _scales_rope(forward: Forward, _: Objective, __: StepBatch) -> bool:
    return forward.model.config.rope.scaling is not None


def _leaves_windows(forward: Forward, _: Objective, step: StepBatch) -> bool:
    """Returns True if a sequence is longer than a window."""
    longest = max(int(batch.positions.max()) for batch in step.micro_batches) + 1
    return any(window is not None and window < longest for window in forward.model.config.windows)


RIGHT = Variant("as the program is")

VARIANTS = {
    "plain causal mask": Variant("rejected tokens see the chosen response before them", rows=_plain_causal),
    "positions not restarted": Variant(
        "the rejected branch goes on counting where the chosen one ended", rows=_positions_go_on
    ),
    "length from the end of sharing": Variant(
        "the sum over the whole response is divided by its tokens that are not shared",
        forward=lambda f: _LengthAfterSharing(**vars(f)),
        changes_program=True,
        applies=_shares_targets,
    ),
    "shared tokens not scored": Variant(
        "response tokens that both responses begin with are taken for the prompt",
        pair=_shared_tokens_not_scored,
        applies=_shares_targets,
    ),
    "gamma times beta twice": Variant(
        "the target margin is beta * gamma inside beta",
        objective=lambda o: replace(o, gamma_beta_ratio=o.beta * o.gamma_beta_ratio),
        changes_program=True,
        applies=_has_margin,
    ),
    "mean of device means": Variant(
        "devices with different numbers of pairs count the same", batches=_mean_of_device_means, applies=_uneven
    ),
    "weights divided by their sum": Variant(
        "the loss is divided by the sum of the weights instead of the number of pairs",
        batches=_relative_weights,
        applies=_has_uneven_weights,
    ),
    "double BOS": Variant("the sequence begins with BOS twice", pair=_each_response(_double_bos)),
    "RoPE scaling dropped": Variant(
        "llama3's three bands of frequencies are ignored",
        forward=lambda f: _with(rope=Rope(theta=f.model.config.rope.theta))(f),
        changes_program=True,
        applies=_scales_rope,
    ),
    "Gemma norm without the one": Variant(
        "norms multiply by w instead of 1 + w",
        forward=_with(norm_offset=False),
        changes_program=True,
        applies=lambda forward, *_: forward.model.config.norm_offset,
    ),
    "sliding window dropped": Variant(
        "attention sees everything before it, however far",
        forward=_without_windows,
        changes_program=True,
        applies=_leaves_windows,
    ),
    "EOS missing": Variant(
        "the response's last token is neither seen nor predicted", pair=_each_response(_without_eos)
    ),
    "first token not scored": Variant(
        "the response's first token is taken for the prompt", pair=_each_response(_without_first_token)
    ),
    "reference and policy swapped": Variant(
        "the log-ratio is that of the reference to the policy",
        objective=lambda o: _Swapped(**vars(o)),
        changes_program=True,
        applies=_is(DPO),
    ),
    "reference sums of chosen and rejected swapped": Variant(
        "each response is compared with the reference's log-prob of the other",
        reference=lambda sums: sums[:, ::-1],
        applies=_has_reference,
    ),
    "means where sums belong": Variant(
        "DPO divides log-ratios by the number of tokens",
        objective=lambda o: LengthNormalizedDPO(beta=o.beta, sft_weight=o.sft_weight),
        changes_program=True,
        applies=_is(DPO),
    ),
    "sums where means belong": Variant(
        "length-normalised DPO does not divide log-ratios",
        objective=lambda o: DPO(beta=o.beta, sft_weight=o.sft_weight),
        changes_program=True,
        applies=_is(LengthNormalizedDPO),
    ),
    "reference with another template": Variant(
        "the reference is given prompts with a token more",
        reference_pair=_each_response(_double_bos),
        applies=_has_reference,
    ),
    "cross-entropy over prompts too": Variant(
        "the supervised term takes the tokens of prompts in",
        objective=lambda o: replace(o, sft_over="prompt_and_response"),
        prompt_targets=True,
        changes_program=True,
        applies=_has_sft_term,
    ),
}
