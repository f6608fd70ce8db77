"""The folder in which a machine keeps what runs need not find out twice, such as compiled programs."""

from __future__ import annotations

import os
from pathlib import Path


def machine_cache(name: str) -> Path | None:
    """Returns a folder in the user's cache folder (`XDG_CACHE_HOME`, by default `~/.cache`), and makes it.

    Where it cannot be made, or written to, the answer is None.

    Args:
        name: what is kept there.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jax-simpo" / name
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None
