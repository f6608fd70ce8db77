"""Decides which steps are applied: none whose loss or gradient is not finite and, if you ask for it, no spike.

Both trainers use it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Self

from jax_simpo.config import TrainConfig
from jax_simpo.run.metrics import NOT_FINITE_ADVICE

WINDOW = 128
"""Steps that a step is compared with, as in OLMo's `SkipStepOptimizer`; a comparison needs half as many."""

_MEASURES = {"loss": "loss", "grad_norm": "gradient norm"}


def weights_error(step: int, saved: int) -> str:
    """Returns with what error a run ends whose weights are no longer finite after a step; `saved` is its newest one."""
    return (
        f"step {step}: the weights are no longer finite. The newest checkpoint is of step {saved}. {NOT_FINITE_ADVICE}"
    )


class StepGuard:
    """Looks at the loss and the gradient norm of each step before its update is made.

    A spike is a loss, or a gradient norm, that lies more than `sigma` standard deviations above the mean of the last
    steps. A spike that is left out still counts among the last steps. So a lasting change of level is not left out for
    ever: the mean and the deviation follow it.

    Args:
        sigma: how many standard deviations above the mean a spike is; None looks for no spikes.
        state: what `state` returned when the step was saved that the run goes on from.
        most: how many steps the run may leave out; None lets the first bad step end it.

    Attributes:
        fault: why the last step must not be applied; empty if nothing is wrong with it.
        left_out: how many steps have been left out.
    """

    def __init__(
        self, sigma: float | None = None, state: Mapping[str, Any] | None = None, *, most: int | None = None
    ) -> None:
        known = state or {}
        self.fault = ""
        self.left_out = int(known.get("left_out", 0))
        self._sigma, self._most = sigma, most
        self._last = {key: deque(known.get(key, ()), maxlen=WINDOW) for key in _MEASURES}
        self._values: dict[str, float] = {}

    @classmethod
    def of(cls, config: TrainConfig, state: Mapping[str, Any] | None) -> Self:
        """Returns the guard of a config, which goes on from a state."""
        return cls(config.spike_sigma, state, most=config.max_bad_steps if config.on_bad_step == "skip" else None)

    def accepts(self, metrics: Mapping[str, Any]) -> bool:
        """Returns True if the step may be applied.

        Args:
            metrics: the step's metrics, `loss` and `grad_norm` among them: numbers, or arrays on a device, for which it
                waits.
        """
        self._values = {key: float(metrics[key]) for key in _MEASURES}
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

    @property
    def may_leave_out(self) -> bool:
        """True if the run goes on without the step that was not accepted."""
        return self._most is not None and self.left_out < self._most

    def warning(self, step: int, file: Path) -> str:
        """Returns what is printed when a step, counted from 1, is left out; `file` holds what it would have used."""
        count = f"{self.left_out + 1} of at most {self._most} such steps"
        return f"warning: {self._text(step)} ({count}). What it would have trained on is in {file}"

    def error(self, step: int, file: Path) -> str:
        """Returns with what error a step ends the run; the arguments are those of `warning`."""
        if self._most is None:
            advice = "Set `on_bad_step: skip` to go on without such steps"
        else:
            advice = f"`max_bad_steps: {self._most}` allows to leave out no more"
        return (
            f"{self._text(step)}. What it would have trained on is in {file}. The newest checkpoint is of step "
            f"{step - 1}. {NOT_FINITE_ADVICE}. {advice}"
        )

    def _text(self, step: int) -> str:
        return f"step {step}: {self.fault}. Its update was not applied"

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
