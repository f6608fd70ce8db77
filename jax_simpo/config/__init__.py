"""The settings of a run: `TrainConfig`, and `load_config`, which reads one from a YAML file."""

from __future__ import annotations

from jax_simpo.config.builtin import builtin_configs
from jax_simpo.config.effects import jax_only, torch_only
from jax_simpo.config.identity import identity_of
from jax_simpo.config.load import load_config
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
    "torch_only",
]
