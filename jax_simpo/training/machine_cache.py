"""The folder in which a machine keeps what runs need not find out twice, such as compiled programs."""

from __future__ import annotations

import os
from pathlib import Path


def machine_cache(name: str) -> Path | None:
    """Returns a folder in the user's cache folder (`XDG_CACHE_HOME`, by default `~/.cache`), and makes it.

    Without a home that can be written to there is none, and the answer is None.

    Args:
        name: what is kept there.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jax-simpo" / name
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    return folder
