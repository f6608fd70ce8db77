"""Computes the log-probs of all responses under the frozen reference model, once and before training.

The reference is loaded, scored and dropped before the policy trains, so that two models are never in memory together.
Only a sum for each response is kept, in a cache (`run/reference_cache.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from rich.console import Console

from jax_simpo.data.store import cache_root
from jax_simpo.data.tokenize import GroupDataset
from jax_simpo.models.transformer import Params
from jax_simpo.processes import distributed
from jax_simpo.run.reference_cache import ReferenceCache, model_digest
from jax_simpo.run.resume import BASE_WEIGHTS, REFERENCE_WEIGHTS
from jax_simpo.training.evaluate import GROUPS_PER_PLAN, score_steps
from jax_simpo.training.progress import GroupLines
from jax_simpo.training.setup import Setup
from jax_simpo.training.step import make_score_function

ReferenceSums = Float[np.ndarray, " R"]


def frozen_weights(setup: Setup, reference: Reference | None) -> dict[str, Any]:
    """Identifies the weights that a run needs and does not save. Every process calls it.

    They are those of its reference, and those under its adapter where they are not the same.
    """
    frozen = {} if reference is None else {REFERENCE_WEIGHTS: reference.identity["weights"]}
    if setup.config.use_peft and (reference is None or setup.config.ref_model_name_or_path is not None):
        frozen[BASE_WEIGHTS] = start_weights(setup, adapter=False)
    return frozen


def start_weights(setup: Setup, *, adapter: bool = True) -> list[str] | dict[str, Any]:
    """Identifies the weights to start from by digests of their folders, or by all that random weights depend on.

    Every process calls it.

    Args:
        setup: the setup of the model.
        adapter: the digest of an adapter is one of them.
    """
    base, lora = setup.start.folder(weights=True), setup.start.adapter
    if base is None:
        return {"model": setup.new_model_mapping(), "seed": setup.config.seed, "jax": jax.__version__}
    folders = [base, *([lora.folder] if lora is not None and adapter else [])]
    digests = [model_digest(folder) for folder in folders] if distributed.is_first() else []
    return distributed.collect("weights", digests)[0]


@dataclass
class Reference:
    """The frozen reference of a run: `ref_model_name_or_path`, or else the model that the run starts from.

    Attributes:
        setup: the setup of the reference, on the mesh of the run.
    """

    setup: Setup
    _params: Params | None = field(default=None, repr=False)

    @classmethod
    def of(cls, setup: Setup) -> Reference:
        """Returns the reference of a run, whatever model of it a command works on."""
        return cls(setup.reference)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything about the reference that its log-probs depend on. Every process calls it."""
        return {"weights": start_weights(self.setup), "dtype": self.setup.config.dtype}

    def sums(self, pairs: GroupDataset, console: Console) -> ReferenceSums:
        """Returns the sum of log-probs of every response, group after group, from the cache or computed.

        Every process of the run calls it; they share the work.

        Raises:
            DataError: the cache is damaged, or belongs to another reference.
        """
        setup = self.setup
        plan = replace(setup.step_plan(pairs, batch=GROUPS_PER_PLAN, seed=None), prompt_targets=False)
        identity = {**self.identity, "tokens": pairs.fingerprint}
        root = cache_root(setup.config.data_cache_dir)
        cache = ReferenceCache(root, identity, len(pairs), len(pairs.lengths.ranks), GROUPS_PER_PLAN)
        parts = cache.read()
        first = min(distributed.collect("reference", len(parts)))
        parts, steps = parts[:first], range(first, plan.steps_per_epoch)
        of_split = f"log-probs of {len(pairs)} {pairs.lengths.noun} of {pairs.name}"
        if not steps:
            console.print(f"reference: {of_split} found in {cache.folder}")
            return np.concatenate(parts)
        ready = first * GROUPS_PER_PLAN
        done = f", {ready} of them done" if first else ""
        console.print(f"reference: computing the {of_split}{done}")
        lines = GroupLines(console, "reference", len(pairs), ready, pairs.lengths.noun)
        forward = setup.forward_of(plan)
        with jax.set_mesh(setup.mesh):
            score = make_score_function(forward, setup.mesh)
            scored = score_steps(score, self.params, plan, pairs, setup.mesh, steps)
            for step, (sums, _) in zip(steps, scored, strict=True):
                parts.append(sums)
                if distributed.is_first():
                    cache.write(step, sums)
                lines.show(min((step + 1) * GROUPS_PER_PLAN, len(pairs)))
        return np.concatenate(parts)

    @property
    def params(self) -> Params:
        """The parameters of the reference, loaded when they are first needed; `take` lets go of them."""
        if self._params is None:
            with jax.set_mesh(self.setup.mesh):
                self._params = self.setup.load_params()
        return self._params

    def take(self) -> Params | None:
        """Hands over the parameters if they are loaded and a run starts from them; lets go of them in any case."""
        params, self._params = self._params, None
        return params if self.setup.config.ref_model_name_or_path is None else None
