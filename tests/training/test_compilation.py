"""The persistent compilation cache, across processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import jax
from jax_simpo.training.compilation import keep_compiled_programs

hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event.endswith("/compilation_cache/cache_hits")))
keep_compiled_programs()
jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((8, 8)))
print(sum(hits), jax.config.jax_compilation_cache_dir)
"""


def hits_and_folder(**environment: str) -> tuple[int, str]:
    """Runs the program in a process of its own."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION") and k != "XDG_CACHE_HOME"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**inherited, "JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    hits, folder = done.stdout.split()
    return int(hits), folder


def test_a_second_run_finds_the_programs_of_the_first(tmp_path: Path) -> None:
    folder = str(tmp_path / "jax-simpo" / "xla")
    assert hits_and_folder(XDG_CACHE_HOME=str(tmp_path)) == (0, folder)
    hits, again = hits_and_folder(XDG_CACHE_HOME=str(tmp_path))
    assert hits > 0 and again == folder


def test_a_folder_the_user_chose_stays(tmp_path: Path) -> None:
    own = str(tmp_path / "own")
    assert hits_and_folder(XDG_CACHE_HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR=own)[1] == own
