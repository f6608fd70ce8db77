"""Shows the progress of a run: a bar on a terminal or in a notebook, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class TrainingProgress:
    """Shows a bar with the step, loss, accuracy, pairs per second and time left.

    Without a terminal or a notebook it prints a line every few seconds instead.
    """

    _SECONDS_BETWEEN_LINES = 5.0

    def __init__(self, console: Console, total_steps: int, first_step: int, noun: str) -> None:
        self._console, self._noun = console, noun
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
        self._notebook = _NotebookBar(total_steps, first_step) if console.is_jupyter and not console.quiet else None
        self._next_line = 0.0
        self._remark = ", compilation included"  # in the first figures

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, step: int, record: Mapping[str, Any]) -> None:
        """Shows the figures of a step's record: its loss, accuracy and pairs, or groups, per second."""
        figures = (
            f"loss {record['loss']:.4f}  accuracy {record['rewards/accuracies']:.2f}  "
            f"{record['pairs_per_second']:.1f} {self._noun}/s{self._remark}"
        )
        self._remark = ""
        self._bar.update(self._task, completed=step, figures=figures)
        if self._notebook is not None:
            self._notebook.update(step, figures)
        elif not self._console.is_terminal and (time.monotonic() >= self._next_line or step == self._total):
            self._console.print(f"step {step}/{self._total}  {figures}")
            self._next_line = time.monotonic() + self._SECONDS_BETWEEN_LINES

    def advance(self, step: int) -> None:
        """Moves the bar to a step without new figures."""
        self._bar.update(self._task, completed=step)


class GroupLines:
    """Prints now and then how many groups are done, and how long the rest will take: on a terminal and elsewhere."""

    _SECONDS_BETWEEN_LINES = 30.0

    def __init__(self, console: Console, name: str, total: int, done: int, noun: str) -> None:
        self._console, self._name, self._total, self._first, self._noun = console, name, total, done, noun
        self._started = time.monotonic()
        self._next_line = self._started + self._SECONDS_BETWEEN_LINES

    def show(self, done: int) -> None:
        """Prints a line if the last one is a while ago and groups are left."""
        now = time.monotonic()
        if now < self._next_line or done == self._total:
            return
        left = (now - self._started) / (done - self._first) * (self._total - done)
        minutes = "less than a minute" if left < 60 else f"about {left / 60:.0f} min"
        self._console.print(f"{self._name}: {done} of {self._total} {self._noun}, {minutes} left")
        self._next_line = now + self._SECONDS_BETWEEN_LINES


class _NotebookBar:
    """A bar in the output of a notebook's cell, redrawn in place. (rich draws none there without ipywidgets.)"""

    _SECONDS_BETWEEN_UPDATES = 0.2

    def __init__(self, total_steps: int, first_step: int) -> None:
        from IPython.display import display  # where there is a notebook there is IPython

        self._total, self._figures, self._next_update = total_steps, "compiling", 0.0
        self._handle = display(self._drawn(first_step), raw=True, display_id=True)

    def update(self, step: int, figures: str | None = None) -> None:
        """Redraws the bar, a few times a second at most; the last step is always drawn."""
        self._figures = figures or self._figures
        if time.monotonic() >= self._next_update or step == self._total:
            self._handle.update(self._drawn(step), raw=True)
            self._next_update = time.monotonic() + self._SECONDS_BETWEEN_UPDATES

    def _drawn(self, step: int) -> dict[str, str]:
        text = f"step {step}/{self._total}  {self._figures}"
        return {"text/plain": text, "text/html": f'<progress value="{step}" max="{self._total}"></progress> {text}'}
