"""Builds row batches in a background thread, ahead of the device that consumes them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np
from jaxtyping import Float, Int

from jax_simpo.data.groups import Group, GroupLengths
from jax_simpo.data.packing import StepPlan
from jax_simpo.data.rows import RowBatch, Slots, build_rows, response_slots

Item = TypeVar("Item")


class GroupSource(Protocol):
    """Anything that returns tokenised groups by index, such as a `GroupDataset`."""

    def groups(self, indices: Int[np.ndarray, " G"]) -> list[Group]: ...


@dataclass(frozen=True)
class Known:
    """Holds what is known of groups and their responses besides their tokens; None where nobody needs it.

    Attributes:
        reference: the sum of log-probs of each response under the reference, group after group, float32.
        scores: the score of each response, float32.
        weights: the weight of each group, float32.
    """

    reference: Float[np.ndarray, " R"] | None = None
    scores: Float[np.ndarray, " R"] | None = None
    weights: Float[np.ndarray, " G"] | None = None

    def of(self, groups: Int[np.ndarray, " H"], responses: Int[np.ndarray, " S"]) -> Known:
        """Selects what is known of some groups, whose responses are at `responses`."""
        reference, scores = (None if x is None else x[responses] for x in (self.reference, self.scores))
        return Known(reference, scores, None if self.weights is None else self.weights[groups])


@dataclass(frozen=True)
class StepBatch:
    """The rows of one optimizer step as micro-batches of static shape, and the step's denominators.

    Attributes:
        step: the step's number, from 0.
        groups: indices of the step's groups in the data.
        lengths: the token counts of the step's groups.
        micro_batches: the rows that `build_step` was asked for, per micro-batch. All other fields describe every row.
        slots: the responses in each micro-batch's rows.
        chosen_tokens: target tokens of the best responses, and of their prompts if those are targets.
        input_tokens: tokens in the rows, without padding.
        computed_tokens: tokens in the rows, padding and empty rows included.
        epoch: epochs done after this step.
        known: what is known of the step's groups besides their tokens.
    """

    step: int
    groups: Int[np.ndarray, " G"]
    lengths: GroupLengths
    micro_batches: Sequence[RowBatch]
    slots: Sequence[Slots]
    chosen_tokens: int
    input_tokens: int
    computed_tokens: int
    epoch: float
    known: Known = field(default_factory=Known)

    def of_slots(self, rows: RowBatch) -> dict[str, Float[np.ndarray, "B S"]]:
        """Returns what is known of each response slot of a micro-batch, by name; empty slots get 0.

        The names are `reference_sum`, `response_score` and `group_weight`; those that nobody asked for are left out.
        """
        filled = rows.response_group >= 0
        group = np.where(filled, rows.response_group, 0)
        response = self.lengths.starts[group] + np.where(filled, rows.response_place, 0)
        known = {
            "reference_sum": (self.known.reference, response),
            "response_score": (self.known.scores, response),
            "group_weight": (self.known.weights, group),
        }
        return {
            name: np.where(filled, values[index], np.float32(0))
            for name, (values, index) in known.items()
            if values is not None
        }


def build_step(
    plan: StepPlan,
    source: GroupSource,
    step: int,
    rows: Sequence[int] | None = None,
    known: Known | None = None,
) -> StepBatch:
    """Builds the rows of one step. Empty rows fill the last micro-batch.

    Args:
        plan: the step plan: which groups, in which rows.
        source: gives the groups; only the groups of the rows that are built are read.
        step: the step's number, from 0.
        rows: the rows of each micro-batch to build, such as those of this process's devices; None builds all.
        known: what is known of all groups of the data.
    """
    planned = plan.step(step)
    size = plan.rows_per_micro_batch
    all_rows = [row.tolist() for row in planned.rows]  # per row, the numbers of its groups within the step
    all_rows += [[]] * (planned.micro_batches * size - len(all_rows))
    starts = range(0, len(all_rows), size)
    own = range(size) if rows is None else rows
    own_rows = [all_rows[start + row] for start in starts for row in own]
    needed = np.array(sorted(p for row in own_rows for p in row), np.int64)
    groups = dict(zip(needed.tolist(), source.groups(planned.groups[needed]), strict=True))
    lengths = plan.lengths.of_groups(planned.groups)
    numbered = [[(p, groups[p]) for p in row] for row in own_rows]
    batch = build_rows(numbered, plan.shape, prefix_sharing=plan.prefix_sharing, prompt_targets=plan.prompt_targets)
    return StepBatch(
        step=step,
        groups=planned.groups,
        lengths=lengths,
        micro_batches=[batch.rows(k * len(own), (k + 1) * len(own)) for k in range(len(starts))],
        slots=[response_slots(all_rows[start : start + size], lengths, plan.shape) for start in starts],
        chosen_tokens=int(lengths.best_targets(plan.prompt_targets).sum()),
        input_tokens=int(lengths.row_tokens(plan.prefix_sharing).sum()),
        computed_tokens=len(all_rows) * plan.shape.length,
        epoch=planned.epoch,
        known=(known or Known()).of(planned.groups, plan.lengths.responses_of(planned.groups)),
    )


def step_batches(
    plan: StepPlan,
    source: GroupSource,
    steps: range,
    *,
    ahead: int = 2,
    rows: Sequence[int] | None = None,
    known: Known | None = None,
) -> Generator[StepBatch]:
    """Yields the batches of these steps in order, and builds up to `ahead` of them in advance."""
    return prefetch((build_step(plan, source, step, rows, known) for step in steps), ahead)


def prefetch(items: Iterator[Item], ahead: int) -> Generator[Item]:
    """Runs an iterator in a background thread, `ahead` items in advance.

    An exception of the iterator is raised here, in place of the item that failed. Closing this generator ends the
    thread.
    """
    ready: queue.Queue[tuple[str, Item | BaseException | None]] = queue.Queue(maxsize=max(1, ahead))
    stopped = threading.Event()

    def put(kind: str, value: Item | BaseException | None) -> bool:
        while not stopped.is_set():
            try:
                ready.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put("item", item):
                    return
            put("end", None)
        except BaseException as error:  # raised again in the thread that consumes the items
            put("error", error)

    thread = threading.Thread(target=work, name="row-builder", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                assert isinstance(value, BaseException)
                raise value
            yield value  # type: ignore[misc]
    finally:
        stopped.set()
        thread.join()
