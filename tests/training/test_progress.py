"""Tests what a run prints of its speed while it trains."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from jax_simpo.training.progress import TrainingProgress

RECORD = {"loss": 0.5, "rewards/accuracies": 0.75, "pairs_per_second": 8.0}
FIGURES = "loss 0.5000  accuracy 0.75  8.0 pairs/s"


def test_the_first_speed_says_that_it_includes_compilation_and_later_ones_do_not() -> None:
    out = io.StringIO()
    with TrainingProgress(Console(file=out, width=200), 2, 0, "pairs") as progress:
        progress.show(1, RECORD)
        progress.show(2, RECORD)
    assert out.getvalue().splitlines() == [f"step 1/2  {FIGURES}, compilation included", f"step 2/2  {FIGURES}"]


@pytest.mark.parametrize("steps", [1, 2])
def test_so_does_the_bar_of_a_terminal(steps: int) -> None:
    out = io.StringIO()
    with TrainingProgress(Console(file=out, width=200, force_terminal=True), 9, 0, "pairs") as progress:
        for step in range(1, steps + 1):
            progress.show(step, RECORD)
    shown = out.getvalue().split("compiling")[-1].rpartition("training")[2]  # as it was drawn last
    assert FIGURES in shown and ("compilation included" in shown) == (steps == 1)
