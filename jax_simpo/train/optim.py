"""AdamW with the Trainer's schedules: what published SimPO hyper-parameters mean."""

from __future__ import annotations

import math
from typing import Any

import jax
import optax

NOT_DECAYED = ("scale", "bias")  # norms and biases, by the last key of a parameter's path


def learning_rate_schedule(kind: str, peak: float, total_steps: int, warmup_steps: int) -> optax.Schedule:
    """Learning rate of optimizer step k (from 0), as `transformers.get_scheduler` has it.

    Warm-up is linear from 0, so step 0 of a run with warm-up does not move the parameters. `constant` has none,
    whatever `warmup_steps` says.
    """
    decay_steps = max(1, total_steps - warmup_steps)
    match kind:
        case "cosine":
            main = optax.cosine_decay_schedule(peak, decay_steps)
        case "linear":
            main = optax.linear_schedule(peak, 0.0, decay_steps)
        case "constant":
            return optax.constant_schedule(peak)
        case "constant_with_warmup":
            main = optax.constant_schedule(peak)
        case _:
            raise ValueError(f"no learning-rate schedule is called {kind!r}")
    if not warmup_steps:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup_steps), main], [warmup_steps])


def count_warmup_steps(total_steps: int, warmup_steps: int, warmup_ratio: float) -> int:
    """`warmup_steps` where given, else that ratio of the run, rounded up."""
    return warmup_steps if warmup_steps > 0 else math.ceil(total_steps * warmup_ratio)


def make_optimizer(
    schedule: optax.Schedule, *, b1: float, b2: float, eps: float, weight_decay: float, max_grad_norm: float
) -> optax.GradientTransformation:
    """Clips by the global norm (0: never), then AdamW; norms and biases are not decayed."""
    clip = optax.clip_by_global_norm(max_grad_norm) if max_grad_norm > 0 else optax.identity()
    adamw = optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decay_mask)
    return optax.chain(clip, adamw)


def decay_mask(params: Any) -> Any:
    """True for every parameter that weight decay applies to."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in NOT_DECAYED, params)


def state_shardings(optimizer: optax.GradientTransformation, params: Any, shardings: Any, scalars: Any) -> Any:
    """The optimizer state's shardings: moments lie where their parameter lies, counters on every device (`scalars`)."""
    state = jax.eval_shape(optimizer.init, params)
    return optax.tree.map_params(
        optimizer, lambda _, sharding: sharding, state, shardings, transform_non_params=lambda _: scalars
    )
