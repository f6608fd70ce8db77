"""A run that makes no headway says where its threads stand."""

from __future__ import annotations

import threading
from pathlib import Path

from jax_simpo.run.stalls import StallWatch


def stand_still(printed: Path) -> None:
    """Waits until something is printed, two minutes at most."""
    waiting = threading.Event()
    for _ in range(12_000):
        if printed.stat().st_size:
            return
        waiting.wait(0.01)


def test_the_stack_of_every_thread_is_printed(tmp_path: Path) -> None:
    end = threading.Event()
    other = threading.Thread(target=end.wait, name="other")
    other.start()
    with (tmp_path / "printed").open("w") as file, StallWatch(0.1, file):
        stand_still(tmp_path / "printed")
    end.set()
    other.join()
    printed = (tmp_path / "printed").read_text()
    assert "Timeout" in printed and "in stand_still" in printed and printed.count("Thread 0x") >= 2


def test_a_run_that_makes_headway_or_has_ended_prints_nothing(tmp_path: Path) -> None:
    with (tmp_path / "printed").open("w") as file:
        with StallWatch(3600, file) as watch:
            watch.headway()
        with StallWatch(None, file) as watch:
            watch.headway()
    assert not (tmp_path / "printed").read_text()
