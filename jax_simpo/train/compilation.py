"""Compiled programs are kept between runs, so that the second start of a run does not compile again."""

from __future__ import annotations

import os
from pathlib import Path

import jax


def keep_compiled_programs() -> None:
    """Switches JAX's persistent compilation cache on, in the user's cache folder. Call it before anything is compiled.

    Where the user has chosen a folder (`JAX_COMPILATION_CACHE_DIR`) or has switched the cache off
    (`JAX_ENABLE_COMPILATION_CACHE=false`), that stays. What compiles within a second (JAX's own bound) is not kept.
    """
    if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        return
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jax-simpo" / "xla"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or none that can be written to: then every run compiles
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
