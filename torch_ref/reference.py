"""Computes the log-probs of all responses under the frozen reference model, once and before training.

The reference is loaded, used and freed before the policy is made, so that two models are never in memory together.
Only a sum for each response is kept, in the cache that both trainers use (`jax_simpo.run.reference_cache`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.console import Console

from jax_simpo.data.packing import StepPlan
from jax_simpo.data.store import cache_root
from jax_simpo.data.tokenize import GroupDataset
from jax_simpo.run.reference_cache import ReferenceCache
from jax_simpo.run.resume import BASE_WEIGHTS, REFERENCE_WEIGHTS
from torch_ref.distributed import Ranks
from torch_ref.evaluate import GROUPS_PER_PLAN, Forward, open_model, score_steps
from torch_ref.setup import Setup

ReferenceSums = Float[np.ndarray, " R"]


def reference_sums(
    setup: Setup, splits: Sequence[GroupDataset], console: Console, deepspeed_file: Path | None = None
) -> list[ReferenceSums]:
    """Returns for each split the sum of log-probs of every response, float32, from the cache or computed.

    Every rank calls it, before it makes another model; the ranks share the work. The first rank alone reads and writes
    the cache. It writes after every few hundred groups, so that a pass that is interrupted can be continued.

    Args:
        setup: the setup of the run, of whose config the reference is.
        splits: the groups, split by split.
        console: where notes go.
        deepspeed_file: a DeepSpeed JSON file, as for training.

    Raises:
        ModelError: there is no such model, or it has fewer tokens than the tokenizer of the run.
        DataError: the cache is damaged, or belongs to another reference.
    """
    reference, ranks = setup.reference, setup.ranks
    plans = [reference.step_plan(groups, batch=GROUPS_PER_PLAN, seed=None) for groups in splits]
    identity, root = _identity(reference), cache_root(setup.config.data_cache_dir)
    passes = []
    for groups, plan in zip(splits, plans, strict=True):
        own = {**identity, "tokens": groups.fingerprint}
        cache = ReferenceCache(root, own, len(groups), len(groups.lengths.ranks), GROUPS_PER_PLAN)
        passes.append(_Pass(groups, replace(plan, prompt_targets=False), cache, ranks, ranks.first(cache.read)))
        console.print(passes[-1].note())
    if any(p.steps_left for p in passes):
        with open_model(reference, deepspeed_file) as forward:
            for one in passes:
                one.run(forward)
    return [np.concatenate(one.parts) for one in passes]


def frozen_weights(setup: Setup) -> dict[str, Any]:
    """Identifies the weights that a run needs and does not save. Every rank calls it.

    They are those of its reference, and those under its adapter where they are not the same.
    """
    has_reference = setup.objective.needs_reference
    frozen: dict[str, Any] = {REFERENCE_WEIGHTS: setup.reference.start_weights} if has_reference else {}
    if setup.config.use_peft and (not has_reference or setup.config.ref_model_name_or_path is not None):
        frozen[BASE_WEIGHTS] = list(setup.start_weights)[:1]  # an adapter has a model to lie on
    return frozen


@dataclass
class _Pass:
    """The computation of one split's sums.

    Attributes:
        groups: the groups of the split.
        plan: their step plan, in file order.
        cache: the cache of their sums.
        ranks: the ranks of the run.
        parts: the sums that are known so far, in file order: an array for each step of the plan.
    """

    groups: GroupDataset
    plan: StepPlan
    cache: ReferenceCache
    ranks: Ranks
    parts: list[ReferenceSums]

    @property
    def steps_left(self) -> range:
        """The steps of the plan whose sums are not known."""
        return range(len(self.parts), self.plan.steps_per_epoch)

    def note(self) -> str:
        """Returns a line on what is found and what is to be computed."""
        what = f"log-probs of {len(self.groups)} {self.groups.lengths.noun} of {self.groups.name}"
        if not self.steps_left:
            return f"reference: {what} found in {self.cache.folder}"
        known = len(self.parts) * GROUPS_PER_PLAN
        return f"reference: computing the {what}" + (f", {known} of them done" if known else "")

    def run(self, forward: Forward) -> None:
        """Computes the steps that are left, and writes each to the cache."""
        steps = self.steps_left
        scored = score_steps(forward, self.plan, self.groups, self.ranks, steps)
        for step, (sums, _) in zip(steps, scored, strict=True):
            self.parts.append(sums)
            self.ranks.first(partial(self.cache.write, step, sums))


def _identity(reference: Setup) -> dict[str, Any]:
    """Returns everything about the reference that its log-probs depend on. Every rank calls it."""
    config, own = reference.config, reference.model_choice is None  # another reference is never quantised
    quantized = {key: own and getattr(config, key) for key in ("load_in_4bit", "load_in_8bit")}
    return {"trainer": "torch_ref", "weights": reference.start_weights, "dtype": config.dtype, **quantized}
