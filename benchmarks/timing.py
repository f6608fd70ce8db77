"""Times contenders in turns. A machine's speed drifts, so only measurements made in turns can be compared."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def timed(run: Callable[[], T]) -> tuple[T, float]:
    """Returns the result of a call and its seconds. The call must wait for its device."""
    started = time.perf_counter()
    result = run()
    return result, time.perf_counter() - started


def seconds_of(run: Callable[[], object]) -> float:
    """Returns the seconds of a call. The call must wait for its device."""
    return timed(run)[1]


def window_seconds(start: Callable[[], T], wait: Callable[[T], object], calls: int) -> float:
    """Returns the seconds of one of many calls that are dispatched in one go and waited for at the end.

    A GPU then computes without a pause, and the time that the host takes to start a call is hidden.
    """
    started = time.perf_counter()
    for _ in range(calls):
        result = start()
    wait(result)
    return (time.perf_counter() - started) / calls


def calls_a_window(start: Callable[[], T], wait: Callable[[T], object], window: float = 0.1, most: int = 200) -> int:
    """Returns how many calls fill a window of that many seconds. The call must have been compiled before."""
    return min(most, math.ceil(window / window_seconds(start, wait, 1)))


def sampled(start: Callable[[], T], wait: Callable[[T], object], samples: int = 5) -> dict[str, Any]:
    """Times a call on its own.

    Returns:
        `first_seconds` of the first call, which compiles; `calls` dispatched in a window; `seconds` of one call, from
        each of `samples` windows.
    """
    first = window_seconds(start, wait, 1)
    calls = calls_a_window(start, wait)
    return {
        "first_seconds": first,
        "calls": calls,
        "seconds": [window_seconds(start, wait, calls) for _ in range(samples)],
    }


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
