"""AdamW with the learning-rate schedules of transformers' Trainer, which published SimPO settings were made for."""

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
    """Returns the learning rate as a function of the step number (from 0), as `transformers.get_scheduler` does.

    Warm-up is linear from 0, so step 0 of a run with warm-up does not move the parameters. `constant` ignores
    `warmup_steps`.

    Raises:
        ValueError: no schedule is called `kind`.
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
    """Returns `warmup_steps` if it is positive, else `warmup_ratio` of the run, rounded up."""
    return warmup_steps if warmup_steps > 0 else math.ceil(total_steps * warmup_ratio)


def make_optimizer(
    schedule: optax.Schedule, *, b1: float, b2: float, eps: float, weight_decay: float, max_grad_norm: float
) -> optax.GradientTransformation:
    """Builds an optimizer that clips by the global norm (0: never) and applies AdamW; norms and biases do not decay."""
    clip = _clip_by_global_norm(max_grad_norm) if max_grad_norm > 0 else optax.identity()
    adamw = optax.chain(  # the chain of `optax.adamw`, so that the state has the same layout
        _scale_by_adam(b1, b2, eps),
        optax.add_decayed_weights(weight_decay, decay_mask),
        optax.scale_by_learning_rate(schedule),
    )
    return optax.chain(clip, adamw)


def run_optimizer(config: TrainConfig, total_steps: int) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """Builds a run's learning-rate schedule and its optimizer."""
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


def _clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Clips like `optax.clip_by_global_norm`, with one multiplication per gradient.

    optax divides each gradient by the norm. XLA does not repeat a division in every pass that reads its result, but
    stores the result: a second copy of all gradients.
    """

    def clip(gradients: Any, _: Any) -> Any:
        norm = optax.tree.norm(gradients)
        factor = jnp.where(norm < max_norm, 1.0, max_norm / norm)
        return jax.tree.map(lambda g: g * factor, gradients)

    return optax.stateless(clip)


def _scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Scales like `optax.scale_by_adam`, with bias corrections that are exact to float32.

    optax computes `1 - b**t` in float32. For b2 = 0.999 that is off by up to 2e-5 in the first steps, because 1 and
    0.999 agree in three digits, which the subtraction loses. `-expm1(t log b)` loses none.
    """

    def correction(b: float, count: Array) -> Array | float:
        return -jnp.expm1(count * math.log(b)) if b else 1.0

    def update(gradients: Any, state: optax.ScaleByAdamState, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
        del params
        mu = optax.tree.update_moment(gradients, state.mu, b1, 1)
        nu = optax.tree.update_moment(gradients, state.nu, b2, 2)
        count = optax.safe_increment(state.count)
        mu_correction, nu_correction = correction(b1, count), correction(b2, count)
        updates = jax.tree.map(lambda m, v: m / mu_correction / (jnp.sqrt(v / nu_correction) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(optax.scale_by_adam().init, update)


def decay_mask(params: Any) -> Any:
    """Returns a tree with True for every parameter that weight decay applies to."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in NOT_DECAYED, params)


def state_shardings(optimizer: optax.GradientTransformation, params: Any, shardings: Any, scalars: Any) -> Any:
    """Returns the shardings of the optimizer state: those of their parameters for moments, `scalars` for counters."""
    state = jax.eval_shape(optimizer.init, params)
    return optax.tree.map_params(
        optimizer, lambda _, sharding: sharding, state, shardings, transform_non_params=lambda _: scalars
    )
