"""Keeps libraries from printing again, or as tracebacks, what this program tells itself, and from printing secrets.

Nothing is dropped that is not also raised, or printed once already.
"""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from jax_simpo.redact import redact

_CLOSED_LOOP = "Event loop is closed"
_NEVER_RETRIEVED = "exception was never retrieved"
# They print their warnings themselves. Orbax gives the root logger a handler, which would print each of them again.
_PRINT_THEMSELVES = ("huggingface_hub", "datasets")
# They log the addresses that they ask, with the login of HF_ENDPOINT, MLFLOW_TRACKING_URI or a proxy, or signed ones.
_LOG_ADDRESSES = (
    *("huggingface_hub", "datasets", "transformers", "mlflow", "trackio", "wandb"),
    *("urllib3", "httpx", "httpx2", "httpcore"),
)


def quieten() -> None:
    """Sets up the loggers of the libraries; `jax_simpo.run.checkpoint` calls it, which imports Orbax."""
    logging.getLogger("absl").addFilter(_is_news)
    logging.getLogger("asyncio").addFilter(_is_no_failed_save)
    for name in _PRINT_THEMSELVES:
        logging.getLogger(name).propagate = False
    hide_secrets()


def hide_secrets() -> None:
    """Takes the secrets out of what libraries log from now on, whoever prints it."""
    former = logging.getLogRecordFactory()
    if not isinstance(former, _Redacting):
        logging.setLogRecordFactory(_Redacting(former))


class _Redacting:
    """Makes log records as the former factory does; those of `_LOG_ADDRESSES` without secrets."""

    def __init__(self, former: Callable[..., logging.LogRecord]) -> None:
        self._former = former

    def __call__(self, *arguments: Any, **more: Any) -> logging.LogRecord:
        record = self._former(*arguments, **more)
        if record.name.partition(".")[0] in _LOG_ADDRESSES:
            with suppress(TypeError, ValueError):  # arguments that do not fit the text: logging tells of them itself
                record.msg, record.args = redact(record.getMessage()), None
        return record


def quieten_saves() -> None:
    """Drops the tracebacks of a failed save of Orbax of which arrays are still being written.

    The first error closes the loop that the others would tell theirs to. Their threads then have no caller to raise
    that to, so Python hands it to `sys.unraisablehook`. Others may have put a hook there since the last call.
    """
    if not isinstance(sys.unraisablehook, _Hook):
        sys.unraisablehook = _Hook(sys.unraisablehook)


class _Hook:
    """A hook that leaves out what `quieten_saves` describes, and hands all else to the former hook."""

    def __init__(self, former: Callable[[Any], object]) -> None:
        self._former = former

    def __call__(self, unraisable: Any) -> None:
        error = unraisable.exc_value
        frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(unraisable.exc_traceback)]
        of_loop = isinstance(error, RuntimeError) and str(error) == _CLOSED_LOOP and all("asyncio" in f for f in frames)
        if not of_loop or threading.current_thread() is threading.main_thread():
            self._former(unraisable)


def _is_news(record: logging.LogRecord) -> bool:
    """Returns False for the tracebacks of errors that Orbax raises as well."""
    return not (record.exc_info and "orbax" in record.pathname)


def _is_no_failed_save(record: logging.LogRecord) -> bool:
    """Returns False for the further errors of a save of which Orbax has raised the first."""
    error = record.exc_info[1] if record.exc_info else None
    if error is None or _NEVER_RETRIEVED not in record.getMessage():
        return True
    frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    return not (any("orbax" in name for name in frames) or "orbax" in str(error))
