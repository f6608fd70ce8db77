"""Timing in turns. The machine drifts, neighbours come and go: only what is timed in turns can be compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence


def seconds_of(run: Callable[[], object]) -> float:
    """Seconds of a call, which must wait for its device."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def in_turns(contenders: Mapping[str, Callable[[int], float]], rounds: int) -> dict[str, list[float]]:
    """Runs every contender once a round and collects what it returns, its seconds.

    A contender is given the number of the round. Each round begins with another one, so that none always follows the
    same neighbour.
    """
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            seconds[name].append(contenders[name](number))
    return seconds


def speed_up(slow: Sequence[float], fast: Sequence[float]) -> float:
    """How many times faster: the median over the rounds of the ratio within a round."""
    return statistics.median(s / f for s, f in zip(slow, fast, strict=True))


def total_speed_up(slow: Sequence[float], fast: Sequence[float]) -> float:
    """How many times faster over all rounds together: total time over total time."""
    return sum(slow) / sum(fast)
