"""Makes several processes one run: they wait for each other, compare values that must be equal, and end together.

All communication goes through the key-value store of JAX's coordination service, which runs in process 0. It needs no
device, so it works before the mesh exists and while a collective hangs. In a run of one process no function here waits.

How a run ends: a process that fails writes the reason to the store. The other processes look there every second, print
the reason and end. A process that is killed writes nothing, but the service misses its heartbeats and ends the others
with a message that names it.
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
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax._src.distributed import global_state  # the store has no public name; Orbax uses this one too

from jax_simpo.errors import CheckpointError, LaunchError, UserError
from jax_simpo.redact import redact
from jax_simpo.terminal import visible

T = TypeVar("T")

# A process without a heartbeat for so long is dead. JAX's default of 100 would keep the others waiting much longer.
HEARTBEAT_SECONDS = 30
# Longest wait at a barrier: tokenising a large split takes hours. Dead processes are detected by their heartbeats.
_LONGEST_WAIT_MS = 24 * 3600 * 1000
_POLL_SECONDS = 1.0
_EXIT_SECONDS = 10.0  # process 0, which runs the store, waits so long for the others to read the reason
_SHARED_SECONDS = 60.0  # a network file system may show a new file late
_FAILED, _EXITED = "jax_simpo/failed/", "jax_simpo/left/"  # keys in the store

_ending = threading.Event()


class _Line(threading.local):
    """Names the line of calls that this thread makes together with a thread of every other process."""

    name = "main"


_line = _Line()
_calls: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)


def join(address: str | None, count: int | None, number: int | None, local_device_ids: Sequence[int] | None) -> None:
    """Makes this process part of a run. JAX finds arguments that are None in the environment.

    Args:
        address: host and port of process 0.
        count: number of processes.
        number: number of this process, from 0.
        local_device_ids: devices of this machine that the process takes.

    Raises:
        LaunchError: the other processes do not answer, or the environment does not say where they are.
    """
    # The CPU backend has no collectives across processes by default. Other backends ignore this setting.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator_address=address,
            num_processes=count,
            process_id=number,
            local_device_ids=local_device_ids,
            # A process with all three arguments takes all devices. Under SLURM, detection would leave it only one.
            cluster_detection_method=None if None in (address, count, number) else "deactivate",
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise LaunchError(
            f"the processes of the run cannot be joined: {error}. Check that all were started, that the address of "
            "process 0 can be reached from the others, and that its port is free"
        ) from error
    _keep_stdout_for_results()
    if not is_first():  # the first process alone draws progress bars
        os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    threading.Thread(target=_watch, name="failure-watch", daemon=True).start()


def _keep_stdout_for_results() -> None:
    """Reserves stdout for the results of process 0.

    Libraries that write to file descriptor 1 themselves, as Gloo does, then write to stderr in process 0 and to
    `/dev/null` in the others.
    """
    sys.stdout.flush()
    if is_first():
        results = os.dup(1)
        os.dup2(2, 1)
        sys.stdout = open(results, "w", encoding="utf-8", buffering=1)
    else:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)


def is_first() -> bool:
    """Returns True in process 0, which prints and writes for the whole run."""
    return number() == 0


def count() -> int:
    """Returns the number of processes of the run."""
    return int(global_state.num_processes or 1) if global_state.client is not None else 1


def number() -> int:
    """Returns the number of this process, from 0."""
    return int(global_state.process_id) if global_state.client is not None else 0


# --- waiting and comparing


@contextmanager
def own_line(name: str) -> Iterator[None]:
    """Lets this thread wait for the threads of other processes that are in a block of the same name.

    Outside such a block a thread waits for the other processes' main threads. So work in the background may wait for
    that of others at any moment, whatever the main threads wait for. Whoever started the work has to look for its
    errors: they end no process by themselves.
    """
    former, _line.name = _line.name, name
    try:
        yield
    finally:
        _line.name = former


def _next_call() -> str:
    """Returns the beginning of this call's key in the store: the calls of a line have the same order everywhere."""
    return f"jax_simpo/{_line.name}/{next(_calls[_line.name])}"


def barrier(name: str) -> None:
    """Waits until every process has called this. All processes must pass the same barriers in the same order."""
    if count() > 1:
        _client().wait_at_barrier(f"{_next_call()}/{name}", _LONGEST_WAIT_MS)


def collect(name: str, value: T) -> list[T]:
    """Returns the values of all processes, ordered by process. A value must be representable in JSON."""
    if count() == 1:
        return [value]
    key = f"{_next_call()}/{name}/"
    _client().key_value_set(f"{key}{number()}", json.dumps(value))
    barrier(name)
    texts = {int(path.rpartition("/")[2]): text for path, text in _client().key_value_dir_get(key)}
    return [json.loads(texts[i]) for i in range(count())]


def check_same(subject: str, value: Any, advice: str, error: type[UserError] = LaunchError) -> None:
    """Checks that all processes have worked out the same value.

    Args:
        subject: the noun phrase with which the error message begins.
        value: this process's value; it must be representable in JSON.
        advice: the sentence with which the error message ends.
        error: the type of the error.

    Raises:
        LaunchError: or `error`, if a value differs from process 0's. The message gives the first such process and both
            values.
    """
    digests = collect(subject, hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest())
    if len(set(digests)) == 1:
        return
    values = collect(subject, [socket.gethostname(), value])
    for number, (host, other) in enumerate(values):
        if other != values[0][1]:
            raise error(
                f"{subject}: process {number} (on {host}) has {other!r}, process 0 (on {values[0][0]}) has "
                f"{values[0][1]!r}. {advice}"
            )


def on_first(name: str, work: Callable[[], object]) -> None:
    """Calls `work` in process 0 while the others wait at the barrier `name`. If it raises, all processes end."""
    if is_first():
        work()
    barrier(name)


def first_then_others(name: str, work: Callable[[], T]) -> T:
    """Calls `work` in process 0, then in the others, which find its results in a shared cache."""
    if not is_first():
        barrier(name)
    result = work()
    if is_first():
        barrier(name)
    return result


def check_shared(folder: Path, key: str) -> None:
    """Checks that a folder which process 0 writes to is the same for all processes.

    Args:
        folder: the folder.
        key: the config key that names it, for the error message.

    Raises:
        CheckpointError: a process does not see a file that process 0 has written there.
    """
    if count() == 1:
        return
    marker = folder / f".seen-by-all-{collect('marker', secrets.token_hex(8))[0]}"
    if is_first():
        marker.touch()
    barrier("marker written")
    deadline = time.monotonic() + _SHARED_SECONDS
    while not (seen := marker.exists()) and time.monotonic() < deadline:
        time.sleep(0.5)
    blind_hosts = [host for host in collect("marker seen", "" if seen else socket.gethostname()) if host]
    if is_first():
        marker.unlink()
    if blind_hosts:
        raise CheckpointError(
            f"`{key}` {folder} is not the same folder on all hosts: {', '.join(sorted(set(blind_hosts)))} did not see "
            "what process 0 wrote there. Give a folder on a file system that all hosts share"
        )


# --- ending together


def finish() -> None:
    """Waits for all processes at the end of a command that succeeded, and disconnects from them."""
    barrier("end")
    _ending.set()
    jax.distributed.shutdown()


def fail(error: BaseException) -> None:
    """Publishes why this process fails and ends it, and so ends the others. Does not return.

    JAX's own shutdown would wait five minutes for the others, which wait for this process in a collective.
    """
    _ending.set()
    name = f"process {number()} of {count()} (on {socket.gethostname()})"
    if isinstance(error, UserError):
        reason = f"error: {error}"
    else:
        reason = visible(redact(f"{type(error).__name__}: {error}"))
        traceback.print_exception(error)
    print(f"{name}: {reason}", file=sys.stderr, flush=True)
    if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
        print(f"{name}: looking for a process that died before", file=sys.stderr, flush=True)
        _wait_for_cause(name)
    _publish(_FAILED, f"{name}: {reason}")
    _exit_now(error.status if isinstance(error, UserError) else 1)


def _wait_for_cause(name: str) -> None:
    """Waits for another process's reason, because a collective also fails here when it fails there.

    Ends this process if another one publishes a reason. If the other one was killed, its heartbeats stop and JAX's
    service ends this process with a message that names it.
    """
    deadline = time.monotonic() + HEARTBEAT_SECONDS + 15
    while time.monotonic() < deadline:
        if reasons := _published_reasons():
            print(f"{name}: ends because of {'; '.join(reasons)}", file=sys.stderr, flush=True)
            _exit_now()
        time.sleep(_POLL_SECONDS)


def _watch() -> None:
    """Ends this process when another one has published that it fails."""
    while not _ending.wait(_POLL_SECONDS):
        reasons = _published_reasons()
        if reasons and not _ending.is_set():
            name = f"process {number()} of {count()} (on {socket.gethostname()})"
            print(f"{name}: ends because of {'; '.join(reasons)}", file=sys.stderr, flush=True)
            _exit_now()


def _published_reasons() -> list[str]:
    try:
        return [text for _, text in _client().key_value_dir_get(_FAILED)]
    except jax.errors.JaxRuntimeError:  # the service is gone, and JAX ends this process because of that
        return []


def _publish(prefix: str, text: str) -> None:
    """Writes a text of this process to the store."""
    try:
        _client().key_value_set(f"{prefix}{number()}", text)
    except jax.errors.JaxRuntimeError as error:
        print(f"the reason could not be published to the other processes: {error}", file=sys.stderr, flush=True)


def _exit_now(status: int = 1) -> None:
    """Ends this process at once. Process 0 first waits for the others to end, because the store ends with it."""
    sys.stdout.flush()
    if is_first():
        deadline = time.monotonic() + _EXIT_SECONDS
        while time.monotonic() < deadline and len(_exited()) < count() - 1:
            time.sleep(0.1)
    else:
        _publish(_EXITED, "")
    os._exit(status)


def _exited() -> list[tuple[str, str]]:
    """Returns the entries of the processes that are ending."""
    try:
        entries: list[tuple[str, str]] = _client().key_value_dir_get(_EXITED)
    except jax.errors.JaxRuntimeError:
        return []
    return entries


def _client() -> Any:
    assert global_state.client is not None, "this is a run of one process"
    return global_state.client
