"""Keeps compiled programs between runs, so that the second start of a run does not compile again."""

from __future__ import annotations

import jax

from jax_simpo.training.machine_cache import machine_cache


def keep_compiled_programs() -> None:
    """Switches JAX's persistent compilation cache on, in the user's cache folder. Call it before anything is compiled.

    A folder of your own (`JAX_COMPILATION_CACHE_DIR`) stays, and so does a cache that you switched off
    (`JAX_ENABLE_COMPILATION_CACHE=false`). JAX does not keep programs that compile within a second.
    """
    if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        return
    if (folder := machine_cache("xla")) is not None:  # else every run compiles
        jax.config.update("jax_compilation_cache_dir", str(folder))
