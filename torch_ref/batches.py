"""Builds the tensors of a rank's share of a step, in one of two forms.

**Stacked** is the concatenated forward of the original: the responses of all groups are stacked along the batch, one
sequence per line, padded to the longest.

**Rows** is the method of the paper on prefix sharing: any number of groups in one line, with a mask of one integer per
key, see `jax_simpo.data.rows`.

Both forms follow the same step plan, so a step has the same groups in either form. Every rank has the same number of
micro-batches, as the collectives of ZeRO-3 require; a share without groups is a line of padding.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from jax_simpo.data.groups import Group, GroupLengths, Response
from jax_simpo.data.loader import GroupSource, Known, prefetch
from jax_simpo.data.packing import Step, StepPlan
from jax_simpo.data.rows import build_rows
from torch_ref.comparisons import Ranking, rankings_of


@dataclass(frozen=True)
class Batch:
    """A micro-batch of one rank: B lines of L tokens, N targets, G groups with S responses in all.

    Responses are numbered group after group, and in a group from the best on.

    Attributes:
        tokens: input token ids, int64; padding 0.
        attention_mask: stacked only: 1 for tokens, 0 for padding, int64.
        positions: rows only: position of each token in its own response's sequence, int64.
        key_end: rows only: key `k` is visible to query `q` iff `k <= q < key_end[k]`, int64.
        target_line: line of the hidden state that predicts each target, int64.
        target_index: index of this hidden state in its line, int64.
        target_token: the token that is predicted, int64.
        target_response: the response that each target belongs to, int64. Targets in the prompt of group g's best
            response, if the step plan has such targets, belong to S + g.
        response_length: number of targets of each response, int64.
        groups: the number of each group in the step, int64.
        rankings: the ranks of each group's responses. They stay on the host, where comparisons are listed.
        scores: the score of each response, float32, on the host too; None without one.
        reference: the sum of log-probs of each response under the reference, float32; None without one.
        weights: the weight of each group, float32; None if groups have none.
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
    groups: Int[Tensor, " G"]
    rankings: tuple[Ranking, ...]
    scores: Float[np.ndarray, " S"] | None = None
    reference: Float[Tensor, " S"] | None = None
    weights: Float[Tensor, " G"] | None = None

    @property
    def input_tokens(self) -> int:
        """The number of tokens that are not padding."""
        mask = self.attention_mask if self.key_end is None else self.key_end
        assert mask is not None
        return int(torch.count_nonzero(mask))

    def to(self, device: torch.device) -> Batch:
        """Returns the batch on a device."""
        moved: Any = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)

    def knowing(self, known: Known) -> Batch:
        """Returns the batch with what is known of its groups and responses besides their tokens."""
        reference, weights = (None if x is None else torch.from_numpy(x) for x in (known.reference, known.weights))
        return replace(self, scores=known.scores, reference=reference, weights=weights)


NumberedGroups = Sequence[tuple[int, Group]]


def stack_groups(groups: NumberedGroups, *, prompt_targets: bool = False) -> Batch:
    """Stacks the responses of these groups along the batch, group after group, padded on the right.

    `prompt_targets` lists the tokens of the best response's prompt, but the first, as targets too.
    """
    responses = [response for _, group in groups for response in group.responses]
    tokens, mask = _pad(responses)
    return Batch(
        tokens=tokens,
        attention_mask=mask,
        positions=None,
        key_end=None,
        **_stacked_targets(groups, responses, prompt_targets),
        response_length=_int64(np.array([response.length for response in responses])),
        groups=_int64(np.array([number for number, _ in groups])),
        rankings=tuple(group.ranks for _, group in groups),
    )


def _stacked_targets(groups: NumberedGroups, responses: Sequence[Response], prompt_targets: bool) -> dict[str, Any]:
    """Returns the fields of a batch about its targets, int64 [N], for responses that have a line each."""
    # Each entry: the line, the value of `target_response`, the places of the predictors, and the tokens.
    runs = [(line, line, response.scored - 1, response.targets) for line, response in enumerate(responses)]
    if prompt_targets:
        line = 0
        for place, (_, group) in enumerate(groups):
            prompt = group.best.ids[: group.best.prompt_length]
            runs.append((line, len(responses) + place, np.arange(len(prompt) - 1), prompt[1:]))
            line += len(group.responses)
    counts = np.array([len(tokens) for *_, tokens in runs], np.int64)
    return {
        "target_line": _int64(np.repeat([run[0] for run in runs], counts)),
        "target_index": _int64(_join([run[2] for run in runs])),
        "target_token": _int64(_join([run[3] for run in runs])),
        "target_response": _int64(np.repeat([run[1] for run in runs], counts)),
    }


def _pad(responses: Sequence[Response]) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B L"]]:
    """Returns the inputs of the responses, one a line, and the mask of those that are not padding."""
    tokens = np.zeros((max(1, len(responses)), max([len(r.inputs) for r in responses], default=1)), np.int64)
    mask = np.zeros_like(tokens)
    for line, response in enumerate(responses):
        tokens[line, : len(response.inputs)] = response.inputs
        mask[line, : len(response.inputs)] = 1
    if not responses:
        mask[0, 0] = 1  # softmax needs at least one key
    return _int64(tokens), _int64(mask)


def row_batch(rows: Sequence[NumberedGroups], plan: StepPlan) -> Batch:
    """Builds a batch of rows, without the padding of targets and responses that arrays of a static shape have."""
    arrays = build_rows(rows, plan.shape, prefix_sharing=plan.prefix_sharing, prompt_targets=plan.prompt_targets)
    slots = plan.shape.responses
    filled = arrays.response_group >= 0
    is_best = filled & (arrays.response_place == 0)
    responses = int(filled.sum())
    # (row, value of `target_response`) -> response. The values are those of slots, of padding, and of slots' prompts.
    number = np.full((len(filled), 2 * slots + 1), -1)
    number[:, :slots][filled] = np.arange(responses)
    number[:, slots + 1 :][is_best] = responses + np.arange(is_best.sum())
    line, column = np.nonzero(arrays.target_response != slots)
    response = number[line, arrays.target_response[line, column]]
    groups = arrays.response_group[is_best]
    ranks = np.split(arrays.response_rank[filled], np.flatnonzero(is_best[filled])[1:])
    return Batch(
        tokens=_int64(arrays.tokens),
        attention_mask=None,
        positions=_int64(arrays.positions),
        key_end=_int64(arrays.key_end),
        target_line=_int64(line),
        target_index=_int64(arrays.target_index[line, column]),
        target_token=_int64(arrays.target_token[line, column]),
        target_response=_int64(response),
        response_length=_int64(np.bincount(response, minlength=responses)[:responses]),
        groups=_int64(groups),
        rankings=tuple(tuple(of_group.tolist()) for of_group in ranks[: len(groups)]),
    )


def _join(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *arrays])


def _int64(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, np.int64))


@dataclass(frozen=True)
class RankStep:
    """One rank's share of an optimizer step, and the denominators of the whole step.

    Attributes:
        step: the step's number, from 0.
        groups: the whole step's groups, as indices into the data, int64.
        lengths: the token counts and ranks of the whole step's groups.
        chosen_tokens: tokens of the best responses of the step's groups, and of their prompts if those are targets.
        epoch: epochs that are done after the step.
        micro_batches: this rank's micro-batches; every rank has the same number.
    """

    step: int
    groups: Int[np.ndarray, " G"]
    lengths: GroupLengths
    chosen_tokens: int
    epoch: float
    micro_batches: list[Batch]

    @property
    def rankings(self) -> list[Ranking]:
        """The ranking of each of the whole step's groups."""
        return rankings_of(self.lengths)


def build_rank_step(
    plan: StepPlan,
    source: GroupSource,
    step: int,
    rank: int,
    world: int,
    known: Known | None = None,
) -> RankStep:
    """Builds a rank's share of a step. Only the tokens of its own groups are read.

    Micro-batch m has the rows `m * size` to `(m + 1) * size` of the step plan. Each rank takes an equal part of them,
    in order.

    Args:
        plan: the step plan.
        source: the groups of the data.
        step: the step's number, from 0.
        rank: this rank.
        world: the number of ranks.
        known: what is known of all groups of the data besides their tokens.
    """
    planned = plan.step(step)
    size = plan.rows_per_micro_batch
    share = size // world
    micro_batches = []
    for m in range(planned.micro_batches):
        start = m * size + rank * share
        batch = _build(plan, source, planned, range(start, start + share))
        own = planned.groups[batch.groups.numpy()]
        micro_batches.append(batch.knowing((known or Known()).of(own, plan.lengths.responses_of(own))))
    lengths = plan.lengths.of_groups(planned.groups)
    chosen_tokens = int(lengths.best_targets(plan.prompt_targets).sum())
    return RankStep(step, planned.groups, lengths, chosen_tokens, planned.epoch, micro_batches)


def _build(plan: StepPlan, source: GroupSource, planned: Step, rows: range) -> Batch:
    """Builds the batch of some of a step's rows; rows after the last one are empty."""
    numbers = [planned.rows[r].tolist() if r < len(planned.rows) else [] for r in rows]
    flat = [g for row in numbers for g in row]
    groups = dict(zip(flat, source.groups(planned.groups[flat]), strict=True)) if flat else {}
    numbered = [[(g, groups[g]) for g in row] for row in numbers]
    if plan.prefix_sharing or plan.packing:
        return row_batch(numbered, plan)
    return stack_groups([group for row in numbered for group in row], prompt_targets=plan.prompt_targets)


def rank_steps(
    plan: StepPlan,
    source: GroupSource,
    steps: range,
    rank: int,
    world: int,
    *,
    ahead: int = 2,
    known: Known | None = None,
) -> Generator[RankStep]:
    """Yields a rank's shares of these steps in order. A thread builds up to `ahead` of them in advance."""
    return prefetch((build_rank_step(plan, source, step, rank, world, known) for step in steps), ahead)
