"""AdamW with the Trainer's schedules: what published SimPO hyper-parameters mean."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jax_simpo.config import TrainConfig

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
    clip = _clip_by_global_norm(max_grad_norm) if max_grad_norm > 0 else optax.identity()
    adamw = optax.chain(  # as `optax.adamw` has it, also in the layout of its state
        _scale_by_adam(b1, b2, eps),
        optax.add_decayed_weights(weight_decay, decay_mask),
        optax.scale_by_learning_rate(schedule),
    )
    return optax.chain(clip, adamw)


def run_optimizer(config: TrainConfig, total_steps: int) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """The learning rate of each step of a run, and its optimizer."""
    schedule = learning_rate_schedule(
        config.lr_scheduler_type,
        config.learning_rate,
        total_steps,
        count_warmup_steps(total_steps, config.warmup_steps, config.warmup_ratio),
    )
    optimizer = make_optimizer(
        schedule,
        b1=config.adam_beta1,
        b2=config.adam_beta2,
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
    )
    return schedule, optimizer


def _clip_by_global_norm(most: float) -> optax.GradientTransformation:
    """Multiplies all gradients by one number.

    optax divides each by the norm, which XLA thinks too dear to do in each of the passes that read it: it writes a
    whole second gradient first.
    """

    def clip(gradients: Any, _: Any) -> Any:
        norm = optax.tree.norm(gradients)
        factor = jnp.where(norm < most, 1.0, most / norm)
        return jax.tree.map(lambda g: g * factor, gradients)

    return optax.stateless(clip)


def _scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with bias corrections that are right to float32.

    optax computes `1 - b**t` in float32, which for b2 = 0.999 is off by up to 2e-5 in the first steps: 1 and 0.999
    agree in three digits, and those are lost. `-expm1(t log b)` loses none.
    """

    def correction(b: float, count: Array) -> Array | float:
        return -jnp.expm1(count * math.log(b)) if b else 1.0

    def update(gradients: Any, state: optax.ScaleByAdamState, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
        del params
        mu = optax.tree.update_moment(gradients, state.mu, b1, 1)
        nu = optax.tree.update_moment(gradients, state.nu, b2, 2)
        count = optax.safe_increment(state.count)
        first, second = correction(b1, count), correction(b2, count)
        updates = jax.tree.map(lambda m, v: m / first / (jnp.sqrt(v / second) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(optax.scale_by_adam().init, update)


def decay_mask(params: Any) -> Any:
    """True for every parameter that weight decay applies to."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in NOT_DECAYED, params)


def state_shardings(optimizer: optax.GradientTransformation, params: Any, shardings: Any, scalars: Any) -> Any:
    """The optimizer state's shardings: moments lie where their parameter lies, counters on every device (`scalars`)."""
    state = jax.eval_shape(optimizer.init, params)
    return optax.tree.map_params(
        optimizer, lambda _, sharding: sharding, state, shardings, transform_non_params=lambda _: scalars
    )
