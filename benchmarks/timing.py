"""Times contenders in turns. A machine's speed drifts, so only measurements made in turns can be compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


def timed(run: Callable[[], T]) -> tuple[T, float]:
    """Returns the result of a call and its seconds. The call must wait for its device."""
    started = time.perf_counter()
    result = run()
    return result, time.perf_counter() - started


def seconds_of(run: Callable[[], object]) -> float:
    """Returns the seconds of a call. The call must wait for its device."""
    return timed(run)[1]


def in_turns(contenders: Mapping[str, Callable[[int], float]], rounds: int) -> dict[str, list[float]]:
    """Runs every contender once a round and collects the seconds that it returns.

    A contender is called with the number of the round. Each round starts with another contender, so that the order
    favours none.
    """
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            seconds[name].append(contenders[name](number))
    return seconds


def speed_up(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Returns the speed-up as the median over the rounds of the ratio within a round."""
    return statistics.median(s / f for s, f in zip(slow, fast, strict=True))


def total_speed_up(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Returns the speed-up over all rounds together: total time over total time."""
    return sum(slow) / sum(fast)
