"""The optimizers of a run: gradient clipping, AdamW, Adafactor, Lion or Muon, weight decay, and a learning rate.

optax has the algorithms. What is here adds what optax does not do: clipping without a second copy of the gradients,
bias corrections that are exact to float32, and layers that are stacked but count as one weight each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array
from optax import contrib

from jax_simpo.training.schedules import count_warmup_steps, learning_rate_schedule

if TYPE_CHECKING:
    from jax_simpo.config import TrainConfig

NOT_DECAYED = ("scale", "bias")  # norms and biases, by the last key of a parameter's path
_STACKED = "layers"  # the first key of the parameters that have a leading axis of layers
_MATRIX = "kernel"  # the last key of the matrices that Muon orthogonalises; embeddings and the LM head are none
# Adafactor as the Hugging Face Trainer sets it: no factor for the size of a weight, and the learning rate as given.
_ADAFACTOR_DECAY, _ADAFACTOR_CLIP = 0.8, 1.0
_MUON_MOMENTUM = 0.95
# An orthogonal update times this and the root of its longer side is as large as AdamW's usual one, so that the same
# learning rate and weight decay serve both: "Muon is Scalable for LLM Training", arXiv 2502.16982, equation 4.
_MUON_RMS = 0.2


def make_optimizer(
    schedule: optax.Schedule,
    *,
    kind: str = "adamw",
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    max_grad_norm: float,
    mu_dtype: str = "float32",
) -> optax.GradientTransformation:
    """Builds an optimizer that clips by the global norm (0: never) and decays weights, but not norms and biases.

    Args:
        schedule: the learning rate of a step.
        kind: the value of `optim`.
        b1: decay of the gradient mean.
        b2: decay of the squared gradient mean, or Lion's second decay of the mean.
        eps: AdamW's epsilon.
        weight_decay: the weight decay, which is multiplied by the learning rate.
        max_grad_norm: the norm that gradients are scaled down to.
        mu_dtype: the type in which the gradient mean is kept.

    Raises:
        ValueError: no optimizer is called `kind`.
    """
    clip = _clip_by_global_norm(max_grad_norm) if max_grad_norm > 0 else optax.identity()
    adam = _scale_by_adam(b1, b2, eps, mu_dtype)
    match kind:
        case "adamw":
            scale = adam
        case "adafactor":
            scale = _each_layer(
                optax.chain(
                    optax.scale_by_factored_rms(decay_rate=_ADAFACTOR_DECAY, min_dim_size_to_factor=1),
                    optax.clip_by_block_rms(_ADAFACTOR_CLIP),
                )
            )
        case "lion":
            scale = optax.scale_by_lion(b1, b2, mu_dtype)
        case "muon":
            scale = optax.partition({"muon": _scale_by_muon(mu_dtype), "adamw": adam}, _muon_or_adamw)
        case _:
            raise ValueError(f"no optimizer is called {kind!r}")
    decayed = optax.chain(  # the chain of `optax.adamw`, so that the state has the same layout
        scale, optax.add_decayed_weights(weight_decay, decay_mask), optax.scale_by_learning_rate(schedule)
    )
    return optax.chain(clip, decayed)


def run_optimizer(config: TrainConfig, total_steps: int) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """Builds a run's learning-rate schedule and its optimizer."""
    schedule = learning_rate_schedule(
        config.lr_scheduler_type,
        config.learning_rate,
        total_steps,
        count_warmup_steps(total_steps, config.warmup_steps, config.warmup_ratio),
        config.lr_scheduler_kwargs,
    )
    optimizer = make_optimizer(
        schedule,
        kind=config.optim,
        b1=config.adam_beta1,
        b2=config.adam_beta2,
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        mu_dtype=config.adam_mu_dtype,
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


def _scale_by_adam(b1: float, b2: float, eps: float, mu_dtype: str) -> optax.GradientTransformation:
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
        return updates, optax.ScaleByAdamState(count, optax.tree.cast(mu, mu_dtype), nu)

    return optax.GradientTransformation(optax.scale_by_adam(mu_dtype=mu_dtype).init, update)


def _scale_by_muon(mu_dtype: str) -> optax.GradientTransformation:
    """Orthogonalises the momentum of stacked matrices [layers, in, out], and scales it to the size of AdamW's."""
    axes = contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)

    def numbers(params: Any) -> Any:
        return jax.tree.map(lambda _: axes, params)

    def scaled(updates: Any, _: Any) -> Any:
        return jax.tree.map(lambda u: u * (_MUON_RMS * math.sqrt(max(u.shape[1:]))), updates)

    muon = contrib.scale_by_muon(beta=_MUON_MOMENTUM, mu_dtype=mu_dtype, weight_dimension_numbers=numbers)
    return optax.chain(muon, optax.stateless(scaled))


def _muon_or_adamw(params: Any) -> Any:
    """Returns a tree that says by which of the two each parameter is updated under `optim: muon`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "muon" if path[-1].key == _MATRIX else "adamw", params)


def _each_layer(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies a transformation to every weight by itself: of parameters that are stacked, to every layer's.

    Its state is a tree like that of the parameters, with the state of a weight for a leaf.
    """

    def of_weight(path: Any, function: Callable[..., Any]) -> Callable[..., Any]:
        return jax.vmap(function) if path[0].key == _STACKED else function

    def init(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, p: of_weight(path, transform.init)(p), params)

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def step(path: Any, gradient: Array, of: Any, param: Array) -> tuple[Array, Any]:
            updated: tuple[Array, Any] = of_weight(path, transform.update)(gradient, of, param)
            return updated

        both = jax.tree_util.tree_map_with_path(step, gradients, state, params)
        updates, states = (jax.tree.map(lambda _, pair, i=i: pair[i], gradients, both) for i in (0, 1))
        return updates, states

    return optax.GradientTransformation(init, update)


def decay_mask(params: Any) -> Any:
    """Returns a tree with True for every parameter that weight decay applies to."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in NOT_DECAYED, params)


def state_shardings(optimizer: optax.GradientTransformation, params: Any, shardings: Any, scalars: Any) -> Any:
    """Returns the shardings of the optimizer state.

    A moment, which has the shape of its parameter and ends its path, lies where the parameter does. Everything else is
    small, such as a counter or a factored moment, and lies as `scalars` says.
    """
    of_params = {
        jax.tree_util.keystr(path): (param.shape, sharding)
        for (path, param), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True
        )
    }

    def place(path: Any, leaf: Any) -> Any:
        endings = (jax.tree_util.keystr(path[start:]) for start in range(len(path)))
        shape, sharding = next((of_params[end] for end in endings if end in of_params), (None, None))
        return sharding if leaf.shape == shape else scalars

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, params))
