"""Keeps what was seen of backends on this machine, of attention and of the loss head, so that only the first run of a
kind has to try them.

A verdict holds for a chip and its driver, the packages that compile for it, XLA's flags, this program's own kernels and
the shapes; a change to any of them asks for another. What raised an error is not kept, because the reason may be gone
next time: memory that another process held, a full disk.

A backend can end the process that tries it, as a kernel that crashes the driver does. So a trial is marked by a file as
long as it lasts. A backend that has ended two processes is passed over.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp

from jax_simpo.errors import ConfigError
from jax_simpo.ops import attention, loss_head, numerics
from jax_simpo.ops.attention.evidence import Distance, Shape, Speed, Verdict, examine
from jax_simpo.ops.loss_head.evidence import HeadShape, examine_head
from jax_simpo.run import signals
from jax_simpo.run.whole import write_text
from jax_simpo.training.installed import COMPILERS, nvidia_driver, versions_of
from jax_simpo.training.machine_cache import machine_cache

_DEADS = 2  # processes that a backend may end before it is tried no more


@dataclass(frozen=True)
class _Kind:
    """The backends of one thing.

    Attributes:
        folder: where their verdicts are kept in the machine's cache.
        title: what messages call one.
        examine: tries one; see `evidence.examine`.
        sources: their own code, files and folders.
    """

    folder: str
    title: str
    examine: Callable[..., Verdict]
    sources: Sequence[Path]


# `examine` is looked up at each call, so that a test can put another in its place.
_ATTENTION = _Kind(
    "attention", "attention backend", lambda *a, **k: examine(*a, **k), [Path(path) for path in attention.__path__]
)
_LOSS_HEAD = _Kind(
    "loss_head",
    "loss head",
    lambda *a, **k: examine_head(*a, **k),
    [*(Path(path) for path in loss_head.__path__), Path(numerics.__file__).with_name("logprobs.py")],
)


def of_backends(
    names: Sequence[str], shape: Shape, device: jax.Device, *, timed: bool = True, anew: bool = False
) -> list[Verdict]:
    """Returns the verdicts on attention backends: kept ones, or of a trial now.

    Args:
        names: of `backends.BACKENDS`.
        shape: of the run.
        device: the device that they run on, of this process.
        timed: also time those whose numbers are right.
        anew: try them now, whatever is kept, and whatever they have ended.

    Raises:
        ConfigError: a backend broke the device, which computes nothing more in this process.
    """
    return [_verdict(_ATTENTION, name, shape, device, timed, anew) for name in names]


def of_loss_heads(
    names: Sequence[str], shape: HeadShape, device: jax.Device, *, timed: bool = True, anew: bool = False
) -> list[Verdict]:
    """Returns the verdicts on backends of the loss head, as `of_backends` does on those of attention.

    Raises:
        ConfigError: as there.
    """
    return [_verdict(_LOSS_HEAD, name, shape, device, timed, anew) for name in names]


def _verdict(kind: _Kind, name: str, shape: Shape | HeadShape, device: jax.Device, timed: bool, anew: bool) -> Verdict:
    folder = machine_cache(kind.folder)
    if folder is None:  # without a cache folder every run tries
        return kind.examine(name, shape, device, timed=timed)
    place = {"kind": device.device_kind, "platform": device.client.platform_version, "driver": nvidia_driver()}
    flags = {flag: os.environ.get(flag, "") for flag in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    key = {
        "backend": name,
        "timed": timed,
        "device": place,
        "versions": versions_of(COMPILERS),
        "flags": flags,
        "shape": asdict(shape),
    }
    digest = hashlib.sha256(f"{json.dumps(key, sort_keys=True)} {_sources(kind)}".encode()).hexdigest()[:32]
    kept, trial = folder / f"{name}-{digest}.json", folder / f"{name}-{digest}.trial"
    if anew:
        with suppress(OSError):
            trial.unlink(missing_ok=True)
    elif (verdict := _read(kept)) is not None:
        return verdict
    with _marked(trial) as deaths:
        if deaths >= _DEADS:
            text = f"ended {deaths} processes that tried it (`jax-simpo doctor`, or removing {trial}, tries it again)"
            return Verdict(name, text, {}, raised=True)
        verdict = kind.examine(name, shape, device, timed=timed)
        if verdict.raised and not _answers(device):
            trial.write_text(str(_DEADS), encoding="utf-8")  # stays: the block is left by an error that keeps it
            raise _BrokenDevice(
                f"{kind.title} {name!r} {verdict.problem}, and {device.device_kind} answers no more. Start the "
                "same command again: the backend is passed over then"
            )
    if not verdict.raised:
        with suppress(ConfigError):  # a folder that cannot be written to costs the next run a trial, no more
            write_text(kept, json.dumps({**key, "verdict": asdict(verdict)}, indent=1) + "\n")
    return verdict


class _BrokenDevice(ConfigError):
    """A trial has left the device unusable; its mark stays."""


def from_json(content: Mapping[str, Any]) -> Verdict:
    """Returns the verdict of which `dataclasses.asdict` made this content, also after JSON."""
    distances = {name: Distance(*distance) for name, distance in content["distances"].items()}
    speed = None if content["speed"] is None else Speed(**content["speed"])
    return Verdict(content["backend"], content["problem"], distances, speed, content["raised"])


def _read(path: Path) -> Verdict | None:
    """Reads a kept verdict; None where there is none, or none that can be read."""
    try:
        return from_json(json.loads(path.read_text(encoding="utf-8"))["verdict"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def _marked(trial: Path) -> Iterator[int]:
    """Marks a trial, and yields how many processes have ended in one before.

    The file holds that number plus one during the trial, under a lock that ends with the process. It is gone after the
    trial, and also if a signal of the user's ends the process. A process that finds the lock taken by a trial of
    another one does not count.
    """
    try:
        file = trial.open("a+", encoding="utf-8")
    except OSError:
        yield 0
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # another process is trying it now, or the file system has no locks
            yield 0
            return
        deaths = _number_in(file)
        if deaths >= _DEADS:
            yield deaths
            return
        file.truncate(0)
        file.write(str(deaths + 1))
        file.flush()

        def unmark() -> None:
            trial.unlink(missing_ok=True)

        try:
            with signals.before_ending(unmark):
                yield deaths
        except _BrokenDevice:
            raise
        except BaseException:
            unmark()
            raise
        unmark()


def _number_in(file: IO[str]) -> int:
    file.seek(0)
    text = file.read().strip()
    return int(text) if text.isdecimal() else 0


def _answers(device: jax.Device) -> bool:
    """Returns True if the device still computes: some errors of a kernel end all work of the process on it."""
    try:
        return int(jax.device_put(jnp.arange(8), device).sum()) == 28
    except Exception:
        return False


def _sources(kind: _Kind) -> str:
    """Returns a digest of the backends' own code."""
    digest = hashlib.sha256(Path(numerics.__file__).read_bytes())
    for path in kind.sources:
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()
