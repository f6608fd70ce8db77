"""Follows the records of a run for one tracker, in a thread of its own: a slow server does not slow training."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from jax_simpo.errors import words_of
from jax_simpo.run.metrics import record_step
from jax_simpo.tracking.tracker import Ending, Tracker

CLOSE_SECONDS = 120.0  # how long the end of a run waits for a tracker that is still sending

Place = tuple[int, int]
"""The place of a record among all: its step, and 1 for an evaluation, which comes after the training of its step."""

NOTHING: Place = (-1, 1)
"""The place before the first record."""


def place_of(record: Mapping[str, Any]) -> Place:
    """Returns the place of a record."""
    return record_step(record), int("step" not in record)


def figures_of(record: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of a record under their names; the step is the axis."""
    return {
        name: value
        for name, value in record.items()
        if name not in ("step", "eval_step") and isinstance(value, int | float) and not isinstance(value, bool)
    }


class Follower:
    """Sends records to a tracker, each once and in order, until sending one fails.

    After a failure nothing more is sent, so that all that the tracker lacks comes after what it has.

    Args:
        name: the tracker's, as `report_to` has it.
        tracker: the run in the tracker.
        sent: the last record that it has.

    Attributes:
        sent: the last record that it has by now.
        failure: what went wrong; empty while nothing has.
        unsent: records that it does not have.
    """

    def __init__(self, name: str, tracker: Tracker, sent: Place) -> None:
        self.name, self.tracker, self.sent = name, tracker, sent
        self.failure, self.unsent = "", 0
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def put(self, record: Mapping[str, Any]) -> None:
        """Has a record sent, unless the tracker has it already."""
        self._jobs.put(partial(self._send, dict(record)))

    def flush(self) -> None:
        """Has the tracker bring what it was sent to the disk."""
        self._jobs.put(partial(self._try, self.tracker.flush))

    def attach(self, files: Mapping[str, Path]) -> None:
        """Has files attached."""
        self._jobs.put(partial(self._try, partial(self.tracker.attach, dict(files))))

    def close(self, ending: Ending) -> None:
        """Ends the run in the tracker, and waits for it, though not for ever."""
        self._jobs.put(partial(self._close, ending))
        self._jobs.put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self.failure = self.failure or f"it was still sending after {CLOSE_SECONDS:.0f} seconds"

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def _send(self, record: Mapping[str, Any]) -> None:
        place = place_of(record)
        if place <= self.sent:
            return
        if not self.failure:
            self._try(partial(self.tracker.log, place[0], figures_of(record)))
        if self.failure:
            self.unsent += 1
        else:
            self.sent = place

    def _close(self, ending: Ending) -> None:
        before, self.failure = self.failure, ""  # what the tracker has is closed properly, too
        self._try(partial(self.tracker.close, ending))
        self.failure = before or self.failure

    def _try(self, action: Callable[[], None]) -> None:
        if self.failure:
            return
        try:
            action()
        except Exception as error:  # whatever a library raises, the run goes on
            self.failure = words_of(error)
