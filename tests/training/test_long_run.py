"""A long run takes no more memory, threads and files at its end than in its middle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEPS, SAVE = 2000, 50
# Counts after every record. Runs in a process of its own: what it asks of the allocator has to be asked at its start.
CHILD = f"""
import gc, io, json, os, sys
from pathlib import Path
from rich.console import Console
from jax_simpo.training import trainer
from tests.training.runs import config_of

counted = []

def count(record):
    if record.get("step", 0) % 100 == 0 and "step" in record:
        gc.collect()
        memory = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        counted.append([memory, len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))])
    return False

folder = Path(sys.argv[1])
config = config_of(folder, max_steps={STEPS}, logging_steps=10, save_steps={SAVE}, save_total_limit=2)
trainer.train(config, Console(file=io.StringIO()), on_record=count)
(folder / "counted.json").write_text(json.dumps(counted))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs the /proc of Linux")
def test_memory_threads_and_files_stay_the_same(tmp_path: Path) -> None:
    # With one arena malloc gives memory back to whoever asks next. With many, each thread that a save starts may find
    # another one, and freed memory lies scattered.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    counted = json.loads((tmp_path / "counted.json").read_text())
    assert len(counted) == STEPS // 100
    memory, threads, files = zip(*counted, strict=True)
    half = len(counted) // 2
    print([round(size / 2**20, 1) for size in memory], threads, files)
    assert max(memory[half:]) < 1.02 * max(memory[:half])
    assert max(threads[half:]) <= max(threads[:half]) and max(files[half:]) <= max(files[:half])
