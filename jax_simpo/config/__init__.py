"""The settings of a run: `TrainConfig`, and `load_config`, which reads one from a YAML file.

The tables of this package (`schedules`, `objectives`) can be imported where pydantic is missing: a name below brings
the schema along only when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax_simpo.config.builtin import builtin_configs
    from jax_simpo.config.effects import jax_only, torch_only
    from jax_simpo.config.identity import identity_of
    from jax_simpo.config.load import load_config, read_overrides
    from jax_simpo.config.objectives import parts as objective_weights
    from jax_simpo.config.schema import MeshConfig, TrainConfig

__all__ = [
    "MeshConfig",
    "TrainConfig",
    "builtin_configs",
    "identity_of",
    "jax_only",
    "load_config",
    "objective_weights",
    "read_overrides",
    "torch_only",
]

# Name -> its module, and its name there.
_SOURCES = {
    "MeshConfig": ("schema", "MeshConfig"),
    "TrainConfig": ("schema", "TrainConfig"),
    "builtin_configs": ("builtin", "builtin_configs"),
    "identity_of": ("identity", "identity_of"),
    "jax_only": ("effects", "jax_only"),
    "load_config": ("load", "load_config"),
    "objective_weights": ("objectives", "parts"),
    "read_overrides": ("load", "read_overrides"),
    "torch_only": ("effects", "torch_only"),
}


def __getattr__(name: str) -> Any:
    """Imports a name when it is first used."""
    if name not in _SOURCES:
        raise AttributeError(f"module 'jax_simpo.config' has no attribute {name!r}")
    module, its_name = _SOURCES[name]
    value = getattr(import_module(f"jax_simpo.config.{module}"), its_name)
    globals()[name] = value
    return value
