"""Optimizer steps as the training loop makes them, from the trainer's own parts: what is timed is what users run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from benchmarks.lengths import Pairs
from benchmarks.timing import seconds_of
from jax_simpo.data.loader import StepBatch, build_step
from jax_simpo.data.packing import StepPlan, make_step_plan
from jax_simpo.data.rows import RowBatch
from jax_simpo.models.policy import Forward
from jax_simpo.models.transformer import Model
from jax_simpo.objectives.simpo import Objective
from jax_simpo.ops.attention import resolve_implementation
from jax_simpo.sharding import make_mesh, put_rows
from jax_simpo.train import capacity
from jax_simpo.train.optim import make_optimizer
from jax_simpo.train.step import Denominators, TrainFunctions, make_train_functions

OBJECTIVE = Objective(beta=2.5, gamma_beta_ratio=0.55)
_MATMUL = {"cpu": 2048, "gpu": 8192, "tpu": 8192}  # width of the square matrices of the peak
# Variant -> prefix sharing, packing.
VARIANTS = {
    "separate": (False, False),
    "shared": (True, False),
    "separate+packed": (False, True),
    "shared+packed": (True, True),
}


def one_device() -> Mesh:
    """The mesh of all measurements."""
    return make_mesh(devices=jax.devices()[:1])


def make_plan(
    model: Model, pairs: Pairs, variant: str, *, batch: int, rows: int = 1, row_length: int | None = None
) -> StepPlan:
    """The plan of a variant, its row shape chosen as the trainer does; `row_length` counts when packing only."""
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
        seed=0,
    )
    plan.check()
    return plan


@dataclass
class Weights:
    """Parameters and optimizer state. A step takes their memory and puts the new ones in their place."""

    params: Any
    state: Any


@dataclass(frozen=True)
class Trainee:
    """A model and its settings, ready to make optimizer steps on a plan's pairs. Used under `jax.set_mesh(mesh)`.

    Attributes:
        model: with its compute dtype and remat policy.
        plan: which pairs a step takes, in which rows.
        pairs: the pairs.
        mesh: of one device.
        attention: as the config key; `auto` is what a run would take.
        chunk: `logprob_chunk`, as the config key.
    """

    model: Model
    plan: StepPlan
    pairs: Pairs
    mesh: Mesh
    attention: str = "auto"
    chunk: int | Literal["auto"] = "auto"

    @cached_property
    def attention_name(self) -> str:
        """The implementation that `attention` stands for here."""
        config = self.model.config
        settings = {"dtype": self.model.dtype, "head_dim": config.head_dim, "softcap": config.attention_softcap}
        return resolve_implementation(self.attention, self.mesh.devices.flat[0], **settings)[0]

    @property
    def forward(self) -> Forward:
        """As a run has it: with memory to spare, a micro-batch's logits are kept for the backward pass."""
        memory = capacity.device_memory(self.mesh)
        keep = capacity.logits_bytes(self.model, self.mesh, memory) if self.chunk == "auto" else 0
        return Forward(self.model, self.attention_name, self.chunk, keep)

    @cached_property
    def functions(self) -> TrainFunctions:
        optimizer = make_optimizer(lambda _: 1e-6, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, max_grad_norm=1.0)
        return make_train_functions(self.forward, OBJECTIVE, optimizer, self.mesh)

    def fresh_weights(self, params: Any = None) -> Weights:
        """Weights to start from: these parameters, or random ones."""
        params = self.model.init(0, self.mesh) if params is None else params
        return Weights(params, self.functions.init_optimizer(params))

    def build(self, step: int) -> StepBatch:
        """The rows of a step; steps go round the pairs as often as needed."""
        return build_step(self.plan, self.pairs, step)

    def compute(self, weights: Weights, batch: StepBatch) -> dict[str, float]:
        """An optimizer step, as `TrainingLoop` makes it. Waits for it and returns its metrics."""
        denominators = Denominators(jnp.float32(len(batch.pairs)), jnp.float32(batch.chosen_tokens))
        so_far = None
        for rows in batch.micro_batches:
            so_far = self.functions.accumulate(weights.params, so_far, put_rows(rows.arrays(), self.mesh), denominators)
        assert so_far is not None
        weights.params, weights.state, norm = self.functions.update(weights.params, weights.state, so_far.gradients)
        metrics = jax.device_get({**so_far.metrics, "grad_norm": norm})
        jax.block_until_ready(weights.params)
        return {name: float(value) for name, value in metrics.items()}

    def warm(self, weights: Weights) -> None:
        """Compiles everything a step runs, on its first micro-batches."""
        batch = self.build(0)
        self.compute(weights, replace(batch, micro_batches=batch.micro_batches[:2]))

    def seconds(self, weights: Weights, step: int) -> float:
        """Seconds of a step with the host's work: planning, building and sending its rows."""
        return seconds_of(lambda: self.compute(weights, self.build(step)))

    def compiled_bytes(self) -> int:
        """Memory the program of a step's later micro-batches takes: parameters, gradients and everything in between."""
        params = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            self.model.abstract,
            self.model.shardings(self.mesh),
        )
        rows = put_rows(RowBatch.empty(self.plan.rows_per_micro_batch, self.plan.shape).arrays(), self.mesh)
        ones = Denominators(jnp.float32(1), jnp.float32(1))
        accumulate: Any = self.functions.accumulate
        so_far = jax.eval_shape(accumulate, params, None, rows, ones)
        return memory_of(accumulate.lower(params, so_far, rows, ones).compile())


def memory_of(compiled: Any) -> int:
    """Bytes a compiled program holds at once: arguments, results and temporaries; donated arguments count once."""
    found = compiled.memory_analysis()
    held = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    return int(held - found.alias_size_in_bytes)


def matmul_peak(dtype: str, repeats: int = 10) -> float:
    """Floating-point operations a second of a large matrix product here and now: the best of a few."""
    width = _MATMUL[jax.default_backend()]
    a = jax.random.normal(jax.random.key(0), (width, width), jnp.dtype(dtype))
    product = jax.jit(lambda a, b: a @ b)
    product(a, a).block_until_ready()
    times = [seconds_of(lambda: product(a, a).block_until_ready()) for _ in range(repeats)]
    return 2.0 * width**3 / min(times)


def device_name() -> str:
    """The first device, as jax names its kind."""
    device = jax.devices()[0]
    return f"{device.platform} ({device.device_kind})"
