"""The learning-rate schedules of transformers' Trainer, which published settings were made for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array

from jax_simpo.config.schedules import DECAY_SHARE, settings_of


def learning_rate_schedule(
    kind: str, peak: float, total_steps: int, warmup_steps: int, settings: Mapping[str, Any] | None = None
) -> optax.Schedule:
    """Returns the learning rate as a function of the step number (from 0), as `transformers.get_scheduler` does.

    Warm-up is linear from 0, so step 0 of a run with warm-up does not move the parameters. With `warmup_stable_decay`
    it is linear from the lowest learning rate. `constant` ignores `warmup_steps`.

    Args:
        kind: the value of `lr_scheduler_type`.
        peak: the highest learning rate.
        total_steps: optimizer steps of the whole run.
        warmup_steps: those of them that warm up.
        settings: the value of `lr_scheduler_kwargs`.

    Raises:
        ValueError: no schedule is called `kind`.
    """
    decay_steps = max(1, total_steps - warmup_steps)
    values, start = settings_of(kind, settings or {}), 0.0
    match kind:
        case "cosine":
            main = optax.cosine_decay_schedule(peak, decay_steps)
        case "cosine_with_min_lr":
            share = values["min_lr_rate"] if values["min_lr"] is None else values["min_lr"] / peak
            main = optax.cosine_decay_schedule(peak, decay_steps, alpha=share)
        case "linear":
            main = optax.linear_schedule(peak, 0.0, decay_steps)
        case "polynomial":
            main = optax.polynomial_schedule(peak, values["lr_end"], values["power"], decay_steps)
        case "warmup_stable_decay":
            main, start = _stable_then_decay(peak, total_steps, warmup_steps, values), peak * values["min_lr_ratio"]
        case "constant":
            return optax.constant_schedule(peak)
        case "constant_with_warmup":
            main = optax.constant_schedule(peak)
        case _:
            raise ValueError(f"no learning-rate schedule is called {kind!r}")
    if not warmup_steps:
        return main
    return optax.join_schedules([optax.linear_schedule(start, peak, warmup_steps), main], [warmup_steps])


# The share of the way from the peak to the lowest learning rate that is left, by the share of the decay that is done.
_DECAYS: dict[str, Callable[[Array], Array]] = {
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + jnp.cos(math.pi * done)),
    "1-sqrt": lambda done: 1.0 - jnp.sqrt(done),
}


def _stable_then_decay(peak: float, total_steps: int, warmup_steps: int, values: Mapping[str, Any]) -> optax.Schedule:
    """Returns the schedule after warm-up: the peak, and in the last `num_decay_steps` the decay."""
    steps = values["num_decay_steps"]
    steps = math.ceil(DECAY_SHARE * total_steps) if steps is None else int(steps)
    steps = max(1, min(steps, total_steps - warmup_steps))
    stable, lowest = total_steps - warmup_steps - steps, values["min_lr_ratio"]
    left = _DECAYS[values["decay_type"]]

    def decay(step: Any) -> Array:
        done = jnp.clip(jnp.asarray(step, jnp.float32) / steps, 0.0, 1.0)
        return peak * (lowest + (1.0 - lowest) * left(done))

    return optax.join_schedules([optax.constant_schedule(peak), decay], [stable])


def count_warmup_steps(total_steps: int, warmup_steps: int, warmup_ratio: float) -> int:
    """Returns `warmup_steps` if it is positive, else `warmup_ratio` of the run, rounded up."""
    return warmup_steps if warmup_steps > 0 else math.ceil(total_steps * warmup_ratio)
