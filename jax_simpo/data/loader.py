"""Builds row batches in a background thread, ahead of the device that consumes them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from jaxtyping import Float, Int

from jax_simpo.data.packing import StepPlan
from jax_simpo.data.pairs import TokenizedPair
from jax_simpo.data.rows import RowBatch, Slots, build_rows, response_slots

Item = TypeVar("Item")


class PairSource(Protocol):
    """Anything that returns tokenised pairs by index, such as a `PairDataset`."""

    def pairs(self, indices: Int[np.ndarray, " P"]) -> list[TokenizedPair]: ...


@dataclass(frozen=True)
class StepBatch:
    """The rows of one optimizer step as micro-batches of static shape, and the step's denominators.

    Attributes:
        step: the step's number, from 0.
        pairs: indices of the step's pairs in the data.
        micro_batches: the rows that `build_step` was asked for, per micro-batch. All other fields describe every row.
        slots: the responses in each micro-batch's rows.
        chosen_tokens: target tokens of the chosen responses, and of their prompts if those are targets.
        reference: for an objective with a reference, the sums of log-probs under it of each pair's responses, by rank.
        input_tokens: tokens in the rows, without padding.
        computed_tokens: tokens in the rows, padding and empty rows included.
        epoch: epochs done after this step.
        weights: the weight of each pair, for pairs that have weights.
    """

    step: int
    pairs: Int[np.ndarray, " P"]
    micro_batches: Sequence[RowBatch]
    slots: Sequence[Slots]
    chosen_tokens: int
    input_tokens: int
    computed_tokens: int
    epoch: float
    reference: Float[np.ndarray, "P 2"] | None = None
    weights: Float[np.ndarray, " P"] | None = None

    def reference_sums(self, rows: RowBatch) -> Float[np.ndarray, "B R"] | None:
        """Returns the sum under the reference of every response slot of a micro-batch; empty slots get 0."""
        if self.reference is None:
            return None
        sums = self.reference[rows.response_pair, rows.response_rank]
        return np.where(rows.response_pair >= 0, sums, np.float32(0))

    def pair_weights(self, rows: RowBatch) -> Float[np.ndarray, "B R"] | None:
        """Returns the weight of the pair of every response slot of a micro-batch; empty slots get 0."""
        if self.weights is None:
            return None
        return np.where(rows.response_pair >= 0, self.weights[rows.response_pair], np.float32(0))


def build_step(
    plan: StepPlan,
    source: PairSource,
    step: int,
    rows: Sequence[int] | None = None,
    reference: Float[np.ndarray, "N 2"] | None = None,
    weights: Float[np.ndarray, " N"] | None = None,
) -> StepBatch:
    """Builds the rows of one step. Empty rows fill the last micro-batch.

    Args:
        plan: the step plan: which pairs, in which rows.
        source: gives the pairs; only the pairs of the rows that are built are read.
        step: the step's number, from 0.
        rows: the rows of each micro-batch to build, such as those of this process's devices; None builds all.
        reference: the sums of all pairs under the reference, chosen and rejected; None without one.
        weights: the weights of all pairs; None if they have none.
    """
    planned = plan.step(step)
    size = plan.rows_per_micro_batch
    all_rows = [row.tolist() for row in planned.rows]  # per row, the numbers of its pairs within the step
    all_rows += [[]] * (planned.micro_batches * size - len(all_rows))
    starts = range(0, len(all_rows), size)
    own = range(size) if rows is None else rows
    own_rows = [all_rows[start + row] for start in starts for row in own]
    needed = np.array(sorted(p for row in own_rows for p in row), np.int64)
    pairs = dict(zip(needed.tolist(), source.pairs(planned.pairs[needed]), strict=True))
    numbered = [[(p, pairs[p]) for p in row] for row in own_rows]
    batch = build_rows(numbered, plan.shape, prefix_sharing=plan.prefix_sharing, prompt_targets=plan.prompt_targets)
    lengths = plan.lengths.of_pairs(planned.pairs)
    return StepBatch(
        step=step,
        pairs=planned.pairs,
        micro_batches=[batch.rows(k * len(own), (k + 1) * len(own)) for k in range(len(starts))],
        slots=[response_slots(all_rows[start : start + size], plan.shape) for start in starts],
        chosen_tokens=int((lengths.chosen_inputs if plan.prompt_targets else lengths.chosen_targets).sum()),
        input_tokens=int(lengths.row_tokens(plan.prefix_sharing).sum()),
        computed_tokens=len(all_rows) * plan.shape.length,
        epoch=planned.epoch,
        reference=None if reference is None else reference[planned.pairs],
        weights=None if weights is None else weights[planned.pairs],
    )


def step_batches(
    plan: StepPlan,
    source: PairSource,
    steps: range,
    *,
    ahead: int = 2,
    rows: Sequence[int] | None = None,
    reference: Float[np.ndarray, "N 2"] | None = None,
    weights: Float[np.ndarray, " N"] | None = None,
) -> Generator[StepBatch]:
    """Yields the batches of these steps in order, and builds up to `ahead` of them in advance."""
    return prefetch((build_step(plan, source, step, rows, reference, weights) for step in steps), ahead)


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
