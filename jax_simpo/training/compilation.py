"""Keeps compiled programs between runs, so that the second start of a run does not compile again."""

from __future__ import annotations

import os
from pathlib import Path

import jax


def keep_compiled_programs() -> None:
    """Switches JAX's persistent compilation cache on, in the user's cache folder. Call it before anything is compiled.

    A folder of your own (`JAX_COMPILATION_CACHE_DIR`) stays, and so does a cache that you switched off
    (`JAX_ENABLE_COMPILATION_CACHE=false`). JAX does not keep programs that compile within a second.
    """
    if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        return
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jax-simpo" / "xla"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # without a home that can be written to, every run compiles
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
