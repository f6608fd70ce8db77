"""The pure functions of a training step: rows in, gradients and metrics out.

A step is a number of micro-batches, all of one static shape, so few programs are compiled per run: `accumulate` for the
first micro-batch of a step, whose gradients start the sum, and for the later ones, which add theirs to it; `update`
applies the sum. Every term is divided by the whole step's denominator (known on the host before the step starts) as it
is added, so the number of micro-batches never shows in the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jax_simpo.losses import LossType, ResponseLogps, match_pairs, response_logps, simpo_losses
from jax_simpo.models.transformer import Model
from jax_simpo.ops.attention import prepare_mask
from jax_simpo.ops.logprobs import target_logps
from jax_simpo.sharding import local_rows, named
from jax_simpo.train.optim import state_shardings

Params = Any  # a nested dict of arrays
Rows = Mapping[str, Int[Array, "B _"]]  # the arrays of a RowBatch by name


@dataclass(frozen=True)
class Objective:
    """The SimPO objective's settings, under the names of the original."""

    beta: float
    gamma_beta_ratio: float
    loss_type: LossType = "sigmoid"
    label_smoothing: float = 0.0
    sft_weight: float = 0.0

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what a step reports, as the original names them."""
        rewards = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
        return ("loss", *rewards, "logps/chosen", "logps/rejected", *(("sft_loss",) if self.sft_weight else ()))

    def losses(self, chosen_logps: Float[Array, "*P"], rejected_logps: Float[Array, "*P"]) -> Float[Array, "*P"]:
        """The preference loss of each pair."""
        return simpo_losses(
            chosen_logps,
            rejected_logps,
            beta=self.beta,
            gamma_beta_ratio=self.gamma_beta_ratio,
            loss_type=self.loss_type,
            label_smoothing=self.label_smoothing,
        )


@dataclass(frozen=True)
class Forward:
    """How log-probs are computed: the model, and the settings that change no number beyond rounding."""

    model: Model
    attention: str
    logprob_chunk: int | Literal["auto"] = "auto"
    logits_bytes: int = 0  # memory of a device that training may spend on keeping a micro-batch's logits

    def response_logps(self, params: Params, rows: Rows) -> ResponseLogps:
        """Sum of log-probs and length of every response slot, float32 [B, R]."""
        slots = rows["response_pair"].shape[1]
        mask = prepare_mask(
            rows["key_end"], rows["positions"], self.model.config.windows, self.attention, sequences=slots
        )
        hidden = self.model.hidden_states(params, rows["tokens"], rows["positions"], mask)
        logps = target_logps(
            hidden,
            self.model.head(params),
            rows["target_index"],
            rows["target_token"],
            counts=(rows["target_response"] < slots).sum(1),
            softcap=self.model.config.logit_softcap,
            chunk=None if self.logprob_chunk == "auto" else self.logprob_chunk,
            keep_bytes=self.logits_bytes,
            frozen=self.model.lora is not None,
        )
        return response_logps(logps, rows["target_response"], slots)


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


def put_rows(arrays: Mapping[str, Any], mesh: Mesh, rows: int | None = None) -> Rows:
    """Sends the arrays of a micro-batch to the devices, rows split over `data` and `fsdp`.

    Args:
        arrays: of a `RowBatch`.
        mesh: where to.
        rows: rows of the whole micro-batch, where the arrays hold only this process's (those of `local_rows`).
    """
    sharding = named(mesh, "batch", None)
    if sharding.is_fully_addressable:
        return jax.device_put(dict(arrays), sharding)

    count = len(arrays["tokens"]) if rows is None else rows
    held = np.arange(count) if rows is None else local_rows(mesh, count)

    def put(array: Any) -> Array:
        def part(index: tuple[slice, ...] | None) -> Any:
            assert index is not None
            start, stop, _ = index[0].indices(count)
            first = int(np.searchsorted(held, start))
            return array[first : first + stop - start]

        return jax.make_array_from_callback((count, *array.shape[1:]), sharding, part)

    return {name: put(array) for name, array in arrays.items()}
