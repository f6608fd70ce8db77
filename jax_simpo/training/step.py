"""The optimizer step: `run_step` takes the rows of a step and returns new parameters and metrics.

A step is a number of micro-batches, all of one static shape, so a run compiles few programs: `accumulate`, which adds a
micro-batch's gradients to those of the step so far, and `update`, which applies the sum. Where steps have a single
micro-batch each there is no sum to add to, and an `accumulate` without it saves its memory. Every term is divided by
the whole step's denominator as it is added. The host knows the denominators before the step starts, so the number of
micro-batches never shows in the result.

The trainer, the parity check, the benchmarks and the tests all call `run_step`: what they measure is what users run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jax_simpo.data.loader import StepBatch
from jax_simpo.data.rows import RowBatch
from jax_simpo.models.policy import Forward, Rows
from jax_simpo.models.transformer import Params
from jax_simpo.objectives import Objective, Responses
from jax_simpo.objectives.groups import Ranking, group_terms
from jax_simpo.ops.responses import ResponseLogps
from jax_simpo.sharding import put_rows
from jax_simpo.training.optim import state_shardings
from jax_simpo.training.xla_options import step_options


class Denominators(NamedTuple):
    """The numbers that a step's sums are divided by.

    Attributes:
        groups: the step's groups, or its comparisons if the loss is the mean over those.
        chosen_tokens: the tokens that `sft_loss` is a mean over.
    """

    groups: Float[Array, ""]
    chosen_tokens: Float[Array, ""]

    @classmethod
    def of(cls, step: StepBatch, objective: Objective) -> Denominators:
        """Counts what a step's sums are divided by."""
        groups = len(step.groups)
        if objective.mean_over == "pairs":
            by_group = (
                step.lengths.by_group(x, -1)
                for x in (np.repeat(np.arange(groups), step.lengths.sizes), step.lengths.ranks)
            )
            groups = max(1, int(Ranking(*by_group).compared(objective.group_loss).sum()))
        return cls(jnp.float32(groups), jnp.float32(step.chosen_tokens))


def micro_batch_loss(
    forward: Forward, objective: Objective, params: Params, rows: Rows, denominators: Denominators
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Computes a micro-batch's part of the step's loss and metrics; the parts of a step add up to its means.

    `rows` holds what `MicroBatch.arrays` adds: `reference_sum` if the objective needs a reference, `group_weight` if
    the groups have weights, and `response_score` if the objective weighs comparisons by them; float32 [B, R]. A weight
    multiplies what its group adds to the loss.
    """
    logps = forward.response_logps(params, rows, objective.reads_prompts)
    reference = rows["reference_sum"] if objective.needs_reference else jnp.zeros_like(logps.sum)
    ranking = Ranking(rows["response_group"], rows["response_rank"], rows.get("response_score"))
    terms = group_terms(objective, Responses(logps.sum, logps.length, reference), ranking)
    weight = rows.get("group_weight")

    def mean(per_group: Array) -> Array:
        counted = terms.comparisons * per_group if objective.mean_over == "pairs" else per_group
        return counted.sum() / denominators.groups

    def weighted(per_group: Array) -> Array:
        return per_group if weight is None else weight * per_group

    loss = mean(weighted(terms.loss))
    metrics = {}
    if objective.sft_weight:
        target_sum = weighted(jnp.where(ranking.is_first, logps.sum, 0.0)).sum()
        if logps.prompt_sum is not None:  # only the best responses have targets in their prompts
            target_sum += weighted(logps.prompt_sum).sum()
        metrics["sft_loss"] = -target_sum / denominators.chosen_tokens
        loss += objective.sft_weight * metrics["sft_loss"]
    return loss, {
        "loss": loss,
        "rewards/chosen": objective.beta * mean(terms.chosen),
        "rewards/rejected": objective.beta * mean(terms.rejected),
        "rewards/accuracies": mean(terms.accuracy),
        "rewards/margins": objective.beta * mean(terms.margin),
        "logps/chosen": mean(terms.chosen_logps),
        "logps/rejected": mean(terms.rejected_logps),
        **metrics,
    }


class Accumulated(NamedTuple):
    """The sums over the micro-batches of a step so far: gradients of the trained parameters, and float32 metrics."""

    gradients: Params
    metrics: dict[str, Any]


@dataclass(frozen=True)
class TrainFunctions:
    """The compiled functions of a run, which `run_step` calls.

    Parameters are those of the whole model. Gradients and optimizer state cover the trained part alone (`Model.split`);
    the frozen part passes through `update` without being touched or copied.

    Attributes:
        objective: the objective whose gradients they compute.
        mesh: the mesh that the functions are compiled for. Call them under `jax.set_mesh(mesh)`.
        accumulates: True if steps have several micro-batches as a rule.
        start_sum: `() -> Accumulated`, zeros.
        accumulate: `params, so far, rows, Denominators -> Accumulated`. It donates the sum so far. None for that sum
            gives the micro-batch's own gradients and metrics.
        norm: `gradients -> their norm`, before clipping.
        update: `params, optimizer state, gradients -> params, optimizer state`. It donates the first two.
        all_finite: `params -> bool`, True if every trained parameter is finite.
        init_optimizer: `params -> optimizer state`.
        optimizer_shardings: the shardings of the optimizer state.
    """

    objective: Objective
    mesh: Mesh
    accumulates: bool
    start_sum: Callable[[], Accumulated]
    accumulate: Callable[[Params, Accumulated | None, Rows, Denominators], Accumulated]
    norm: Callable[[Params], Array]
    update: Callable[[Params, Any, Params], tuple[Params, Any]]
    all_finite: Callable[[Params], Array]
    init_optimizer: Callable[[Params], Any]
    optimizer_shardings: Any


def make_train_functions(
    forward: Forward,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    accumulates: bool = True,
) -> TrainFunctions:
    """Builds the functions of a run for a mesh. Each of them is compiled at its first call.

    Args:
        forward: the forward pass.
        objective: the objective.
        optimizer: the optimizer, with its schedule.
        mesh: the mesh.
        accumulates: True if steps have several micro-batches as a rule. A step that has one all the same then starts
            from zeros too, so that the run compiles no second program for it.
    """
    model = forward.model
    param_shardings = model.shardings(mesh)
    everywhere = NamedSharding(mesh, P())
    trained_shardings = model.split(param_shardings)[0]
    abstract_trained = model.split(model.abstract)[0]
    optimizer_shardings = state_shardings(optimizer, abstract_trained, trained_shardings, everywhere)
    accumulated = Accumulated(trained_shardings, dict.fromkeys(objective.metrics, everywhere))

    def start_sum() -> Accumulated:
        gradients = jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), abstract_trained)
        return Accumulated(gradients, {name: jnp.zeros((), jnp.float32) for name in objective.metrics})

    def accumulate(params: Params, so_far: Accumulated | None, rows: Rows, denominators: Denominators) -> Accumulated:
        trained, frozen = model.split(params)

        def loss(p: Params) -> tuple[Array, dict[str, Array]]:
            return micro_batch_loss(forward, objective, model.join(p, frozen), rows, denominators)

        added = Accumulated(*jax.grad(loss, has_aux=True)(trained))
        return added if so_far is None else jax.tree.map(jnp.add, so_far, added)

    def update(params: Params, state: Any, gradients: Params) -> tuple[Params, Any]:
        trained, frozen = model.split(params)
        updates, state = optimizer.update(gradients, state, trained)
        return model.join(optax.apply_updates(trained, updates), frozen), state

    def all_finite(params: Params) -> Array:
        return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(model.split(params)[0])]).all()

    def init_optimizer(params: Params) -> Any:
        return optimizer.init(model.split(params)[0])

    return TrainFunctions(
        objective=objective,
        mesh=mesh,
        accumulates=accumulates,
        start_sum=jax.jit(start_sum, out_shardings=accumulated),
        accumulate=jax.jit(
            accumulate, donate_argnums=1, out_shardings=accumulated, compiler_options=step_options(mesh)
        ),
        norm=jax.jit(optax.tree.norm, out_shardings=everywhere),
        update=jax.jit(update, donate_argnums=(0, 1), out_shardings=(param_shardings, optimizer_shardings)),
        all_finite=jax.jit(all_finite, out_shardings=everywhere),
        init_optimizer=jax.jit(init_optimizer, out_shardings=optimizer_shardings),
        optimizer_shardings=optimizer_shardings,
    )


class MicroBatch(NamedTuple):
    """Rows that are computed at once.

    Attributes:
        rows: the rows, or of several processes those that lie on this one's devices.
        row_count: the number of rows over all processes.
        denominators: the numbers that their sums are divided by.
        of_slots: numbers of each response slot by name, float32 [B, R]: `reference_sum`, the sum of log-probs under the
            reference; `group_weight`, the weight of its group; `response_score`. Each only where it is needed.
    """

    rows: RowBatch
    row_count: int
    denominators: Denominators
    of_slots: Mapping[str, Float[np.ndarray, "B R"]]

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the arrays of the rows and of their slots by name."""
        return {**self.rows.arrays(), **self.of_slots}


def split_step(step: StepBatch, objective: Objective) -> list[MicroBatch]:
    """Returns the micro-batches of a step, each with the denominators of the whole step."""
    denominators = Denominators.of(step, objective)
    return [
        MicroBatch(rows, len(slots.group), denominators, step.of_slots(rows))
        for rows, slots in zip(step.micro_batches, step.slots, strict=True)
    ]


Split = Callable[[StepBatch, Objective], Iterable[MicroBatch]]


def accumulate_step(
    functions: TrainFunctions,
    params: Params,
    step: StepBatch,
    split: Split = split_step,
) -> Accumulated:
    """Adds up the gradients and metrics of a step. Called under `jax.set_mesh(functions.mesh)`.

    Args:
        functions: from `make_train_functions`.
        params: the model's parameters.
        step: the rows of the step; at least one micro-batch.
        split: gives the micro-batches of the step. Only the parity check's wrong variants need another than the
            default.
    """
    micro_batches = list(split(step, functions.objective))
    # Zeros to start from let one program serve every micro-batch of every step. The forward and backward pass are most
    # of what a run compiles, and a program for a step's first micro-batch alone would compile them a second time.
    so_far = functions.start_sum() if functions.accumulates or len(micro_batches) > 1 else None
    for batch in micro_batches:
        rows = put_rows(batch.arrays(), functions.mesh, batch.row_count)
        so_far = functions.accumulate(params, so_far, rows, batch.denominators)
    assert so_far is not None  # no step is without pairs
    return so_far


def run_step(
    functions: TrainFunctions,
    params: Params,
    state: Any,
    step: StepBatch,
    split: Split = split_step,
    accepts: Callable[[Mapping[str, Array]], bool] | None = None,
) -> tuple[Params, Any, dict[str, Array]]:
    """Makes an optimizer step, unless its loss or its gradient is not finite. Called under `jax.set_mesh`.

    It waits for the gradients, because the update takes the memory of the parameters before it. (To decide on the
    devices costs memory: on a CPU, a compiled choice between old and new state held 7 bytes a parameter more.) It does
    not wait for the update.

    Args:
        functions: from `make_train_functions`.
        params: the model's parameters. Their memory is reused for the new ones.
        state: the optimizer state. Its memory is reused too.
        step: the rows of the step; at least one micro-batch.
        split: as for `accumulate_step`.
        accepts: is given the metrics before the update; False leaves the update out. None stands for `is_finite`.

    Returns:
        The new parameters and the new optimizer state, or those that were given if the step is left out; and the
        step's metrics as float32 scalars on the devices: those of the objective, and `grad_norm`, the norm of the
        gradients before clipping.
    """
    accumulated = accumulate_step(functions, params, step, split)
    metrics = {**accumulated.metrics, "grad_norm": functions.norm(accumulated.gradients)}
    if (accepts or is_finite)(metrics):
        params, state = functions.update(params, state, accumulated.gradients)
    return params, state, metrics


def is_finite(metrics: Mapping[str, Array]) -> bool:
    """Returns True if the loss and the gradient of a step are finite. It waits for them."""
    return all(math.isfinite(value) for value in jax.device_get((metrics["loss"], metrics["grad_norm"])))


def make_score_function(
    forward: Forward, mesh: Mesh, *, prompts: bool = False
) -> Callable[[Params, Rows], ResponseLogps]:
    """Builds the compiled `params, rows -> ResponseLogps` of evaluation and scoring; of prompts too if asked."""
    score = partial(forward.response_logps, prompts=prompts)
    return jax.jit(score, out_shardings=NamedSharding(mesh, P()))
