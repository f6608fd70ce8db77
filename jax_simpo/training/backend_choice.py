"""Chooses among backends that were tried: of attention, and of the loss head, by the same rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import jax

from jax_simpo.errors import ConfigError
from jax_simpo.ops.attention.evidence import Verdict
from jax_simpo.processes import distributed
from jax_simpo.training import verdicts

_CLEARLY_FASTER = 0.97  # a backend that is less preferred must take less than this share of the time


@dataclass(frozen=True)
class BackendChoice:
    """The backend of a run.

    Attributes:
        backend: its name.
        reason: why it was chosen, a phrase for the log.
        warnings: sentences about backends that were passed over.
    """

    backend: str
    reason: str
    warnings: Sequence[str] = ()


def try_on_first(name: str, try_all: Callable[[], list[Verdict]]) -> list[Verdict]:
    """Returns the verdicts of the first process of a run, which tries for all. All processes call it.

    Args:
        name: of the trial, the same in all processes.
        try_all: is called by the first process.
    """
    tried = [asdict(verdict) for verdict in try_all()] if distributed.is_first() else None
    return [verdicts.from_json(verdict) for verdict in distributed.collect(name, tried)[0] or []]


def keep_named(key: str, verdict: Verdict, device: jax.Device) -> BackendChoice:
    """Chooses the backend that the config names.

    Args:
        key: of the config.
        verdict: on that backend.
        device: that it was tried on.

    Raises:
        ConfigError: its numbers are wrong.
    """
    if verdict.problem is not None:
        raise ConfigError(
            f"`{key}: {verdict.backend}` {verdict.problem}, on {device.device_kind} with jax {jax.__version__}. "
            f"Choose `{key}: auto`, which takes a backend that is right here; `jax-simpo doctor` shows them all. "
            "`attention_check: false` would take this one all the same"
        )
    return BackendChoice(verdict.backend, f"as configured, and right on {device.device_kind}")


def choose_fastest(key: str, found: Sequence[Verdict], device: jax.Device, work: str) -> BackendChoice:
    """Chooses the fastest backend that is right; of nearly equal ones that which comes first.

    Args:
        key: of the config.
        found: verdicts, in the order of preference.
        device: that they were tried on.
        work: that they were timed on, in words.

    Raises:
        ConfigError: none of them is right.
    """
    name = {"attention": "attention backend", "loss_head": "loss head"}[key]
    warnings = [
        f"warning: {name} {verdict.backend!r} is passed over: it {verdict.problem}"
        for verdict in found
        if verdict.problem is not None
    ]
    best = _fastest(found)
    if best is None:
        raise ConfigError(
            f"`{key}: auto`: no backend computes right numbers on {device.device_kind} with jax {jax.__version__}. "
            + "; ".join(f"{verdict.backend} {verdict.problem}" for verdict in found)
            + ". Try another version of jax; `jax-simpo doctor` shows more"
        )
    times = ", ".join(f"{v.backend} {1e3 * v.speed.seconds:.3g} ms" for v in found if v.speed is not None)
    reason = f"auto: the fastest right one on {device.device_kind}; {times} for {work}, forward and backward"
    return BackendChoice(best.backend, reason, warnings)


def _fastest(found: Sequence[Verdict]) -> Verdict | None:
    """Returns the fastest that is right; of nearly equal ones the first. None if none is right."""
    best: Verdict | None = None
    for verdict in found:
        if verdict.speed is None:
            continue
        if best is None or best.speed is None or verdict.speed.seconds < _CLEARLY_FASTER * best.speed.seconds:
            best = verdict
    return best
