"""The step plan: which pairs step k consumes, and in which rows they sit.

A step always consumes the same `global_batch_size` pairs in the same order, packed or not, shared or not, on any mesh:
packing decides only in which rows they sit. The plan of step k is a pure function of the pairs' lengths, the seed and
k, so there is no iterator state to save and every process derives the same plan alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from jaxtyping import Int

from jax_simpo.data.pairs import PairLengths
from jax_simpo.data.rows import RowShape
from jax_simpo.errors import DataError

ROW_MULTIPLE = 128  # row lengths and target counts are multiples of it: whole attention blocks and matmul tiles
_SAMPLED_PAIRS = 4096  # pairs whose steps are simulated to choose a row shape: at least 4 steps, at most 24
_CANDIDATES = 40  # row lengths tried for `row_length: auto`
_GOOD_ENOUGH = 1.005  # within half a per cent of the cheapest length the shortest wins: it needs the least memory


def first_fit_decreasing(
    tokens: Int[np.ndarray, " P"], targets: Int[np.ndarray, " P"], shape: RowShape
) -> list[Int[np.ndarray, " _"]]:
    """Packs pairs into rows, longest first, each into the first row that has room for its tokens and its targets.

    `shape.responses` is a third capacity (two slots a pair). Returns the positions of the pairs of each row. Every pair
    must fit an empty row.
    """
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


@dataclass(frozen=True)
class Step:
    """One optimizer step: its pairs (indices into the data), and per row the positions in `pairs` of what it holds."""

    pairs: Int[np.ndarray, " P"]
    rows: list[Int[np.ndarray, " _"]]
    micro_batches: int
    epoch: float  # epochs done after this step


@dataclass(frozen=True)
class StepPlan:
    """Maps a step number to its pairs and rows.

    Attributes:
        lengths: of all pairs of the split.
        shape: the static shape of a row.
        global_batch_size: pairs a step. The last step of an epoch takes what is left.
        rows_per_micro_batch: rows of a micro-batch over all devices; empty rows fill the last one.
        prefix_sharing: whether a pair's common prefix is laid out once.
        packing: whether a row may hold several pairs.
        seed: of the order, a new one each epoch; `None` keeps file order.
    """

    lengths: PairLengths
    shape: RowShape
    global_batch_size: int
    rows_per_micro_batch: int
    prefix_sharing: bool = True
    packing: bool = True
    seed: int | None = None

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.lengths) // self.global_batch_size)

    def pairs(self, step: int) -> Int[np.ndarray, " P"]:
        """The pairs of a step in their order, as indices into the data."""
        epoch, at = divmod(step, self.steps_per_epoch)
        order = _epoch_order(len(self.lengths), self.seed, epoch)
        return order[at * self.global_batch_size : (at + 1) * self.global_batch_size]

    def step(self, step: int) -> Step:
        """The plan of a step."""
        pairs = self.pairs(step)
        if self.packing:
            lengths = self.lengths.of_pairs(pairs)
            rows = first_fit_decreasing(lengths.row_tokens(self.prefix_sharing), lengths.targets(), self.shape)
        else:
            rows = list(np.arange(len(pairs))[:, None])
        epoch, at = divmod(step, self.steps_per_epoch)
        done = epoch + min(1.0, (at + 1) * self.global_batch_size / len(self.lengths))
        return Step(pairs, rows, -(-len(rows) // self.rows_per_micro_batch), done)

    def check(self, origin: Callable[[int], tuple[str, int]] | None = None) -> None:
        """Makes sure, before anything is computed, that every pair fits a row.

        Args:
            origin: gives the file and row of a pair, to name it by.

        Raises:
            DataError: names the first pair that does not, what it needs and which setting to change.
        """
        tokens = self.lengths.row_tokens(self.prefix_sharing)
        too_long = np.flatnonzero(tokens > self.shape.length)
        if not too_long.size:
            return
        first = int(too_long[0])
        where = f"pair {first}"
        if origin is not None:
            where = "{}, row {}".format(*origin(first))
        advice = "Set `row_length: auto`, raise `row_length`, or lower `max_length`"
        raise DataError(
            f"{where}: the pair takes {tokens[first]} tokens, but a row holds {self.shape.length} (`row_length`). "
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
    """What a plan costs per step, over the steps that were simulated; everything in tokens but `pairs`."""

    pairs: float
    input_tokens: float  # after sharing, without padding
    separate_tokens: float  # what the same pairs take with nothing shared
    computed_tokens: float  # whole rows, padding and empty rows included
    targets: float
    computed_targets: float
    empty_rows: float  # share of the computed rows

    @property
    def fill(self) -> float:
        """Share of the computed tokens that are not padding."""
        return self.input_tokens / self.computed_tokens


def measure(plan: StepPlan) -> PackingReport:
    """Simulates steps spread over the first epoch and adds up what they compute."""
    tokens, separate = (plan.lengths.row_tokens(sharing) for sharing in (plan.prefix_sharing, False))
    targets = plan.lengths.targets()
    sums = np.zeros(7)
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
        )
    return PackingReport(*(sums / len(steps)))


def choose_row_shape(
    plan: StepPlan, *, row_length: int | None, max_row_length: int, target_cost: float = 1.0
) -> StepPlan:
    """Gives a plan the row shape that costs least, and returns it with that shape.

    Args:
        plan: everything but the shape, which is ignored.
        row_length: a fixed row length, or None to choose one.
        max_row_length: the longest row that memory allows; the longest pair always gets a row that holds it.
        target_cost: what a target costs in units of what a token costs: vocabulary x width over the parameters of the
            layers.
    """
    tokens, targets = plan.lengths.row_tokens(plan.prefix_sharing), plan.lengths.targets()
    shortest = _round_up(int(tokens.max()))
    if row_length is not None:
        candidates = np.array([row_length])
    elif plan.packing:
        step_tokens = tokens.mean() * min(plan.global_batch_size, len(tokens))
        useful = _round_up(int(1.1 * step_tokens / plan.rows_per_micro_batch))
        longest = max(shortest, min(max_row_length, useful))
        candidates = np.unique(np.linspace(shortest, longest, _CANDIDATES, dtype=int) // ROW_MULTIPLE * ROW_MULTIPLE)
    else:
        candidates = np.array([shortest])
    most_targets = _round_up(int(targets.max()))
    if candidates[0] < shortest:  # a fixed length that is too short: `StepPlan.check` tells the user
        return replace(plan, shape=RowShape(int(candidates[0]), most_targets, 2))

    unbounded = [RowShape(int(length), int(targets.sum()), 2 * len(tokens)) for length in candidates]
    by_length = _cheapest([replace(plan, shape=shape) for shape in unbounded], slack=_GOOD_ENOUGH)
    steps = [by_length.step(int(k)) for k in _sampled_steps(plan)]
    held = [targets[step.pairs[row]].sum() for step in steps for row in step.rows]
    responses = 2 * max(len(row) for step in steps for row in step.rows)
    bounds = {max(most_targets, _round_up(int(np.quantile(held, q)))) for q in (0.5, 0.75, 0.9, 0.97, 1.0)}
    bounded = [RowShape(by_length.shape.length, bound, responses) for bound in sorted(bounds)]
    return _cheapest([replace(plan, shape=shape) for shape in bounded], target_cost)


def _cheapest(plans: list[StepPlan], target_cost: float = 0.0, slack: float = 1.0) -> StepPlan:
    """The first plan (they come smallest first) whose cost is the lowest, or within `slack` times the lowest."""
    reports = [measure(plan) for plan in plans]
    costs = [report.computed_tokens + target_cost * report.computed_targets for report in reports]
    return next(plan for plan, cost in zip(plans, costs, strict=True) if cost <= slack * min(costs))


def _sampled_steps(plan: StepPlan) -> Int[np.ndarray, " _"]:
    """Steps spread over the first epoch; its last one, which takes what is left, stands for itself only."""
    whole = max(1, len(plan.lengths) // plan.global_batch_size)
    count = min(max(4, _SAMPLED_PAIRS // plan.global_batch_size), 24)
    return np.unique(np.linspace(0, whole - 1, count, dtype=int))


def _round_up(n: int) -> int:
    return -(-n // ROW_MULTIPLE) * ROW_MULTIPLE
