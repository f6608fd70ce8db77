"""Preference objectives: pure functions from the log-probs of responses to losses and metrics.

To add an objective, add its class to a file here, its line to `OBJECTIVES`, and its keys to
`jax_simpo.config.objectives.OBJECTIVE_KEYS`.
"""

from __future__ import annotations

from jax_simpo.objectives.base import Objective, Responses
from jax_simpo.objectives.dpo import DPO
from jax_simpo.objectives.registry import OBJECTIVES, WeightedSum, make_objective
from jax_simpo.objectives.simpo import SimPO

__all__ = ["DPO", "OBJECTIVES", "Objective", "Responses", "SimPO", "WeightedSum", "make_objective"]
