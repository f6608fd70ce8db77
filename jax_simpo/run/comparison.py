"""The page of several runs: their last figures side by side, and their curves in the same charts."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from jax_simpo.errors import ConfigError
from jax_simpo.run.follow import check_runs, folder_names
from jax_simpo.run.live import runs_page, watched_runs
from jax_simpo.run.report import read_run
from jax_simpo.run.whole import write_text
from jax_simpo.terminal import visible

_OWN = " · jax-simpo</title>"  # stands in every page of runs, so that a new one may replace an old one


def write_comparison(outputs: Sequence[Path], page: Path) -> Path:
    """Writes the page of runs, finished or not, and returns its path. Nothing is written to the runs' folders.

    Raises:
        CheckpointError: a folder holds no run, or no training step was logged in it.
        ConfigError: there is a file of that name that is no such page.
    """
    check_runs(list(outputs))
    if page.exists() and (not page.is_file() or _OWN not in page.read_text(encoding="utf-8", errors="replace")):
        raise ConfigError(f"--output {page}: exists already, and is no page of runs. Give another file")
    pictures = []
    for output, name in zip(outputs, folder_names(list(outputs)), strict=True):
        run = read_run(output)
        light, dark = (base64.b64encode(run.draw(theme)).decode() for theme in ("light", "dark"))
        pictures.append((visible(name), light, dark))
    write_text(page, runs_page(watched_runs(outputs), live=False, pictures=pictures))
    return page
