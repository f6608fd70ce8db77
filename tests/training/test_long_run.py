"""A long run takes no more memory, threads and open files at its end than at its beginning."""

from __future__ import annotations

import os
import threading
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from jax_simpo.training import trainer
from tests.training.runs import config_of

STEPS, EVERY = 2000, 100


def resources() -> tuple[int, int, int]:
    """Returns the memory of this process in KiB, its threads, and its open files."""
    status = Path("/proc/self/status").read_text()
    (memory,) = (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    return memory, threading.active_count(), len(os.listdir("/proc/self/fd"))


@pytest.mark.slow
@pytest.mark.parametrize("save_steps", [EVERY, 10 * STEPS])
def test_two_thousand_steps_leave_memory_threads_and_files_as_they_were(save_steps: int, tmp_path: Path) -> None:
    config = config_of(
        tmp_path,
        max_steps=STEPS,
        global_batch_size=8,
        logging_steps=EVERY,
        save_steps=save_steps,
        save_total_limit=1,
        dataset_splits=["train", "test"],
        eval_strategy="steps",
        eval_steps=5 * EVERY,
    )
    seen: list[tuple[int, int, int]] = []
    seconds: list[float] = []

    def on_record(record: dict[str, Any]) -> bool:
        if "step" in record:
            seen.append(resources())
            seconds.append(record["total_seconds"])
        return False

    trainer.train(config, Console(file=StringIO()), on_record=on_record)
    assert len(seen) == STEPS // EVERY
    settled, last = seen[4], seen[-1]  # by then every program is compiled and every thread pool has its threads
    print(seen, seconds)
    assert last[1:] == settled[1:]
    assert last[0] - settled[0] < 16 * 1024
