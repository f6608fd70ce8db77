"""Computes the log-probs of all pairs under the frozen reference model, once and before training.

The reference is loaded, scored and dropped before the policy trains, so that two models are never in memory together.
Only two sums a pair are kept, in a cache (`run/reference_cache.py`).
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
from jax_simpo.data.tokenize import PairDataset
from jax_simpo.models.transformer import Params
from jax_simpo.processes import distributed
from jax_simpo.run.reference_cache import ReferenceCache, model_digest
from jax_simpo.training.evaluate import PAIRS_PER_PLAN, score_steps
from jax_simpo.training.progress import PairLines
from jax_simpo.training.setup import Setup
from jax_simpo.training.step import make_score_function

ReferenceSums = Float[np.ndarray, "P 2"]


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
        setup = self.setup
        base, adapter = setup.start.folder(weights=True), setup.start.adapter
        if base is None:
            weights: Any = {"model": setup.new_model_mapping(), "seed": setup.config.seed, "jax": jax.__version__}
        else:
            folders = [base, *([] if adapter is None else [adapter.folder])]
            digests = [model_digest(folder) for folder in folders] if distributed.is_first() else []
            weights = distributed.collect("reference weights", digests)[0]
        return {"weights": weights, "dtype": setup.config.dtype}

    def sums(self, pairs: PairDataset, console: Console) -> ReferenceSums:
        """Returns the sums of log-probs of the chosen and rejected response of every pair, from the cache or computed.

        Every process of the run calls it; they share the work.

        Raises:
            DataError: the cache is damaged, or belongs to another reference.
        """
        setup = self.setup
        plan = replace(setup.step_plan(pairs, batch=PAIRS_PER_PLAN, seed=None), prompt_targets=False)
        identity = {**self.identity, "tokens": pairs.fingerprint}
        cache = ReferenceCache(cache_root(setup.config.data_cache_dir), identity, len(pairs), PAIRS_PER_PLAN)
        sums = cache.read()
        first = min(distributed.collect("reference", -(-len(sums) // PAIRS_PER_PLAN)))
        steps = range(first, plan.steps_per_epoch)
        if not steps:
            console.print(f"reference: log-probs of {len(pairs)} pairs of {pairs.name} found in {cache.folder}")
            return sums
        done = f", {first * PAIRS_PER_PLAN} of them done" if first else ""
        console.print(f"reference: computing the log-probs of {len(pairs)} pairs of {pairs.name}{done}")
        parts = [sums[: first * PAIRS_PER_PLAN]]
        lines = PairLines(console, "reference", len(pairs), len(parts[0]))
        with jax.set_mesh(setup.mesh):
            score = make_score_function(setup.forward, setup.mesh)
            scored = score_steps(score, self.params, plan, pairs, setup.mesh, steps)
            for step, (_, of_step, _) in zip(steps, scored, strict=True):
                parts.append(of_step[:, :2])
                if distributed.is_first():
                    cache.write(step, parts[-1])
                lines.show(sum(map(len, parts)))
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
