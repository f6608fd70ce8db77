"""Times a call on a device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

_SAMPLES = 3
_SAMPLE_SECONDS = 0.05  # one sample is as many calls as take so long


def seconds_per_call(run: Callable[[], Any]) -> float:
    """Returns the seconds of a call: the median of some samples, each of many calls that the device works off."""

    def sample(calls: int) -> float:
        started = time.perf_counter()
        for _ in range(calls):
            result = run()
        jax.block_until_ready(result)
        return (time.perf_counter() - started) / calls

    once = min(sample(1), sample(1))  # the first call may still have to load the program
    calls = max(1, int(_SAMPLE_SECONDS / max(once, 1e-6)))
    return float(np.median([sample(calls) for _ in range(_SAMPLES)]))
