"""`python -m jax_simpo` is the `jax-simpo` command."""

from __future__ import annotations

from jax_simpo.cli import main

if __name__ == "__main__":
    main()
