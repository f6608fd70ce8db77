"""Says where a run stands that makes no headway, such as one that waits for another process or for a disk."""

from __future__ import annotations

import faulthandler
import sys
from types import TracebackType
from typing import Self, TextIO


class StallWatch:
    """Prints the stack of every thread of this process when nothing was finished for a while, and goes on waiting.

    Args:
        seconds: the time without a call of `headway` after which it prints; None never prints.
        file: where it prints to, a file that the operating system knows; None stands for stderr.
    """

    def __init__(self, seconds: float | None, file: TextIO | None = None) -> None:
        self._file = file or sys.__stderr__  # a notebook's own has no number
        self._seconds = seconds if self._file is not None else None

    def headway(self) -> None:
        """Begins to count again, because something was finished."""
        if self._seconds is not None and self._file is not None:
            faulthandler.dump_traceback_later(self._seconds, repeat=True, file=self._file)

    def __enter__(self) -> Self:
        self.headway()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._seconds is not None:
            faulthandler.cancel_dump_traceback_later()
