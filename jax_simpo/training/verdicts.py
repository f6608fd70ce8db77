"""Keeps what was seen of attention backends on this machine, so that only the first run of a kind has to try them.

A verdict holds for a chip, its driver and compiler, the versions of jax, this program's own kernels, and the shapes. A
change to any of these is another entry, so nothing old is ever believed.

A backend can end the process that tries it: a kernel may crash the driver. So its name is written down before it is
tried. A later run that finds the name, and no process that is still at it, passes the backend over.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from jax_simpo.ops import attention
from jax_simpo.ops.attention.evidence import Distance, Shape, Speed, Verdict, examine
from jax_simpo.run.whole import write_text
from jax_simpo.training.machine_cache import machine_cache

_PACKAGES = ("jax", "jaxlib", "tokamax", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu")


def of_backends(names: Sequence[str], shape: Shape, device: jax.Device, *, anew: bool = False) -> list[Verdict]:
    """Returns the verdicts on backends: kept ones, or of a trial now, which are kept.

    Args:
        names: of `backends.BACKENDS`.
        shape: of the run.
        device: the device that they run on, the first of this process.
        anew: try them now, whatever is kept.
    """
    folder = machine_cache("attention")
    return [_verdict(name, shape, device, folder, anew) for name in names]


def _verdict(name: str, shape: Shape, device: jax.Device, folder: Path | None, anew: bool) -> Verdict:
    if folder is None:  # without a cache folder every run tries
        return examine(name, shape)
    key = {"backend": name, "device": _device(device), "versions": _versions(), "shape": asdict(shape)}
    text = json.dumps(key, sort_keys=True)
    digest = hashlib.sha256(f"{text} {_sources()}".encode()).hexdigest()[:32]
    kept, trial = folder / f"{name}-{digest}.json", folder / f"{name}-{digest}.{socket.gethostname()}.trial"
    if not anew and (verdict := _read(kept)) is not None:
        return verdict
    if _ended_a_process(trial):
        return Verdict(
            name, f"ended the process that tried it last, and is not tried again (remove {trial} to do so)", {}
        )
    with _marked(trial):
        verdict = examine(name, shape)
    write_text(kept, json.dumps({**key, "verdict": asdict(verdict)}, indent=1) + "\n")
    return verdict


def from_json(content: Mapping[str, Any]) -> Verdict:
    """Returns the verdict of which `dataclasses.asdict` made this content, also after JSON."""
    distances = {name: Distance(*distance) for name, distance in content["distances"].items()}
    speed = None if content["speed"] is None else Speed(**content["speed"])
    return Verdict(content["backend"], content["problem"], distances, speed)


def _read(path: Path) -> Verdict | None:
    """Reads a kept verdict; None where there is none, or none that can be read."""
    try:
        return from_json(json.loads(path.read_text(encoding="utf-8"))["verdict"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def _marked(trial: Path) -> Iterator[None]:
    """Says in a file that this process tries a backend; the file goes however the trial ends, if the process lives."""
    write_text(trial, str(os.getpid()))
    try:
        yield
    finally:
        trial.unlink(missing_ok=True)


def _ended_a_process(trial: Path) -> bool:
    """Returns True if a process of this machine began a trial, and is gone without having ended it."""
    try:
        os.kill(int(trial.read_text(encoding="utf-8")), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError):  # no such file, one that was cut, or somebody else's process
        return False
    return False


def _device(device: jax.Device) -> dict[str, str]:
    return {"kind": device.device_kind, "platform": device.client.platform_version}


def _versions() -> dict[str, str]:
    installed = {}
    for name in _PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


def _sources() -> str:
    """Returns a digest of the backends' own code."""
    digest = hashlib.sha256()
    for folder in attention.__path__:
        for file in sorted(Path(folder).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()
