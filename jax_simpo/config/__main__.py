"""Prints docs/config.md, the reference page of all keys: `python -m jax_simpo.config`."""

from __future__ import annotations

from jax_simpo.config import help
from jax_simpo.config.schema import TrainConfig

print(help.reference_page(TrainConfig), end="")
