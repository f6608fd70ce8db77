"""Libraries do not print again what this program tells in its own words; all else they say is printed."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from jax_simpo.run import checkpoint, quiet


def test_a_warning_of_the_hub_is_printed_once() -> None:
    program = (
        "import logging, jax_simpo.run.checkpoint; assert logging.getLogger().handlers; "
        "logging.getLogger('huggingface_hub.utils').warning('slow'); logging.getLogger('datasets').warning('old')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == ["slow", "old"]


@pytest.mark.parametrize(
    ("error", "printed"), [(ValueError("at /run/.2.writing.orbax-checkpoint-tmp: full"), False), (KeyError("x"), True)]
)
def test_only_further_errors_of_a_failed_save_are_left_out(error: Exception, printed: bool) -> None:
    assert checkpoint  # it sets the filter
    stream = io.StringIO()
    logger, handler = logging.getLogger("asyncio"), logging.StreamHandler(stream)
    logger.addHandler(handler)
    logger.error("Future exception was never retrieved", exc_info=error)
    logger.removeHandler(handler)
    assert ("never retrieved" in stream.getvalue()) == printed


@pytest.mark.parametrize(("text", "passed_on"), [("Event loop is closed", False), ("Something else", True)])
def test_errors_for_a_closed_loop_are_left_out_in_threads(
    text: str, passed_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    quiet.quieten_saves()
    quiet.quieten_saves()
    unraisable = SimpleNamespace(exc_value=RuntimeError(text), exc_traceback=None)
    thread = threading.Thread(target=sys.unraisablehook, args=(unraisable,))
    thread.start()
    thread.join()
    assert bool(seen) == passed_on
    sys.unraisablehook(unraisable)  # in the main thread there is a caller who should know
    assert seen[-1] is unraisable
