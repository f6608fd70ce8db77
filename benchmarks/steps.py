"""Makes optimizer steps with the trainer's own functions, so that what a benchmark times is what users run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from benchmarks.backends import Backends, backends_of_a_run
from benchmarks.contenders.job import LEARNING_RATE, OBJECTIVES
from benchmarks.lengths import Pairs
from benchmarks.timing import in_turns, sampled, seconds_of
from jax_simpo.data.loader import Known, StepBatch, build_step
from jax_simpo.data.packing import StepPlan, make_step_plan
from jax_simpo.models.policy import Forward
from jax_simpo.models.transformer import Model
from jax_simpo.objectives import Objective, make_objective
from jax_simpo.ops.attention import place_of
from jax_simpo.sharding import make_mesh, put_rows
from jax_simpo.training import capacity
from jax_simpo.training.evaluate import GROUPS_PER_PLAN, ScoreFunction, score_groups
from jax_simpo.training.optim import run_optimizer
from jax_simpo.training.step import (
    TrainFunctions,
    accumulate_step,
    make_score_function,
    make_train_functions,
    run_step,
    split_step,
)

if TYPE_CHECKING:
    from jax_simpo.config import TrainConfig

SIMPO = make_objective({"simpo": 1.0}, OBJECTIVES["simpo"])
DPO = make_objective({"dpo": 1.0}, OBJECTIVES["dpo"])
# What `run_optimizer` reads of a config, with the config's defaults. A `TrainConfig` needs pydantic, which is missing
# where some GPUs are.
OPTIMIZER = SimpleNamespace(
    optim="adamw",
    learning_rate=LEARNING_RATE,
    lr_scheduler_type="constant",
    lr_scheduler_kwargs={},
    warmup_steps=0,
    warmup_ratio=0.0,
    adam_beta1=0.9,
    adam_beta2=0.999,
    adam_epsilon=1e-8,
    adam_mu_dtype="float32",
    weight_decay=0.0,
    max_grad_norm=1.0,
)
_MANY_STEPS = 1_000_000  # the learning rate is constant, so the number does not matter
_MATMUL = {"cpu": 2048, "gpu": 8192, "tpu": 8192}  # width of the square matrices of the peak
# Variant -> prefix sharing, packing.
VARIANTS = {
    "separate": (False, False),
    "shared": (True, False),
    "separate+packed": (False, True),
    "shared+packed": (True, True),
}


def one_device() -> Mesh:
    """Returns the mesh of all measurements."""
    return make_mesh(devices=jax.devices()[:1])


def step_plan(
    model: Model,
    pairs: Pairs,
    variant: str,
    *,
    batch: int,
    rows: int = 1,
    row_length: int | None = None,
    seed: int | None = 0,
) -> StepPlan:
    """Makes the step plan of a variant as the trainer does. `row_length` counts only for variants that pack."""
    sharing, packing = VARIANTS[variant]
    mesh = one_device()
    plan = make_step_plan(
        pairs.lengths,
        global_batch_size=batch,
        rows_per_micro_batch=rows,
        row_length=row_length if packing else None,
        max_row_length=capacity.longest_row(model, mesh, rows, capacity.device_memory(mesh)),
        prefix_sharing=sharing,
        packing=packing,
        seed=seed,
    )
    plan.check()
    return plan


@dataclass
class Weights:
    """Parameters and optimizer state. A step reuses their memory and puts the new ones in their place."""

    params: Any
    state: Any


@dataclass(frozen=True)
class Trainee:
    """A model and its settings, ready to make optimizer steps on a plan's pairs. Used under `jax.set_mesh(mesh)`.

    Attributes:
        model: the model, with its compute dtype and remat policy.
        plan: the step plan.
        pairs: the pairs.
        mesh: a mesh of one device.
        attention: the config key `attention`; `auto` is what a run takes on these rows (`benchmarks/backends.py`).
        loss_head: the same for the config key `loss_head`.
        chunk: the config key `logprob_chunk`.
        objective: the objective.
        reference: the sum of each response under the reference (`ReferencePass.sums`), for an objective that needs one.
    """

    model: Model
    plan: StepPlan
    pairs: Pairs
    mesh: Mesh
    attention: str = "auto"
    loss_head: str = "auto"
    chunk: int | Literal["auto"] = "auto"
    objective: Objective = SIMPO
    reference: Float[np.ndarray, " R"] | None = None

    @cached_property
    def backends(self) -> Backends:
        """The implementations that `attention` and `loss_head` stand for here."""
        return backends_of_a_run(self.model, self.plan, self.mesh, self.attention, self.loss_head)

    @property
    def scoring_forward(self) -> Forward:
        """The forward pass of scoring."""
        return Forward(
            self.model,
            self.backends.attention,
            self.chunk,
            longest=self.plan.longest,
            span=self.plan.span,
            loss_head=self.backends.loss_head,
        )

    @property
    def forward(self) -> Forward:
        """The forward pass of training."""
        return capacity.training_forward(self.scoring_forward, self.mesh, capacity.device_memory(self.mesh))

    @cached_property
    def functions(self) -> TrainFunctions:
        """The compiled functions of training."""
        _, optimizer = run_optimizer(cast("TrainConfig", OPTIMIZER), _MANY_STEPS)
        return make_train_functions(
            self.forward, self.objective, optimizer, self.mesh, accumulates=self.plan.step(0).micro_batches > 1
        )

    def fresh_weights(self, params: Any = None) -> Weights:
        """Returns weights to start from: these parameters, or random ones."""
        params = self.model.init(0, self.mesh) if params is None else params
        return Weights(params, self.functions.init_optimizer(params))

    def build(self, step: int) -> StepBatch:
        """Builds the rows of a step; steps go round the pairs as often as needed."""
        return build_step(self.plan, self.pairs, step, known=Known(self.reference))

    def first_loss(self, weights: Weights) -> float:
        """Returns the loss of the first step, and leaves the weights as they are."""
        metrics = accumulate_step(self.functions, weights.params, self.build(0)).metrics
        return float(jax.device_get(metrics["loss"]))

    def compute(self, weights: Weights, batch: StepBatch) -> dict[str, float]:
        """Makes an optimizer step, waits for it and returns its metrics."""
        weights.params, weights.state, metrics = run_step(self.functions, weights.params, weights.state, batch)
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        jax.block_until_ready(weights.params)
        return values

    def warm(self, weights: Weights) -> None:
        """Compiles every program of a step by running its first two micro-batches."""
        batch = self.build(0)
        self.compute(weights, replace(batch, micro_batches=batch.micro_batches[:2], slots=batch.slots[:2]))

    def seconds(self, weights: Weights, step: int) -> float:
        """Returns the seconds of a step with the host's work: planning, building and sending its rows."""
        return seconds_of(lambda: self.compute(weights, self.build(step)))

    def compiled_bytes(self) -> int:
        """Returns the bytes that the program of a step's later micro-batches takes, with parameters and gradients."""
        params = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            self.model.abstract,
            self.model.shardings(self.mesh),
        )
        batch = split_step(self.build(0), self.objective)[0]
        rows = put_rows(batch.arrays(), self.mesh)
        so_far = jax.eval_shape(self.functions.accumulate, params, None, rows, batch.denominators)
        lowered = self.functions.accumulate.lower(params, so_far, rows, batch.denominators)  # type: ignore[attr-defined]
        return memory_of(lowered.compile())


def steps_in_turns(trainees: Mapping[str, Trainee], weights: Weights, rounds: int) -> dict[str, list[float]]:
    """Times steps of all trainees in turns, on the same weights, after the micro-batches that compile."""
    for trainee in trainees.values():
        trainee.warm(weights)
    return in_turns({name: partial(trainee.seconds, weights) for name, trainee in trainees.items()}, rounds)


@dataclass(frozen=True)
class ReferencePass:
    """Scores all pairs once, as a run does before it trains with a reference (`jax_simpo.training.reference`).

    Used under `jax.set_mesh(mesh)` of the trainee's mesh.

    Attributes:
        trainee: the model, the pairs and the settings.
        row_length: the length of the rows; None leaves it to the program.
    """

    trainee: Trainee
    row_length: int | None = None

    @cached_property
    def plan(self) -> StepPlan:
        """The step plan of all pairs in file order, shared and packed."""
        model, pairs = self.trainee.model, self.trainee.pairs
        return step_plan(model, pairs, "shared+packed", batch=GROUPS_PER_PLAN, row_length=self.row_length, seed=None)

    @cached_property
    def score(self) -> ScoreFunction:
        """The compiled function that scores a micro-batch."""
        forward = self.trainee.scoring_forward.up_to(self.plan.longest, self.plan.span)
        return make_score_function(forward, self.trainee.mesh)

    def warm(self, params: Any) -> None:
        """Compiles the pass by scoring one micro-batch."""
        rows = build_step(self.plan, self.trainee.pairs, 0).micro_batches[0]
        jax.block_until_ready(self.score(params, put_rows(rows.arrays(), self.trainee.mesh)))

    def sums(self, params: Any) -> Float[np.ndarray, " R"]:
        """Returns the sum of log-probs of every response."""
        return score_groups(self.score, params, self.plan, self.trainee.pairs, self.trainee.mesh).sums


def memory_of(compiled: Any) -> int:
    """Returns the bytes a compiled program holds at once: arguments (donated ones once), results and temporaries."""
    sizes = compiled.memory_analysis()
    total = sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes
    return int(total - sizes.alias_size_in_bytes)


def matmul_peak(dtype: str, width: int | None = None) -> float:
    """Returns the floating-point operations a second of a large matrix product on this machine: the best of a few.

    Args:
        dtype: of the matrices.
        width: of the square matrices; a size that suits the kind of device when not given.
    """
    width = width or _MATMUL[place_of().platform]
    a = jax.random.normal(jax.random.key(0), (width, width), jnp.dtype(dtype))
    product = jax.jit(lambda a, b: a @ b)
    return 2.0 * width**3 / min(sampled(partial(product, a, a), jax.block_until_ready)["seconds"])


def device_name() -> str:
    """Returns the kind of the first device, as jax names it."""
    device = jax.devices()[0]
    return f"{device.platform} ({device.device_kind})"
