"""Shows the progress of a run on the terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class TrainingProgress:
    """Shows a bar with the step, loss, accuracy, pairs per second and time left.

    Without a terminal it prints a line every few seconds instead.
    """

    _SECONDS_BETWEEN_LINES = 5.0

    def __init__(self, console: Console, total_steps: int, first_step: int) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("steps", total=total_steps, completed=first_step, figures="compiling")
        self._total = total_steps
        self._next_line = 0.0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, step: int, record: Mapping[str, Any]) -> None:
        """Shows the figures of a step's record: its loss, accuracy and pairs per second."""
        figures = (
            f"loss {record['loss']:.4f}  accuracy {record['rewards/accuracies']:.2f}  "
            f"{record['pairs_per_second']:.1f} pairs/s"
        )
        self._bar.update(self._task, completed=step, figures=figures)
        if not self._console.is_terminal and (time.monotonic() >= self._next_line or step == self._total):
            self._console.print(f"step {step}/{self._total}  {figures}")
            self._next_line = time.monotonic() + self._SECONDS_BETWEEN_LINES

    def advance(self, step: int) -> None:
        """Moves the bar to a step without new figures."""
        self._bar.update(self._task, completed=step)
