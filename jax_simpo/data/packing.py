"""Makes the step plan: which groups step k consumes, and in which rows they sit.

A step always consumes the same `global_batch_size` groups in the same order, packed or not, shared or not, on any mesh:
packing decides only in which rows they sit. The groups and rows of step k are a pure function of the groups' lengths,
the seed and k. So there is no iterator state to save, and every process derives the same plan by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from jaxtyping import Int

from jax_simpo.data.groups import GroupLengths
from jax_simpo.data.rows import RowShape
from jax_simpo.errors import DataError

ROW_MULTIPLE = 128  # divides row lengths and target counts, to fill the blocks of attention kernels and matmuls
_SAMPLED_GROUPS = 4096  # groups whose steps are simulated to choose a row shape: at least 4 steps, at most 24
_CANDIDATES = 40  # row lengths tried for `row_length: auto`
_GOOD_ENOUGH = 1.005  # the shortest length within half a per cent of the lowest cost wins: it needs the least memory
# The fixed cost of a row in a micro-batch, in tokens. Its gradient is written and added to the step's, which moves some
# 16 bytes per parameter; a token takes 6 operations per parameter. A device does about 100 operations in the time it
# moves a byte (GPUs, TPUs, and CPUs with the large heads of small models), which gives 16 / 6 * 100.
MICRO_BATCH_TOKENS = 256


def pack(
    tokens: Int[np.ndarray, " G"], targets: Int[np.ndarray, " G"], responses: Int[np.ndarray, " G"], shape: RowShape
) -> list[Int[np.ndarray, " _"]]:
    """Packs groups into few rows, and returns per row the positions of its groups in `tokens`.

    Takes the better result of `first_fit_decreasing` and `fill_rows`. Every group must fit an empty row.

    Args:
        tokens: tokens of each group.
        targets: targets of each group.
        responses: responses of each group.
        shape: the capacities of a row.
    """
    rows = first_fit_decreasing(tokens, targets, responses, shape)
    if len(rows) * shape.length - tokens.sum() < shape.length:  # no packing has fewer rows
        return rows
    filled = fill_rows(tokens, shape.length)
    fits = all(targets[row].sum() <= shape.targets and responses[row].sum() <= shape.responses for row in filled)
    return filled if fits and len(filled) < len(rows) else rows


def first_fit_decreasing(
    tokens: Int[np.ndarray, " G"], targets: Int[np.ndarray, " G"], responses: Int[np.ndarray, " G"], shape: RowShape
) -> list[Int[np.ndarray, " _"]]:
    """Puts each group, the longest first, into the first row with room for its tokens, targets and responses."""
    order = np.argsort(-tokens, kind="stable")
    room = np.empty((len(tokens), 3), np.int64)
    rows: list[list[int]] = []
    for p in order:
        need = (tokens[p], targets[p], responses[p])
        fits = (room[: len(rows)] >= need).all(1)
        first = int(fits.argmax()) if fits.any() else len(rows)
        if first == len(rows):
            rows.append([])
            room[first] = (shape.length, shape.targets, shape.responses)
        room[first] -= need
        rows[first].append(int(p))
    return [np.array(row) for row in rows]


def fill_rows(tokens: Int[np.ndarray, " G"], length: int) -> list[Int[np.ndarray, " _"]]:
    """Fills one row after the other: first the longest group left, then the groups that best fill the rest of the row.

    To find these groups is a subset-sum problem. One integer holds the sums that the groups can make: bit n is set if n
    tokens can be filled, and a group of t tokens adds the sums shifted by t. (Gupta and Ho, "A new heuristic algorithm
    for the one-dimensional bin-packing problem", 1999, fill bins in this way.)
    """
    left = [(int(tokens[p]), int(p)) for p in np.argsort(-tokens, kind="stable")]
    rows = []
    while left:
        size, first = left.pop(0)
        room = length - size
        sums, within = [1], (1 << (room + 1)) - 1
        for size, _ in left:
            sums.append((sums[-1] | sums[-1] << size) & within)
            if sums[-1] >> room:
                break
        row, rest = [first], sums[-1].bit_length() - 1
        for k in range(len(sums) - 2, -1, -1):
            if not sums[k] >> rest & 1:  # this sum needs the group
                size, p = left.pop(k)
                row.append(p)
                rest -= size
        rows.append(np.array(row))
    return rows


@dataclass(frozen=True)
class Step:
    """The groups of one optimizer step (indices into the data), and per row the positions of its groups in `groups`."""

    groups: Int[np.ndarray, " G"]
    rows: list[Int[np.ndarray, " _"]]
    micro_batches: int
    epoch: float  # epochs done after this step


@dataclass(frozen=True)
class StepPlan:
    """Maps a step number to its groups and rows.

    Attributes:
        lengths: the token counts of all groups of the split.
        shape: the static shape of a row.
        global_batch_size: groups per step. The last step of an epoch takes the groups that are left.
        rows_per_micro_batch: rows of a micro-batch over all devices; empty rows fill the last one.
        prefix_sharing: True lays out the common prefixes of a group's responses once.
        packing: True lets a row hold several groups.
        seed: shuffles the groups, anew in each epoch; None keeps file order.
        prompt_targets: True if the tokens of prompts are targets too, once a group.
    """

    lengths: GroupLengths
    shape: RowShape
    global_batch_size: int
    rows_per_micro_batch: int
    prefix_sharing: bool = True
    packing: bool = True
    seed: int | None = None
    prompt_targets: bool = False

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps that visit every group once."""
        return -(-len(self.lengths) // self.global_batch_size)

    @property
    def longest(self) -> int:
        """Most input tokens of a response, rounded up as row lengths are, so that few programs are compiled."""
        return _round_up(int(self.lengths.inputs.max()))

    @property
    def span(self) -> int:
        """Most tokens of a row from one to another that sees it, both counted, rounded up like `longest`."""
        return _round_up(int(self.lengths.tree_tokens.max())) if self.prefix_sharing else self.longest

    def groups(self, step: int) -> Int[np.ndarray, " G"]:
        """Returns the groups of a step in their order, as indices into the data."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        order = _epoch_order(len(self.lengths), self.seed, epoch)
        return order[step_in_epoch * self.global_batch_size : (step_in_epoch + 1) * self.global_batch_size]

    def step(self, step: int) -> Step:
        """Packs the groups of a step into rows."""
        groups = self.groups(step)
        if self.packing:
            lengths = self.lengths.of_groups(groups)
            tokens, targets = lengths.row_tokens(self.prefix_sharing), lengths.row_targets(self.prompt_targets)
            rows = pack(tokens, targets, lengths.sizes, self.shape)
        else:
            rows = list(np.arange(len(groups))[:, None])
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        epochs_done = epoch + min(1.0, (step_in_epoch + 1) * self.global_batch_size / len(self.lengths))
        return Step(groups, rows, -(-len(rows) // self.rows_per_micro_batch), epochs_done)

    def check(self, origin: Callable[[int], tuple[str, int]] | None = None) -> None:
        """Checks, before anything is computed, that every group fits a row.

        Args:
            origin: returns the file and row of a group, by which the message names it.

        Raises:
            DataError: a group does not fit. The message says how many tokens it takes and which setting to change.
        """
        tokens = self.lengths.row_tokens(self.prefix_sharing)
        too_long = np.flatnonzero(tokens > self.shape.length)
        if not too_long.size:
            return
        first = int(too_long[0])
        name = f"group {first}"
        if origin is not None:
            name = "{}, row {}".format(*origin(first))
        advice = "Set `row_length: auto`, raise `row_length`, or lower `max_length`"
        raise DataError(
            f"{name}: its {self.lengths.sizes[first]} responses take {tokens[first]} tokens, but a row holds "
            f"{self.shape.length} (`row_length`). {len(too_long)} of {len(self.lengths)} do not fit; the longest takes "
            f"{tokens.max()}. {advice}"
            f"{'' if self.prefix_sharing else ', or switch `prefix_sharing` on'}."
        )


@lru_cache(maxsize=2)
def _epoch_order(count: int, seed: int | None, epoch: int) -> Int[np.ndarray, " G"]:
    if seed is None:
        return np.arange(count)
    return np.random.default_rng((seed, epoch)).permutation(count)


@dataclass(frozen=True)
class PackingReport:
    """Holds the average cost of a step of a plan, over the simulated steps; in tokens unless noted otherwise."""

    groups: float
    input_tokens: float  # after sharing, without padding
    separate_tokens: float  # of the same groups if nothing were shared
    computed_tokens: float  # all tokens of all rows, padding and empty rows included
    targets: float
    computed_targets: float
    empty_rows: float  # their share of the computed rows
    rows: float  # number of computed rows, empty ones included
    most_micro_batches: int  # of a simulated step

    @property
    def fill(self) -> float:
        """Share of the computed tokens that are not padding."""
        return self.input_tokens / self.computed_tokens


def measure(plan: StepPlan) -> PackingReport:
    """Simulates steps spread over the first epoch and averages what they compute."""
    tokens, separate = (plan.lengths.row_tokens(sharing) for sharing in (plan.prefix_sharing, False))
    targets = plan.lengths.row_targets(plan.prompt_targets)
    sums, most = np.zeros(8), 0
    steps = _sampled_steps(plan)
    for k in steps:
        step = plan.step(int(k))
        rows = step.micro_batches * plan.rows_per_micro_batch
        most = max(most, step.micro_batches)
        sums += (
            len(step.groups),
            tokens[step.groups].sum(),
            separate[step.groups].sum(),
            rows * plan.shape.length,
            targets[step.groups].sum(),
            rows * plan.shape.targets,
            (rows - len(step.rows)) / rows,
            rows,
        )
    figures = [*(sums / len(steps)), most]
    return PackingReport(*figures)


def make_step_plan(
    lengths: GroupLengths,
    *,
    global_batch_size: int,
    rows_per_micro_batch: int,
    row_length: int | None,
    max_row_length: int,
    row_multiple: int = ROW_MULTIPLE,
    prefix_sharing: bool = True,
    packing: bool = True,
    seed: int | None = None,
    prompt_targets: bool = False,
) -> StepPlan:
    """Makes the step plan of a split, with the row shape that costs least.

    Args:
        lengths: the token counts of all groups of the split.
        global_batch_size: groups per step.
        rows_per_micro_batch: rows of a micro-batch over all devices.
        row_length: a fixed row length, or None to choose one.
        max_row_length: the longest row that memory allows; the longest group always gets a row that holds it.
        row_multiple: a multiple of `ROW_MULTIPLE` that divides chosen row lengths as far as that costs little: 128, 256
            and so on up to it, the largest of them that adds at most an eighth to a row.
        prefix_sharing, packing, seed, prompt_targets: see `StepPlan`.
    """

    def plan_with(shape: RowShape) -> StepPlan:
        return StepPlan(
            lengths, shape, global_batch_size, rows_per_micro_batch, prefix_sharing, packing, seed, prompt_targets
        )

    tokens, targets = lengths.row_tokens(prefix_sharing), lengths.row_targets(prompt_targets)
    shortest = _round_up(int(tokens.max()), _multiple_for(int(tokens.max()), row_multiple))
    if row_length is not None:
        candidates = np.array([row_length])
    elif packing:
        step_tokens = tokens.mean() * min(global_batch_size, len(tokens))
        useful = _round_up(int(1.1 * step_tokens / rows_per_micro_batch))
        longest = max(shortest, min(max_row_length, useful))
        spread = map(int, np.linspace(shortest, longest, _CANDIDATES))
        candidates = np.unique([n - n % _multiple_for(n, row_multiple) for n in spread])
    else:
        candidates = np.array([shortest])
    most_targets = _round_up(int(targets.max()))
    if candidates[0] < tokens.max():  # `row_length` is too short: `StepPlan.check` raises the error
        return plan_with(RowShape(int(candidates[0]), most_targets, int(lengths.sizes.max())))

    unbounded = [RowShape(int(length), int(targets.sum()), int(lengths.sizes.sum())) for length in candidates]
    plan = _cheapest([plan_with(shape) for shape in unbounded])
    steps = [plan.step(int(k)) for k in _sampled_steps(plan)]
    fullest = max(targets[step.groups[row]].sum() for step in steps for row in step.rows)
    responses = max(lengths.sizes[step.groups[row]].sum() for step in steps for row in step.rows)
    responses = max(int(lengths.sizes.max()), int(responses))
    # All targets of the fullest row have room. Where a row has fewer, the loss head skips the padding.
    return plan_with(RowShape(plan.shape.length, max(most_targets, _round_up(int(fullest))), responses))


def grow_micro_batches(plan: StepPlan, devices: int, most: int) -> StepPlan:
    """Returns a plan with the rows a device at which a step costs least: few micro-batches, few empty rows.

    Every micro-batch costs the time of `MICRO_BATCH_TOKENS` tokens beside its rows. The rows themselves stay the same.

    Args:
        plan: the step plan with a row a device.
        devices: devices that each take rows of their own.
        most: most rows a device, at least 1.
    """
    filled = np.array([len(plan.step(int(k)).rows) for k in _sampled_steps(plan)])
    rows = np.arange(1, min(most, -(-int(filled.max()) // devices)) + 1)
    micro_batches = -(-filled[:, None] // (devices * rows))
    costs = (micro_batches * (rows * plan.shape.length + MICRO_BATCH_TOKENS)).mean(0)
    cheapest = int(rows[np.argmax(costs <= _GOOD_ENOUGH * costs.min())])
    return replace(plan, rows_per_micro_batch=devices * cheapest)


def micro_batch_line(plan: StepPlan, report: PackingReport, devices: int, most: int | None) -> str:
    """Describes the micro-batches of a step in one line, with the reason for their size.

    Args:
        plan: the step plan.
        report: the plan as `measure` has measured it.
        devices: devices that each take rows of their own.
        most: the most rows a device that were allowed, if the plan is of `grow_micro_batches`; None for a given size.
    """
    rows, count = plan.rows_per_micro_batch // devices, report.rows / plan.rows_per_micro_batch
    size = f"{count:.3g} micro-batch{'es' if count > 1 else ''} a step, of {rows} row{'s' if rows > 1 else ''} a device"
    if most is None:
        return f"{size} (`rows_per_device`)"
    filled = report.rows * (1 - report.empty_rows) / devices
    return f"{size} (`rows_per_device: auto`: a step fills {filled:.3g}, and by estimate {most} fit a device's memory)"


def _cheapest(plans: list[StepPlan]) -> StepPlan:
    """Picks the plan with the shortest row among those whose cost is the lowest, or nearly."""
    reports = [measure(plan) for plan in plans]
    costs = [report.computed_tokens + MICRO_BATCH_TOKENS * report.rows for report in reports]
    return next(plan for plan, cost in zip(plans, costs, strict=True) if cost <= _GOOD_ENOUGH * min(costs))


def _sampled_steps(plan: StepPlan) -> Int[np.ndarray, " _"]:
    """Picks steps spread over the first epoch. Its last step is left out if it has fewer groups than the others."""
    full_steps = max(1, len(plan.lengths) // plan.global_batch_size)
    count = min(max(4, _SAMPLED_GROUPS // plan.global_batch_size), 24)
    return np.unique(np.linspace(0, full_steps - 1, count, dtype=int))


def _multiple_for(length: int, largest: int) -> int:
    """Returns what the length of a row of about so many tokens is to be a multiple of; see `row_multiple`."""
    multiple = ROW_MULTIPLE
    while 2 * multiple <= min(largest, length // 8):
        multiple *= 2
    return multiple


def _round_up(n: int, multiple: int = ROW_MULTIPLE) -> int:
    return -(-n // multiple) * multiple
