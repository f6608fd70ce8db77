"""The pure functions of a training step: rows in, gradients and metrics out.

A step is a number of micro-batches, all of one static shape, so few programs are compiled per run: `accumulate` for the
first micro-batch of a step, whose gradients start the sum, and for the later ones, which add theirs to it; `update`
applies the sum. Every term is divided by the whole step's denominator (known on the host before the step starts) as it
is added, so the number of micro-batches never shows in the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jax_simpo.models.policy import Forward, Rows
from jax_simpo.models.transformer import Params
from jax_simpo.objectives.simpo import Objective
from jax_simpo.ops.responses import ResponseLogps, match_pairs
from jax_simpo.train.optim import state_shardings


class Denominators(NamedTuple):
    """What the whole step's sums are divided by: its pairs, and the tokens of its chosen responses."""

    pairs: Float[Array, ""]
    chosen_tokens: Float[Array, ""]


def micro_batch_loss(
    forward: Forward, objective: Objective, params: Params, rows: Rows, denominators: Denominators
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """This micro-batch's part of the step's loss and metrics; the parts of a step add up to its means."""
    responses = forward.response_logps(params, rows)
    pairs = match_pairs(responses.mean, rows["response_pair"], rows["response_rank"])
    losses = objective.losses(pairs.chosen, pairs.rejected)

    def mean(per_pair: Array) -> Array:
        return jnp.where(pairs.valid, per_pair, 0.0).sum() / denominators.pairs

    loss = mean(losses)
    metrics = {}
    if objective.sft_weight:
        chosen_sum = jnp.where(pairs.valid, responses.sum, 0.0).sum()
        metrics["sft_loss"] = -chosen_sum / denominators.chosen_tokens
        loss += objective.sft_weight * metrics["sft_loss"]
    return loss, {
        "loss": loss,
        "rewards/chosen": objective.beta * mean(pairs.chosen),
        "rewards/rejected": objective.beta * mean(pairs.rejected),
        "rewards/accuracies": mean((pairs.chosen > pairs.rejected).astype(jnp.float32)),
        "rewards/margins": objective.beta * mean(pairs.chosen - pairs.rejected),
        "logps/chosen": mean(pairs.chosen),
        "logps/rejected": mean(pairs.rejected),
        **metrics,
    }


class Accumulated(NamedTuple):
    """Gradients and metrics of the micro-batches of a step so far."""

    gradients: Params  # of what is trained
    metrics: dict[str, Any]  # float32 scalars


@dataclass(frozen=True)
class TrainFunctions:
    """The compiled functions of a run. They are called under `jax.set_mesh(mesh)`.

    Parameters are a model's whole; gradients and optimizer state are of that part of them which is trained
    (`Model.split`). The frozen part passes through `update` without being touched or copied.

    Attributes:
        accumulate: `params, so far, rows, Denominators -> Accumulated`; takes the memory of the sum so far, which is
            None for the first micro-batch of a step.
        update: `params, optimizer state, gradients -> params, optimizer state, gradient norm before clipping`; takes
            the memory of the first two.
        init_optimizer: `params -> optimizer state`.
        optimizer_shardings: where that state lies.
    """

    accumulate: Callable[[Params, Accumulated | None, Rows, Denominators], Accumulated]
    update: Callable[[Params, Any, Params], tuple[Params, Any, Array]]
    init_optimizer: Callable[[Params], Any]
    optimizer_shardings: Any


def make_train_functions(
    forward: Forward, objective: Objective, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainFunctions:
    """Builds the functions of a run for a mesh. Nothing is compiled before the first call."""
    model = forward.model
    param_shardings = model.shardings(mesh)
    everywhere = NamedSharding(mesh, P())
    trained_shardings = model.split(param_shardings)[0]
    optimizer_shardings = state_shardings(optimizer, model.split(model.abstract)[0], trained_shardings, everywhere)
    accumulated = Accumulated(trained_shardings, dict.fromkeys(objective.metrics, everywhere))

    def accumulate(params: Params, so_far: Accumulated | None, rows: Rows, denominators: Denominators) -> Accumulated:
        trained, frozen = model.split(params)

        def loss(p: Params) -> tuple[Array, dict[str, Array]]:
            return micro_batch_loss(forward, objective, model.join(p, frozen), rows, denominators)

        here = Accumulated(*jax.grad(loss, has_aux=True)(trained))
        return here if so_far is None else jax.tree.map(jnp.add, so_far, here)

    def update(params: Params, state: Any, gradients: Params) -> tuple[Params, Any, Array]:
        trained, frozen = model.split(params)
        updates, state = optimizer.update(gradients, state, trained)
        return model.join(optax.apply_updates(trained, updates), frozen), state, optax.tree.norm(gradients)

    def init_optimizer(params: Params) -> Any:
        return optimizer.init(model.split(params)[0])

    return TrainFunctions(
        accumulate=jax.jit(accumulate, donate_argnums=1, out_shardings=accumulated),
        update=jax.jit(update, donate_argnums=(0, 1), out_shardings=(param_shardings, optimizer_shardings, everywhere)),
        init_optimizer=jax.jit(init_optimizer, out_shardings=optimizer_shardings),
        optimizer_shardings=optimizer_shardings,
    )


def make_score_function(forward: Forward, mesh: Mesh) -> Callable[[Params, Rows], ResponseLogps]:
    """The compiled `params, rows -> ResponseLogps` of evaluation and scoring."""
    return jax.jit(forward.response_logps, out_shardings=NamedSharding(mesh, P()))
