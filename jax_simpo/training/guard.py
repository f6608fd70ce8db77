"""Decides which steps are applied: none whose loss or gradient is not finite and, if you ask for it, no spike."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import fmean, stdev
from typing import Any

import jax

WINDOW = 128
"""Steps that a step is compared with, as in OLMo's `SkipStepOptimizer`; a comparison needs half as many."""

_MEASURES = {"loss": "loss", "grad_norm": "gradient norm"}


class StepGuard:
    """Looks at the loss and the gradient norm of each step before its update is made.

    A spike is a loss, or a gradient norm, that lies more than `sigma` standard deviations above the mean of the last
    steps. A spike that is left out still counts among the last steps. So a lasting change of level is not left out for
    ever: the mean and the deviation follow it.

    Args:
        sigma: how many standard deviations above the mean a spike is; None looks for no spikes.
        state: what `state` returned when the step was saved that the run goes on from.

    Attributes:
        fault: why the last step must not be applied; empty if nothing is wrong with it.
        left_out: how many steps have been left out.
    """

    def __init__(self, sigma: float | None = None, state: Mapping[str, Any] | None = None) -> None:
        known = state or {}
        self.fault = ""
        self.left_out = int(known.get("left_out", 0))
        self._sigma = sigma
        self._last = {key: deque(known.get(key, ()), maxlen=WINDOW) for key in _MEASURES}
        self._values: dict[str, float] = {}

    def accepts(self, metrics: Mapping[str, Any]) -> bool:
        """Returns True if the step may be applied. It waits for the step's loss and gradient norm."""
        self._values = {key: float(value) for key, value in jax.device_get({k: metrics[k] for k in _MEASURES}).items()}
        not_finite = [key for key, value in self._values.items() if not math.isfinite(value)]
        if not_finite:
            self.fault = "the loss is {loss}, the gradient norm {grad_norm}".format(**self._values)
        else:
            self.fault = next(filter(None, map(self._spike, _MEASURES)), "")
        return not self.fault

    def _spike(self, key: str) -> str:
        last, value = self._last[key], self._values[key]
        if self._sigma is None or len(last) < WINDOW // 2:
            return ""
        mean, deviation = fmean(last), stdev(last)
        if value <= mean + self._sigma * deviation:
            return ""
        return (
            f"the {_MEASURES[key]} is {value:.4g}, more than {self._sigma:g} standard deviations ({deviation:.3g}) "
            f"above the mean of the last {len(last)} steps ({mean:.4g})"
        )

    def count(self) -> None:
        """Counts the step that `accepts` has looked at, applied or left out, among the last steps."""
        self.left_out += bool(self.fault)
        if self._sigma is not None:
            for key, value in self._values.items():
                if math.isfinite(value):
                    self._last[key].append(value)

    @property
    def state(self) -> dict[str, Any]:
        """Returns what a run needs to go on as if it had not been interrupted, as JSON; empty if that is nothing."""
        if self._sigma is None and not self.left_out:
            return {}
        return {"left_out": self.left_out, **{key: list(values) for key, values in self._last.items()}}
