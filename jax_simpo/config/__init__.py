"""The settings of a run: `TrainConfig`, and `load_config`, which reads one from a YAML file."""

from __future__ import annotations

from jax_simpo.config.builtin import builtin_configs
from jax_simpo.config.load import load_config
from jax_simpo.config.objectives import parts as objective_weights
from jax_simpo.config.schema import TORCH_ONLY, MeshConfig, TrainConfig, jax_only, torch_only

__all__ = [
    "TORCH_ONLY",
    "MeshConfig",
    "TrainConfig",
    "builtin_configs",
    "jax_only",
    "load_config",
    "objective_weights",
    "torch_only",
]
