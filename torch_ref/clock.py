"""The speed of training between two records."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Counts seconds, tokens and groups since the last logged step, without the time of evaluating and saving."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Counts from nothing again."""
        self._started, self._tokens, self._groups = time.perf_counter(), 0, 0

    def add(self, tokens: int, groups: int) -> None:
        """Counts a finished step."""
        self._tokens += tokens
        self._groups += groups

    def speeds(self) -> dict[str, float]:
        """Returns the tokens per second, and the groups per second, which are called pairs."""
        seconds = time.perf_counter() - self._started
        return {"tokens_per_second": self._tokens / seconds, "pairs_per_second": self._groups / seconds}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Does not count the time inside."""
        stopped = time.perf_counter()
        yield
        self._started += time.perf_counter() - stopped
