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

from jax_simpo.data.groups import Group, Response
from jax_simpo.data.loader import GroupSource, StepBatch
from jax_simpo.data.rows import RowBatch
from jax_simpo.data.tree import common_prefix_length
from jax_simpo.models.config import Rope
from jax_simpo.models.policy import Forward, Rows
from jax_simpo.objectives import DPO, Objective, Responses, SimPO
from jax_simpo.objectives.dpo import LengthNormalizedDPO
from jax_simpo.ops.responses import ResponseLogps
from jax_simpo.training.step import MicroBatch, Split, split_step


def _same_group(group: Group) -> Group:
    return group


def _same_rows(rows: RowBatch) -> RowBatch:
    return rows


def _same_forward(forward: Forward) -> Forward:
    return forward


@dataclass(frozen=True)
class Variant:
    """A mistake, as changes to the parts of a run. Every change defaults to none.

    Attributes:
        mistake: a description for the report.
        group: changes a tokenised group.
        rows: changes the rows that were built from the groups.
        batches: splits a step into micro-batches with their denominators.
        objective: changes the objective.
        reference: changes the reference's sums of all responses.
        reference_group: changes the tokenised groups that the reference is given.
        prompt_targets: lists the tokens of prompts as targets too.
        forward: changes the forward pass.
        changes_program: True if the variant needs functions of its own to be compiled.
        applies: returns False where the mistake makes no difference to this model, objective and first step.
    """

    mistake: str
    group: Callable[[Group], Group] = _same_group
    rows: Callable[[RowBatch], RowBatch] = _same_rows
    batches: Split = split_step
    objective: Callable[[Any], Objective] = lambda objective: objective
    reference: Callable[[np.ndarray], np.ndarray] = lambda sums: sums
    reference_group: Callable[[Group], Group] = _same_group
    prompt_targets: bool = False
    forward: Callable[[Forward], Forward] = _same_forward
    changes_program: bool = False
    applies: Callable[[Forward, Objective, StepBatch], bool] = lambda forward, objective, step: True

    @property
    def changes_forward(self) -> bool:
        return self.forward is not _same_forward

    @property
    def changes_reference_groups(self) -> bool:
        return self.reference_group is not _same_group

    @property
    def changes_groups(self) -> bool:
        return self.group is not _same_group

    def micro_batches(self, step: StepBatch, objective: Objective) -> list[MicroBatch]:
        """Splits a step into this variant's micro-batches."""
        return [batch._replace(rows=self.rows(batch.rows)) for batch in self.batches(step, objective)]


@dataclass(frozen=True)
class VariantGroups:
    """A source whose groups are each changed by a function."""

    source: GroupSource
    change: Callable[[Group], Group]

    def groups(self, indices: Int[np.ndarray, " G"]) -> list[Group]:
        return [self.change(group) for group in self.source.groups(indices)]


# --- rows


def _group_start(rows: RowBatch) -> Int[np.ndarray, "B L"]:
    """Returns the index in the row at which the group of each token begins.

    A group's positions begin at 0, once if its responses share anything.
    """
    index = np.arange(rows.tokens.shape[1])
    starts = np.where((rows.positions == 0) & (rows.key_end > 0), index, 0)
    return np.maximum.accumulate(starts, axis=1)


def _plain_causal(rows: RowBatch) -> RowBatch:
    group_end = np.take_along_axis(rows.key_end, _group_start(rows), axis=1)
    return replace(rows, key_end=np.where(rows.key_end > 0, group_end, 0).astype(np.int32))


def _positions_go_on(rows: RowBatch) -> RowBatch:
    positions = np.arange(rows.tokens.shape[1]) - _group_start(rows)
    return replace(rows, positions=np.where(rows.key_end > 0, positions, 0).astype(np.int32))


def _subtree_ends_late(rows: RowBatch) -> RowBatch:
    length = rows.key_end.shape[1]
    later = np.minimum(rows.key_end + 1, length)
    return replace(rows, key_end=np.where(rows.key_end > 0, later, 0).astype(np.int32))


def _shared_targets_once(rows: RowBatch) -> RowBatch:
    """Leaves a target that several responses of a row share to the first of them."""
    slots = rows.response_group.shape[1]
    arrays = {name: array.copy() for name, array in rows.arrays().items()}
    names = ("target_index", "target_token", "target_response")
    for b in range(len(rows.tokens)):
        real = int((rows.target_response[b] != slots).sum())
        targets = np.stack([rows.target_index[b, :real], rows.target_token[b, :real]], axis=1)
        first = np.sort(np.unique(targets, axis=0, return_index=True)[1])
        for name, empty in zip(names, (0, 0, slots), strict=True):
            kept = arrays[name][b, first]
            arrays[name][b] = empty
            arrays[name][b, : len(kept)] = kept
    return RowBatch(**arrays)


# --- groups


def _each_response(change: Callable[[Response], Response]) -> Callable[[Group], Group]:
    return lambda group: replace(group, responses=tuple(change(response) for response in group.responses))


def _double_bos(response: Response) -> Response:
    spans = tuple((start + 1, stop + 1) for start, stop in response.spans)
    return Response(np.concatenate([response.ids[:1], response.ids]), spans)


def _without_eos(response: Response) -> Response:
    *before, (start, stop) = response.spans
    if stop - start < 2:
        return response
    return Response(response.ids[:-1], (*before, (start, stop - 1)))


def _first_scored(response: Response, index: int) -> Response:
    """Takes the tokens before `index` for the prompt, but for the last token."""
    kept = [(max(start, index), stop) for start, stop in response.spans if stop > index]
    last = len(response.ids)
    return replace(response, spans=tuple(kept) or ((last - 1, last),))


def _without_first_token(response: Response) -> Response:
    return _first_scored(response, response.prompt_length + 1)


def _all_turns_scored(response: Response) -> Response:
    return replace(response, spans=((response.prompt_length, response.spans[-1][1]),))


def _shared_tokens_not_scored(group: Group) -> Group:
    first, *others = (response.inputs for response in group.responses)
    shared = min(common_prefix_length(first, other) for other in others)
    return _each_response(lambda response: _first_scored(response, shared))(group)


# --- the program


class _LengthAfterSharing(Forward):
    """Divides the sum over the whole response by the number of its tokens that are not shared."""

    def sum_responses(self, target_logps: Array, rows: Rows, prompts: bool = False) -> ResponseLogps:
        responses = super().sum_responses(target_logps, rows, prompts)
        slots = rows["response_group"].shape[1]
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


def _swap_neighbours(sums: np.ndarray) -> np.ndarray:
    """Swaps every two neighbouring responses, of pairs the chosen and the rejected one."""
    swapped, even = sums.copy(), len(sums) // 2 * 2
    swapped[:even] = sums[:even].reshape(-1, 2)[:, ::-1].reshape(-1)
    return swapped


def _with(**changes: Any) -> Callable[[Forward], Forward]:
    """Returns a function that changes fields of the model's config."""
    return lambda f: replace(f, model=replace(f.model, config=replace(f.model.config, **changes)))


def _without_windows(forward: Forward) -> Forward:
    return _with(layer_windows=(None,) * forward.model.config.num_layers)(forward)


def _mean_of_device_means(step: StepBatch, objective: Objective) -> list[MicroBatch]:
    """Takes every row as the share of one device, which divides by its own groups; then averages over the devices."""
    shares: list[tuple[MicroBatch, int]] = []
    for batch in split_step(step, objective):
        for row in range(len(batch.rows.tokens)):
            groups = int(((batch.rows.response_group[row] >= 0) & (batch.rows.response_place[row] == 0)).sum())
            if groups:
                shares.append((batch._replace(rows=_only_row(batch.rows, row)), groups))
    return [
        share._replace(denominators=share.denominators._replace(groups=jnp.float32(groups * len(shares))))
        for share, groups in shares
    ]


def _relative_weights(step: StepBatch, objective: Objective) -> list[MicroBatch]:
    """Scales the weights so that the number of groups, by which the loss is divided, is also their sum."""
    weights = step.known.weights
    if weights is None:
        return split_step(step, objective)
    relative = weights * np.float32(len(weights) / weights.sum())
    return split_step(replace(step, known=replace(step.known, weights=relative)), objective)


def _only_row(batch: RowBatch, row: int) -> RowBatch:
    """Empties all rows but one."""
    arrays = {name: array.copy() for name, array in batch.arrays().items()}
    empty = {"target_response": batch.response_group.shape[1], "response_group": -1}
    for name, array in arrays.items():
        array[np.arange(len(array)) != row] = empty.get(name, 0)
    return RowBatch(**arrays)


def _uneven(_: Forward, __: Objective, step: StepBatch) -> bool:
    counts = {int((row >= 0).sum()) for batch in step.micro_batches for row in batch.response_group}
    return len(counts - {0}) > 1


def _shares_targets(_: Forward, __: Objective, step: StepBatch) -> bool:
    """Returns True if a response token is predicted in the part that both responses share."""
    for batch in step.micro_batches:
        for index, response in zip(batch.target_index, batch.target_response, strict=True):
            real = index[response < batch.response_group.shape[1]]
            if len(np.unique(real)) < len(real):
                return True
    return False


def _has_trees(_: Forward, __: Objective, step: StepBatch) -> bool:
    return bool((step.lengths.sizes > 2).any())


def _shares_scored_targets(_: Forward, __: Objective, step: StepBatch) -> bool:
    """Returns True if responses of a row share a target, and not only the state that predicts it."""
    return any(
        not np.array_equal(rows.target_response, _shared_targets_once(rows).target_response)
        for rows in step.micro_batches
    )


def _has_turns_between(_: Forward, __: Objective, step: StepBatch) -> bool:
    """Returns True if a response has tokens after its prompt that are not scored."""
    lengths = step.lengths
    return bool((lengths.prompts + lengths.targets < lengths.inputs + 1).any())


def _has_margin(_: Forward, objective: Objective, __: StepBatch) -> bool:
    return isinstance(objective, SimPO) and objective.gamma_beta_ratio > 0 and objective.beta != 1.0


def _has_reference(_: Forward, objective: Objective, __: StepBatch) -> bool:
    return objective.needs_reference


def _is(kind: type[Objective]) -> Callable[[Forward, Objective, StepBatch], bool]:
    return lambda _, objective, __: isinstance(objective, kind)


def _has_sft_term(_: Forward, objective: Objective, __: StepBatch) -> bool:
    return bool(objective.sft_weight) and not objective.reads_prompts


def _has_uneven_weights(_: Forward, __: Objective, step: StepBatch) -> bool:
    """Returns True if the groups have weights whose sum is not the number of groups."""
    weights = step.known.weights
    return weights is not None and float(weights.sum()) not in (0.0, float(len(weights)))


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
        group=_shared_tokens_not_scored,
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
    "double BOS": Variant("the sequence begins with BOS twice", group=_each_response(_double_bos)),
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
        "the response's last token is neither seen nor predicted", group=_each_response(_without_eos)
    ),
    "first token not scored": Variant(
        "the response's first token is taken for the prompt", group=_each_response(_without_first_token)
    ),
    "reference and policy swapped": Variant(
        "the log-ratio is that of the reference to the policy",
        objective=lambda o: _Swapped(**vars(o)),
        changes_program=True,
        applies=_is(DPO),
    ),
    "reference sums of chosen and rejected swapped": Variant(
        "each response is compared with the reference's log-prob of the other",
        reference=_swap_neighbours,
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
        reference_group=_each_response(_double_bos),
        applies=_has_reference,
    ),
    "cross-entropy over prompts too": Variant(
        "the supervised term takes the tokens of prompts in",
        objective=lambda o: replace(o, sft_over="prompt_and_response"),
        prompt_targets=True,
        changes_program=True,
        applies=_has_sft_term,
    ),
    "subtree ends a token late": Variant(
        "the first token of a branch sees the branch before it", rows=_subtree_ends_late, applies=_has_trees
    ),
    "positions count the row": Variant(
        "positions go on through the branches of a tree", rows=_positions_go_on, applies=_has_trees
    ),
    "shared target scored once": Variant(
        "a token that several responses share is scored for one of them only",
        rows=_shared_targets_once,
        applies=_shares_scored_targets,
    ),
    "turns of users scored": Variant(
        "everything after the prompt is scored, the turns of users too",
        group=_each_response(_all_turns_scored),
        applies=_has_turns_between,
    ),
}
