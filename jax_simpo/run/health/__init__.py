"""Recognises known ways in which a run fails, from its settings and its records, and says so in words.

`rules` judges, without files, clocks or JAX; `watch` remembers what was said; `findings` keeps it in the run's folder.
docs/healthy-runs.md explains every finding and what it cannot see.
"""

from jax_simpo.run.health.findings import read_findings, write_findings
from jax_simpo.run.health.rules import OVERFITTING, Finding, RunTraits
from jax_simpo.run.health.watch import HealthWatch

__all__ = ["OVERFITTING", "Finding", "HealthWatch", "RunTraits", "read_findings", "write_findings"]
