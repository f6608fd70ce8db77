"""Makes the step plan: which pairs step k consumes, and in which rows they sit.

A step always consumes the same `global_batch_size` pairs in the same order, packed or not, shared or not, on any mesh:
packing decides only in which rows they sit. The pairs and rows of step k are a pure function of the pairs' lengths, the
seed and k. So there is no iterator state to save, and every process derives the same plan by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int

from jax_simpo.data.pairs import PairLengths
from jax_simpo.data.rows import RowShape
from jax_simpo.errors import DataError

ROW_MULTIPLE = 128  # divides row lengths and target counts, to fill the blocks of attention kernels and matmuls
_SAMPLED_PAIRS = 4096  # pairs whose steps are simulated to choose a row shape: at least 4 steps, at most 24
_CANDIDATES = 40  # row lengths tried for `row_length: auto`
_GOOD_ENOUGH = 1.005  # the shortest length within half a per cent of the lowest cost wins: it needs the least memory
# The fixed cost of a row in a micro-batch, in tokens. Its gradient is written and added to the step's, which moves some
# 16 bytes per parameter; a token takes 6 operations per parameter. A device does about 100 operations in the time it
# moves a byte (GPUs, TPUs, and CPUs with the large heads of small models), which gives 16 / 6 * 100.
MICRO_BATCH_TOKENS = 256


def pack(tokens: Int[np.ndarray, " P"], targets: Int[np.ndarray, " P"], shape: RowShape) -> list[Int[np.ndarray, " _"]]:
    """Packs pairs into few rows, and returns per row the positions of its pairs in `tokens`.

    Takes the better result of `first_fit_decreasing` and `fill_rows`. Every pair must fit an empty row.

    Args:
        tokens: tokens of each pair.
        targets: targets of each pair.
        shape: the capacities of a row; a pair takes two response slots.
    """
    rows = first_fit_decreasing(tokens, targets, shape)
    if len(rows) * shape.length - tokens.sum() < shape.length:  # no packing has fewer rows
        return rows
    filled = fill_rows(tokens, shape.length)
    fits = all(targets[row].sum() <= shape.targets and 2 * len(row) <= shape.responses for row in filled)
    return filled if fits and len(filled) < len(rows) else rows


def first_fit_decreasing(
    tokens: Int[np.ndarray, " P"], targets: Int[np.ndarray, " P"], shape: RowShape
) -> list[Int[np.ndarray, " _"]]:
    """Puts each pair, the longest first, into the first row with room for its tokens, targets and slots."""
    order = np.argsort(-tokens, kind="stable")
    room = np.empty((len(tokens), 3), np.int64)
    rows: list[list[int]] = []
    for p in order:
        need = (tokens[p], targets[p], 2)
        fits = (room[: len(rows)] >= need).all(1)
        first = int(fits.argmax()) if fits.any() else len(rows)
        if first == len(rows):
            rows.append([])
            room[first] = (shape.length, shape.targets, shape.responses)
        room[first] -= need
        rows[first].append(int(p))
    return [np.array(row) for row in rows]


def fill_rows(tokens: Int[np.ndarray, " P"], length: int) -> list[Int[np.ndarray, " _"]]:
    """Fills one row after the other: first the longest pair left, then the pairs that best fill the rest of the row.

    To find these pairs is a subset-sum problem. One integer holds the sums that the pairs can make: bit n is set if n
    tokens can be filled, and a pair of t tokens adds the sums shifted by t. (Gupta and Ho, "A new heuristic algorithm
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
            if not sums[k] >> rest & 1:  # this sum needs the pair
                size, p = left.pop(k)
                row.append(p)
                rest -= size
        rows.append(np.array(row))
    return rows


@dataclass(frozen=True)
class Step:
    """The pairs of one optimizer step (indices into the data), and per row the positions of its pairs in `pairs`."""

    pairs: Int[np.ndarray, " P"]
    rows: list[Int[np.ndarray, " _"]]
    micro_batches: int
    epoch: float  # epochs done after this step


@dataclass(frozen=True)
class StepPlan:
    """Maps a step number to its pairs and rows.

    Attributes:
        lengths: the token counts of all pairs of the split.
        shape: the static shape of a row.
        global_batch_size: pairs per step. The last step of an epoch takes the pairs that are left.
        rows_per_micro_batch: rows of a micro-batch over all devices; empty rows fill the last one.
        prefix_sharing: True lays out a pair's common prefix once.
        packing: True lets a row hold several pairs.
        seed: shuffles the pairs, anew in each epoch; None keeps file order.
        prompt_targets: True if the tokens of prompts are targets too, once a pair.
    """

    lengths: PairLengths
    shape: RowShape
    global_batch_size: int
    rows_per_micro_batch: int
    prefix_sharing: bool = True
    packing: bool = True
    seed: int | None = None
    prompt_targets: bool = False

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps that visit every pair once."""
        return -(-len(self.lengths) // self.global_batch_size)

    def pairs(self, step: int) -> Int[np.ndarray, " P"]:
        """Returns the pairs of a step in their order, as indices into the data."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        order = _epoch_order(len(self.lengths), self.seed, epoch)
        return order[step_in_epoch * self.global_batch_size : (step_in_epoch + 1) * self.global_batch_size]

    def step(self, step: int) -> Step:
        """Packs the pairs of a step into rows."""
        pairs = self.pairs(step)
        if self.packing:
            lengths = self.lengths.of_pairs(pairs)
            rows = pack(lengths.row_tokens(self.prefix_sharing), lengths.targets(self.prompt_targets), self.shape)
        else:
            rows = list(np.arange(len(pairs))[:, None])
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        epochs_done = epoch + min(1.0, (step_in_epoch + 1) * self.global_batch_size / len(self.lengths))
        return Step(pairs, rows, -(-len(rows) // self.rows_per_micro_batch), epochs_done)

    def check(self, origin: Callable[[int], tuple[str, int]] | None = None) -> None:
        """Checks, before anything is computed, that every pair fits a row.

        Args:
            origin: returns the file and row of a pair, by which the message names it.

        Raises:
            DataError: a pair does not fit. The message says how many tokens it takes and which setting to change.
        """
        tokens = self.lengths.row_tokens(self.prefix_sharing)
        too_long = np.flatnonzero(tokens > self.shape.length)
        if not too_long.size:
            return
        first = int(too_long[0])
        name = f"pair {first}"
        if origin is not None:
            name = "{}, row {}".format(*origin(first))
        advice = "Set `row_length: auto`, raise `row_length`, or lower `max_length`"
        raise DataError(
            f"{name}: the pair takes {tokens[first]} tokens, but a row holds {self.shape.length} (`row_length`). "
            f"{len(too_long)} pair(s) are too long; the longest takes {tokens.max()}. {advice}"
            f"{'' if self.prefix_sharing else ', or switch `prefix_sharing` on'}."
        )


@lru_cache(maxsize=2)
def _epoch_order(count: int, seed: int | None, epoch: int) -> Int[np.ndarray, " P"]:
    if seed is None:
        return np.arange(count)
    return np.random.default_rng((seed, epoch)).permutation(count)


@dataclass(frozen=True)
class PackingReport:
    """The average cost of a step under a step plan, over the simulated steps; in tokens unless noted otherwise."""

    pairs: float
    input_tokens: float  # after sharing, without padding
    separate_tokens: float  # of the same pairs if nothing were shared
    computed_tokens: float  # all tokens of all rows, padding and empty rows included
    targets: float
    computed_targets: float
    empty_rows: float  # their share of the computed rows
    rows: float  # number of computed rows, empty ones included

    @property
    def fill(self) -> float:
        """Share of the computed tokens that are not padding."""
        return self.input_tokens / self.computed_tokens


def measure(plan: StepPlan) -> PackingReport:
    """Simulates steps spread over the first epoch and averages what they compute."""
    tokens, separate = (plan.lengths.row_tokens(sharing) for sharing in (plan.prefix_sharing, False))
    targets = plan.lengths.targets(plan.prompt_targets)
    sums = np.zeros(8)
    steps = _sampled_steps(plan)
    for k in steps:
        step = plan.step(int(k))
        rows = step.micro_batches * plan.rows_per_micro_batch
        sums += (
            len(step.pairs),
            tokens[step.pairs].sum(),
            separate[step.pairs].sum(),
            rows * plan.shape.length,
            targets[step.pairs].sum(),
            rows * plan.shape.targets,
            (rows - len(step.rows)) / rows,
            rows,
        )
    return PackingReport(*(sums / len(steps)))


def make_step_plan(
    lengths: PairLengths,
    *,
    global_batch_size: int,
    rows_per_micro_batch: int,
    row_length: int | None,
    max_row_length: int,
    prefix_sharing: bool = True,
    packing: bool = True,
    seed: int | None = None,
    prompt_targets: bool = False,
) -> StepPlan:
    """Makes the step plan of a split, with the row shape that costs least.

    Args:
        lengths: the token counts of all pairs of the split.
        global_batch_size: pairs per step.
        rows_per_micro_batch: rows of a micro-batch over all devices.
        row_length: a fixed row length, or None to choose one.
        max_row_length: the longest row that memory allows; the longest pair always gets a row that holds it.
        prefix_sharing, packing, seed, prompt_targets: see `StepPlan`.
    """

    def plan_with(shape: RowShape) -> StepPlan:
        return StepPlan(
            lengths, shape, global_batch_size, rows_per_micro_batch, prefix_sharing, packing, seed, prompt_targets
        )

    tokens, targets = lengths.row_tokens(prefix_sharing), lengths.targets(prompt_targets)
    shortest = _round_up(int(tokens.max()))
    if row_length is not None:
        candidates = np.array([row_length])
    elif packing:
        step_tokens = tokens.mean() * min(global_batch_size, len(tokens))
        useful = _round_up(int(1.1 * step_tokens / rows_per_micro_batch))
        longest = max(shortest, min(max_row_length, useful))
        candidates = np.unique(np.linspace(shortest, longest, _CANDIDATES, dtype=int) // ROW_MULTIPLE * ROW_MULTIPLE)
    else:
        candidates = np.array([shortest])
    most_targets = _round_up(int(targets.max()))
    if candidates[0] < shortest:  # `row_length` is too short: `StepPlan.check` raises the error
        return plan_with(RowShape(int(candidates[0]), most_targets, 2))

    unbounded = [RowShape(int(length), int(targets.sum()), 2 * len(tokens)) for length in candidates]
    plan = _cheapest([plan_with(shape) for shape in unbounded])
    steps = [plan.step(int(k)) for k in _sampled_steps(plan)]
    fullest = max(targets[step.pairs[row]].sum() for step in steps for row in step.rows)
    responses = 2 * max(len(row) for step in steps for row in step.rows)
    # All targets of the fullest row have room. Where a row has fewer, the loss head skips the padding.
    return plan_with(RowShape(plan.shape.length, max(most_targets, _round_up(int(fullest))), responses))


def _cheapest(plans: list[StepPlan]) -> StepPlan:
    """Picks the plan with the shortest row among those whose cost is the lowest, or nearly."""
    reports = [measure(plan) for plan in plans]
    costs = [report.computed_tokens + MICRO_BATCH_TOKENS * report.rows for report in reports]
    return next(plan for plan, cost in zip(plans, costs, strict=True) if cost <= _GOOD_ENOUGH * min(costs))


def _sampled_steps(plan: StepPlan) -> Int[np.ndarray, " _"]:
    """Picks steps spread over the first epoch. Its last step is left out if it has fewer pairs than the others."""
    full_steps = max(1, len(plan.lengths) // plan.global_batch_size)
    count = min(max(4, _SAMPLED_PAIRS // plan.global_batch_size), 24)
    return np.unique(np.linspace(0, full_steps - 1, count, dtype=int))


def _round_up(n: int) -> int:
    return -(-n // ROW_MULTIPLE) * ROW_MULTIPLE
