"""Builds the tensors of a rank's share of a step, in one of two forms.

**Stacked** is the concatenated forward of the original: chosen and rejected responses are stacked along the batch, one
sequence per line, padded to the longest.

**Rows** is the method of the paper on prefix sharing: any number of pairs in one line, with a mask of one integer per
key, see `jax_simpo.data.rows`.

Both forms follow the same step plan, so a step has the same pairs in either form. Every rank has the same number of
micro-batches, as the collectives of ZeRO-3 require; a share without pairs is a line of padding.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from jax_simpo.data.loader import PairSource, prefetch
from jax_simpo.data.packing import Step, StepPlan
from jax_simpo.data.pairs import TokenizedPair
from jax_simpo.data.rows import build_rows


@dataclass(frozen=True)
class Batch:
    """A micro-batch of one rank: B lines of L tokens, N targets, S responses, P pairs.

    Attributes:
        tokens: input token ids; padding 0.
        attention_mask: stacked only: 1 for tokens, 0 for padding.
        positions: rows only: position of each token in its own response's sequence.
        key_end: rows only: key `k` is visible to query `q` iff `k <= q < key_end[k]`.
        target_line: line of the hidden state that predicts each target.
        target_index: index of this hidden state in its line.
        target_token: the token that is predicted.
        target_response: the response that each target belongs to. Targets in the prompt of pair p's chosen response,
            if the step plan has such targets, belong to S + p.
        response_length: number of targets of each response.
        chosen: the chosen response of each pair.
        rejected: the rejected response of each pair.
        pairs: the number of each pair in the step.
        reference: sums of log-probs of each pair's chosen and rejected response under the reference; None without one.
        weights: the weight of each pair; None if pairs have none.
    """

    tokens: Int[Tensor, "B L"]
    attention_mask: Int[Tensor, "B L"] | None
    positions: Int[Tensor, "B L"] | None
    key_end: Int[Tensor, "B L"] | None
    target_line: Int[Tensor, " N"]
    target_index: Int[Tensor, " N"]
    target_token: Int[Tensor, " N"]
    target_response: Int[Tensor, " N"]
    response_length: Int[Tensor, " S"]
    chosen: Int[Tensor, " P"]
    rejected: Int[Tensor, " P"]
    pairs: Int[Tensor, " P"]
    reference: Float[Tensor, "P 2"] | None = None
    weights: Float[Tensor, " P"] | None = None

    @property
    def input_tokens(self) -> int:
        """The number of tokens that are not padding."""
        mask = self.attention_mask if self.key_end is None else self.key_end
        assert mask is not None
        return int(torch.count_nonzero(mask))

    def to(self, device: torch.device) -> Batch:
        """Returns the batch on a device."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: t.to(device) for name, t in tensors.items() if t is not None})


NumberedPairs = Sequence[tuple[int, TokenizedPair]]


def stack_pairs(pairs: NumberedPairs, *, prompt_targets: bool = False) -> Batch:
    """Stacks the responses of these pairs along the batch: first all chosen, then all rejected, padded on the right.

    `prompt_targets` lists the tokens of the chosen response's prompt, but the first, as targets too.
    """
    count = len(pairs)
    responses = [p.chosen for _, p in pairs] + [p.rejected for _, p in pairs]
    length = max([len(r.inputs) for r in responses], default=1)
    tokens = np.zeros((max(1, 2 * count), length), np.int64)
    mask = np.zeros_like(tokens)
    for line, response in enumerate(responses):
        tokens[line, : len(response.inputs)] = response.inputs
        mask[line, : len(response.inputs)] = 1
    if not responses:
        mask[0, 0] = 1  # softmax needs at least one key
    lengths = np.array([len(r.targets) for r in responses], np.int64)
    line_of_target = [np.repeat(np.arange(2 * count), lengths)]
    number = [*line_of_target]  # of the response, or of the prompt
    index = [np.arange(r.prompt_length - 1, len(r.inputs)) for r in responses]
    token = [r.targets for r in responses]
    if prompt_targets:
        prompts = [r.ids[: r.prompt_length] for r in responses[:count]]
        lines_of_prompts = np.repeat(np.arange(count), np.array([len(prompt) - 1 for prompt in prompts], np.int64))
        line_of_target.append(lines_of_prompts)
        number.append(2 * count + lines_of_prompts)
        index += [np.arange(len(prompt) - 1) for prompt in prompts]
        token += [prompt[1:] for prompt in prompts]
    return _batch(
        tokens=tokens,
        attention_mask=mask,
        target_line=_join(line_of_target),
        target_index=_join(index),
        target_token=_join(token),
        target_response=_join(number),
        response_length=lengths,
        chosen=np.arange(count),
        rejected=np.arange(count, 2 * count),
        pairs=np.array([number for number, _ in pairs], np.int64),
    )


def row_batch(rows: Sequence[NumberedPairs], plan: StepPlan) -> Batch:
    """Builds a batch of rows, without the padding of targets and responses that arrays of a static shape have."""
    arrays = build_rows(rows, plan.shape, prefix_sharing=plan.prefix_sharing, prompt_targets=plan.prompt_targets)
    slots = plan.shape.responses
    filled = arrays.response_pair >= 0
    is_chosen = filled & (arrays.response_rank == 0)
    # (row, value of `target_response`) -> response. The values are those of slots, of padding, and of slots' prompts.
    number = np.full((len(filled), 2 * slots + 1), -1)
    number[:, :slots][filled] = np.arange(filled.sum())
    number[:, slots + 1 :][is_chosen] = filled.sum() + np.arange(is_chosen.sum())
    line, column = np.nonzero(arrays.target_response != slots)
    response = number[line, arrays.target_response[line, column]]
    pair, rank = arrays.response_pair[filled], arrays.response_rank[filled]
    chosen = np.flatnonzero(rank == 0)
    rejected_of = dict(zip(pair[rank == 1].tolist(), np.flatnonzero(rank == 1).tolist(), strict=True))
    return _batch(
        tokens=arrays.tokens,
        positions=arrays.positions,
        key_end=arrays.key_end,
        target_line=line,
        target_index=arrays.target_index[line, column],
        target_token=arrays.target_token[line, column],
        target_response=response,
        response_length=np.bincount(response, minlength=int(filled.sum()))[: filled.sum()],
        chosen=chosen,
        rejected=np.array([rejected_of[p] for p in pair[chosen].tolist()], np.int64),
        pairs=pair[chosen],
    )


def _join(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *arrays])


def _batch(**arrays: Any) -> Batch:
    names = {f.name for f in fields(Batch)}
    tensors = {name: torch.from_numpy(np.ascontiguousarray(a, np.int64)) for name, a in arrays.items()}
    return Batch(**{name: tensors.get(name) for name in names})  # type: ignore[arg-type]


@dataclass(frozen=True)
class RankStep:
    """One rank's share of an optimizer step, and the denominators of the whole step.

    Attributes:
        step: the step's number, from 0.
        pairs: the whole step's pairs, as indices into the data.
        chosen_tokens: tokens of all chosen responses of the step, and of their prompts if those are targets.
        epoch: epochs that are done after the step.
        micro_batches: this rank's micro-batches; every rank has the same number.
    """

    step: int
    pairs: Int[np.ndarray, " P"]
    chosen_tokens: int
    epoch: float
    micro_batches: list[Batch]


def build_rank_step(
    plan: StepPlan,
    source: PairSource,
    step: int,
    rank: int,
    world: int,
    reference: Float[np.ndarray, "N 2"] | None = None,
    weights: Float[np.ndarray, " N"] | None = None,
) -> RankStep:
    """Builds a rank's share of a step. Only the tokens of its own pairs are read.

    Micro-batch m has the rows `m * size` to `(m + 1) * size` of the step plan. Each rank takes an equal part of them,
    in order.

    Args:
        plan: the step plan.
        source: the pairs of the data.
        step: the step's number, from 0.
        rank: this rank.
        world: the number of ranks.
        reference: the sums of all pairs of the data under the reference, chosen and rejected; None without one.
        weights: the weights of all pairs of the data; None if they have none.
    """
    planned = plan.step(step)
    size = plan.rows_per_micro_batch
    share = size // world
    micro_batches = []
    for m in range(planned.micro_batches):
        start = m * size + rank * share
        batch = _build(plan, source, planned, range(start, start + share))
        own = planned.pairs[batch.pairs.numpy()]
        of_pairs = {"reference": reference, "weights": weights}
        known = {name: torch.from_numpy(values[own]) for name, values in of_pairs.items() if values is not None}
        micro_batches.append(replace(batch, **known))
    lengths = plan.lengths.of_pairs(planned.pairs)
    chosen_tokens = int((lengths.chosen_inputs if plan.prompt_targets else lengths.chosen_targets).sum())
    return RankStep(step, planned.pairs, chosen_tokens, planned.epoch, micro_batches)


def _build(plan: StepPlan, source: PairSource, planned: Step, rows: range) -> Batch:
    """Builds the batch of some of a step's rows; rows after the last one are empty."""
    numbers = [planned.rows[r].tolist() if r < len(planned.rows) else [] for r in rows]
    flat = [p for row in numbers for p in row]
    pairs = dict(zip(flat, source.pairs(planned.pairs[flat]), strict=True)) if flat else {}
    numbered = [[(p, pairs[p]) for p in row] for row in numbers]
    if plan.prefix_sharing or plan.packing:
        return row_batch(numbered, plan)
    return stack_pairs([pair for row in numbered for pair in row], prompt_targets=plan.prompt_targets)


def rank_steps(
    plan: StepPlan,
    source: PairSource,
    steps: range,
    rank: int,
    world: int,
    *,
    ahead: int = 2,
    reference: Float[np.ndarray, "N 2"] | None = None,
    weights: Float[np.ndarray, " N"] | None = None,
) -> Generator[RankStep]:
    """Yields a rank's shares of these steps in order. A thread builds up to `ahead` of them in advance."""
    built = (build_rank_step(plan, source, step, rank, world, reference, weights) for step in steps)
    return prefetch(built, ahead)
