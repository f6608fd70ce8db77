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
from jax_simpo.data.rows import RowBatch, build_rows

Item = TypeVar("Item")


class PairSource(Protocol):
    """Whatever holds tokenised pairs and can hand out some of them by index."""

    def pairs(self, indices: Int[np.ndarray, " P"]) -> list[TokenizedPair]: ...


@dataclass(frozen=True)
class StepBatch:
    """The rows of one optimizer step as micro-batches of static shape, and the step's denominators."""

    step: int
    pairs: Int[np.ndarray, " P"]
    micro_batches: Sequence[RowBatch]
    chosen_tokens: int
    input_tokens: int
    computed_tokens: int
    epoch: float


def build_step(plan: StepPlan, source: PairSource, step: int) -> StepBatch:
    """Builds the rows of one step. Empty rows fill the last micro-batch."""
    planned = plan.step(step)
    pairs = source.pairs(planned.pairs)
    rows = [[(int(p), pairs[p]) for p in row] for row in planned.rows]
    size = plan.rows_per_micro_batch
    rows += [[]] * (planned.micro_batches * size - len(rows))
    batch = build_rows(rows, plan.shape, prefix_sharing=plan.prefix_sharing)
    return StepBatch(
        step=step,
        pairs=planned.pairs,
        micro_batches=[batch.rows(at, at + size) for at in range(0, len(rows), size)],
        chosen_tokens=int(plan.lengths.chosen_targets[planned.pairs].sum()),
        input_tokens=batch.input_tokens,
        computed_tokens=batch.tokens.size,
        epoch=planned.epoch,
    )


def step_batches(plan: StepPlan, source: PairSource, steps: range, *, ahead: int = 2) -> Generator[StepBatch]:
    """The batches of these steps in order, up to `ahead` of them built before they are asked for."""
    return prefetch((build_step(plan, source, step) for step in steps), ahead)


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
