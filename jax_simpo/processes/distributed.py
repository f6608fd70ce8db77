"""Several processes as one run: they wait for each other, compare what must be equal, and share one fate.

All of it goes through the key-value store of JAX's coordination service, which process 0 holds. No device is needed, so
it works before the mesh exists and while a collective hangs. With one process each function here does its plain work.

Fate. A process that fails tells the store why, and every other one, which looks there each second, ends with that
reason. A process that is killed can tell nothing; the service misses its heartbeats and ends the others, naming it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax._src.distributed import global_state  # the store has no public name; Orbax takes the same way to it

from jax_simpo.errors import CheckpointError, LaunchError, UserError

T = TypeVar("T")

# A process that sent no sign of life for so long is dead: the others have a minute in all. (JAX's own value is 100.)
HEARTBEAT_SECONDS = 30
# Longest wait of a barrier: tokenising a large split takes hours, and who died is found out in other ways.
_LONGEST_WAIT_MS = 24 * 3600 * 1000
_POLL_SECONDS = 1.0
_FAREWELL_SECONDS = 10.0  # how long process 0, which holds the store, waits for the others to have read the reason
_SHARED_SECONDS = 60.0  # network file systems may hide a new file for a while
_FAILED, _LEFT = "jax_simpo/failed/", "jax_simpo/left/"

_calls = itertools.count()
_ending = threading.Event()


def join(address: str | None, count: int | None, number: int | None, local_device_ids: Sequence[int] | None) -> None:
    """Makes this process one of a run; what is None is found by JAX in the environment.

    Raises:
        LaunchError: the others do not answer, or the environment does not say where they are.
    """
    # A CPU has no collectives of its own across processes. Other backends do not look at this.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator_address=address,
            num_processes=count,
            process_id=number,
            local_device_ids=local_device_ids,
            # Who says all of it takes all devices; under SLURM JAX would still leave each task only one.
            cluster_detection_method=None if None in (address, count, number) else "deactivate",
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise LaunchError(
            f"the processes of the run cannot be joined: {error}. Check that all were started, that the address of "
            "process 0 can be reached from the others, and that its port is free"
        ) from error
    _keep_stdout_for_results()
    if not is_first():  # one bar for all of them
        os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    threading.Thread(target=_watch, name="fate", daemon=True).start()


def _keep_stdout_for_results() -> None:
    """Only process 0 has results to print. What libraries write past Python (Gloo does) goes to stderr, or nowhere."""
    sys.stdout.flush()
    if is_first():
        results = os.dup(1)
        os.dup2(2, 1)
        sys.stdout = open(results, "w", encoding="utf-8", buffering=1)
    else:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)


def is_first() -> bool:
    """Whether this is process 0, which prints and writes for all."""
    return _number() == 0


def count() -> int:
    """Processes of the run."""
    return int(global_state.num_processes or 1) if global_state.client is not None else 1


def _number() -> int:
    return int(global_state.process_id) if global_state.client is not None else 0


# --- agreeing


def barrier(what: str) -> None:
    """Waits until every process is here. All of them must come by the same barriers in the same order."""
    if count() > 1:
        _client().wait_at_barrier(f"jax_simpo/{next(_calls)}/{what}", _LONGEST_WAIT_MS)


def collect(what: str, value: T) -> list[T]:
    """Every process's value, in their order; values must be made of what JSON knows."""
    if count() == 1:
        return [value]
    key = f"jax_simpo/{next(_calls)}/{what}/"
    _client().key_value_set(f"{key}{_number()}", json.dumps(value))
    barrier(what)
    found = {int(name.rpartition("/")[2]): text for name, text in _client().key_value_dir_get(key)}
    return [json.loads(found[i]) for i in range(count())]


def check_same(what: str, value: Any, advice: str, error: type[UserError] = LaunchError) -> None:
    """Makes sure that all processes have the same value of something that each finds out for itself.

    Raises:
        LaunchError, or the error asked for: one has another; named are the first that differs and both values.
    """
    digests = collect(what, hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest())
    if len(set(digests)) == 1:
        return
    values = collect(what, [socket.gethostname(), value])
    for number, (host, other) in enumerate(values):
        if other != values[0][1]:
            raise error(
                f"{what}: process {number} (on {host}) has {other!r}, process 0 (on {values[0][0]}) has "
                f"{values[0][1]!r}. {advice}"
            )


def on_first(what: str, work: Callable[[], object]) -> None:
    """Process 0 works while the others wait. What it raises ends them all."""
    if is_first():
        work()
    barrier(what)


def first_then_others(what: str, work: Callable[[], T]) -> T:
    """Process 0 works while the others wait; then they find in a shared cache what it has left there."""
    if not is_first():
        barrier(what)
    result = work()
    if is_first():
        barrier(what)
    return result


def check_shared(folder: Path, key: str) -> None:
    """Makes sure that a folder which process 0 writes to is the same for all.

    Raises:
        CheckpointError: a process does not see a file that process 0 has put there.
    """
    if count() == 1:
        return
    marker = folder / f".seen-by-all-{collect('marker', secrets.token_hex(8))[0]}"
    if is_first():
        marker.touch()
    barrier("marker written")
    until = time.monotonic() + _SHARED_SECONDS
    while not (seen := marker.exists()) and time.monotonic() < until:
        time.sleep(0.5)
    blind = [host for host in collect("marker seen", "" if seen else socket.gethostname()) if host]
    if is_first():
        marker.unlink()
    if blind:
        raise CheckpointError(
            f"`{key}` {folder} is not the same folder on all hosts: {', '.join(sorted(set(blind)))} did not see what "
            "process 0 wrote there. Give a folder on a file system that all hosts share"
        )


# --- one fate


def finish() -> None:
    """Waits for all processes at the end of a command that went well, and takes leave of them."""
    barrier("end")
    _ending.set()
    jax.distributed.shutdown()


def fail(error: BaseException) -> None:
    """Says why this process fails and ends it, and with it the others. Does not return.

    JAX's own way out would wait five minutes for the others, which wait for this one in a collective.
    """
    _ending.set()
    name = f"process {_number()} of {count()} (on {socket.gethostname()})"
    if isinstance(error, UserError):
        reason = f"error: {error}"
    else:
        reason = f"{type(error).__name__}: {error}"
        traceback.print_exception(error)
    print(f"{name}: {reason}", file=sys.stderr, flush=True)
    if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
        print(f"{name}: looking for a process that died before", file=sys.stderr, flush=True)
        _await_cause(name)
    _tell(_FAILED, f"{name}: {reason}")
    _leave()


def _await_cause(name: str) -> None:
    """Waits for the reason where this process may only have lost another one in a collective.

    Either the other one has told it, or its heartbeats stay away and JAX's service ends this process, naming that one.
    """
    until = time.monotonic() + HEARTBEAT_SECONDS + 15
    while time.monotonic() < until:
        if told := _told():
            print(f"{name}: ends because of {'; '.join(told)}", file=sys.stderr, flush=True)
            _leave()
        time.sleep(_POLL_SECONDS)


def _watch() -> None:
    """Ends this process when another one has told that it fails."""
    while not _ending.wait(_POLL_SECONDS):
        told = _told()
        if told and not _ending.is_set():
            name = f"process {_number()} of {count()} (on {socket.gethostname()})"
            print(f"{name}: ends because of {'; '.join(told)}", file=sys.stderr, flush=True)
            _leave()


def _told() -> list[str]:
    try:
        return [text for _, text in _client().key_value_dir_get(_FAILED)]
    except jax.errors.JaxRuntimeError:  # the service is gone, and JAX ends this process for it
        return []


def _tell(key: str, text: str) -> None:
    try:
        _client().key_value_set(f"{key}{_number()}", text)
    except jax.errors.JaxRuntimeError as error:
        print(f"the other processes could not be told: {error}", file=sys.stderr, flush=True)


def _leave() -> None:
    """Ends this process at once; process 0, whose end is the end of the store, when the others have left."""
    sys.stdout.flush()
    if is_first():
        until = time.monotonic() + _FAREWELL_SECONDS
        while time.monotonic() < until and len(_left()) < count() - 1:
            time.sleep(0.1)
    else:
        _tell(_LEFT, "")
    os._exit(1)


def _left() -> list[tuple[str, str]]:
    try:
        found: list[tuple[str, str]] = _client().key_value_dir_get(_LEFT)
    except jax.errors.JaxRuntimeError:
        return []
    return found


def _client() -> Any:
    assert global_state.client is not None, "this is a run of one process"
    return global_state.client
