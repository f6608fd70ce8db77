"""Row batches built ahead of the device by a background thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from jaxtyping import Int

from jax_simpo.data.packing import StepPlan
from jax_simpo.data.pairs import TokenizedPair
from jax_simpo.data.rows import RowBatch, Slots, build_rows, response_slots

Item = TypeVar("Item")


class PairSource(Protocol):
    """Whatever holds tokenised pairs and can hand out some of them by index."""

    def pairs(self, indices: Int[np.ndarray, " P"]) -> list[TokenizedPair]: ...


@dataclass(frozen=True)
class StepBatch:
    """The rows of one optimizer step as micro-batches of static shape, and the step's denominators.

    Where only some rows were asked for, `micro_batches` hold those; everything else is of the whole step.
    """

    step: int
    pairs: Int[np.ndarray, " P"]
    micro_batches: Sequence[RowBatch]
    slots: Sequence[Slots]  # per micro-batch, of all its rows
    chosen_tokens: int
    input_tokens: int
    computed_tokens: int
    epoch: float


def build_step(plan: StepPlan, source: PairSource, step: int, rows: Sequence[int] | None = None) -> StepBatch:
    """Builds the rows of one step. Empty rows fill the last micro-batch.

    Args:
        plan: which pairs, in which rows.
        source: the pairs; those of rows that are not built are not read.
        step: its number.
        rows: which rows of each micro-batch to build, such as those of this process's devices; None for all.
    """
    planned = plan.step(step)
    size = plan.rows_per_micro_batch
    numbers = [row.tolist() for row in planned.rows]
    numbers += [[]] * (planned.micro_batches * size - len(numbers))
    starts = range(0, len(numbers), size)
    own = range(size) if rows is None else rows
    built = [numbers[start + row] for start in starts for row in own]
    needed = np.array(sorted(p for row in built for p in row), np.int64)
    pairs = dict(zip(needed.tolist(), source.pairs(planned.pairs[needed]), strict=True))
    batch = build_rows([[(p, pairs[p]) for p in row] for row in built], plan.shape, prefix_sharing=plan.prefix_sharing)
    lengths = plan.lengths.of_pairs(planned.pairs)
    return StepBatch(
        step=step,
        pairs=planned.pairs,
        micro_batches=[batch.rows(k * len(own), (k + 1) * len(own)) for k in range(len(starts))],
        slots=[response_slots(numbers[start : start + size], plan.shape) for start in starts],
        chosen_tokens=int(lengths.chosen_targets.sum()),
        input_tokens=int(lengths.row_tokens(plan.prefix_sharing).sum()),
        computed_tokens=len(numbers) * plan.shape.length,
        epoch=planned.epoch,
    )


def step_batches(
    plan: StepPlan, source: PairSource, steps: range, *, ahead: int = 2, rows: Sequence[int] | None = None
) -> Generator[StepBatch]:
    """The batches of these steps in order, up to `ahead` of them built before they are asked for."""
    return prefetch((build_step(plan, source, step, rows) for step in steps), ahead)


def prefetch(items: Iterator[Item], ahead: int) -> Generator[Item]:
    """Runs an iterator in a thread of its own, `ahead` items in advance.

    What the iterator raises is raised here, at the item where it happened; closing this generator ends the thread.
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
        except BaseException as error:  # handed to the consumer, whatever it is
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
