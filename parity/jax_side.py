"""Runs the JAX side of the matrix, in processes of its own: `python -m parity.jax_side run|run-gpu JOB.json`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array
from rich.console import Console

from jax_simpo import hf
from jax_simpo.data.groups import GroupLengths
from jax_simpo.data.loader import GroupSource, Known, build_step
from jax_simpo.data.packing import StepPlan
from jax_simpo.hf import adapters
from jax_simpo.models.policy import Forward, Rows
from jax_simpo.models.transformer import Params
from jax_simpo.objectives import Objective, Responses
from jax_simpo.objectives.groups import Ranking, group_terms
from jax_simpo.ops.responses import ResponseLogps
from jax_simpo.sharding import make_mesh, put_rows
from jax_simpo.training import capacity
from jax_simpo.training.optim import run_optimizer
from jax_simpo.training.reference import Reference
from jax_simpo.training.setup import Setup
from jax_simpo.training.step import (
    MicroBatch,
    TrainFunctions,
    accumulate_step,
    make_train_functions,
    run_step,
)
from parity.cases import JAX_GPU, MESHES, REFERENCE, Cell, Job, step_plan
from parity.results import EXPORT, GRADIENTS, PYTORCH_IN_JAX, TokenTable, save_results
from parity.variants import RIGHT, VARIANTS, Variant, VariantGroups


def _optimize(job: Job, much: bool) -> None:
    """Has XLA optimise what is compiled from here on much or little, for tiny models on a CPU.

    Nearly all of their programs run once or twice, in less time than it takes to optimise their code. Which operations
    a program has, and in which precision, stays the same.
    """
    if job.new_models and jax.default_backend() == "cpu":
        jax.config.update("jax_disable_most_optimizations", not much)


@dataclass
class Runner:
    """One model on one mesh, with its compiled functions. All layouts share them, because their rows have one shape.

    Attributes:
        job: the job that the cells belong to.
        setup: the setup of the model's config.
        mesh: the mesh of the cells' backend.
        forward: the forward pass, with the settings of training.
        objective: the objective.
        adapter: the folder of the adapter to start from, if one is trained.
    """

    job: Job
    setup: Setup
    mesh: Mesh
    forward: Forward
    objective: Objective
    adapter: Path | None = None

    @cached_property
    def functions(self) -> TrainFunctions:
        """The compiled functions of training."""
        _, optimizer = run_optimizer(self.setup.config, self.job.steps)
        return make_train_functions(self.forward, self.objective, optimizer, self.mesh)

    @cached_property
    def target_logps(self) -> Callable[[Params, Rows], Array]:
        """The compiled log-probs of single targets."""
        return jax.jit(self.forward.target_logps, out_shardings=NamedSharding(self.mesh, P()))

    @cached_property
    def sum_responses(self) -> Callable[[Array, Rows], ResponseLogps]:
        """The compiled sums of the log-probs of responses."""
        return jax.jit(self.forward.sum_responses, out_shardings=NamedSharding(self.mesh, P()))

    def load(self, folder: Path | None = None) -> Params:
        """Loads the weights of a folder, or those the run starts from; an adapter's folder on the run's base."""
        config, model = self.setup.config, self.setup.model
        assert config.model_name_or_path is not None
        start = hf.resolve_model_folder(config.model_name_or_path, config.model_revision)
        if self.adapter is None:
            return hf.load_params(folder or start, model, self.mesh)
        adapter = adapters.load(folder or self.adapter, model, self.mesh)
        return model.join(adapter, hf.load_params(start, model, self.mesh))

    def save(self, params: Params, folder: Path) -> None:
        """Writes the weights, or the gradients, of the trained parameters."""
        model, tokenizer = self.setup.model, self.setup.tokenizer
        if self.adapter is None:
            hf.save_model(params, model, folder, "float32", tokenizer=tokenizer)
        else:
            base = self.setup.config.model_name_or_path
            adapters.save(params, model, folder, "float32", base=base, tokenizer=tokenizer)

    def table(
        self, params: Params, micro_batches: Iterable[MicroBatch], lengths: GroupLengths
    ) -> tuple[TokenTable, np.ndarray]:
        """Computes the log-prob of every target of a step's rows, and the loss of every group."""
        table, losses = TokenTable(lengths), np.zeros(len(lengths))
        for batch in micro_batches:
            rows = put_rows(batch.rows.arrays(), self.mesh)
            target_logps = self.target_logps(params, rows)
            self._put_losses(losses, self.sum_responses(target_logps, rows), batch)
            logps = np.asarray(target_logps)
            for row, slot in zip(*np.nonzero(batch.rows.response_group >= 0), strict=True):
                group, place = batch.rows.response_group[row, slot], batch.rows.response_place[row, slot]
                table.put(group, place, logps[row][batch.rows.target_response[row] == slot])
        return table, losses

    def known(self, reference: np.ndarray | None = None) -> Known:
        """Returns what is known of the training pairs: sums under the reference, and their weights and scores."""
        return self.setup.known(self.setup.train_pairs(), reference, training=True)

    def reference_sums(self, plan: StepPlan, variant: Variant) -> np.ndarray:
        """Returns the reference's sums of all pairs: as the trainer computes them, or of a variant's pairs."""
        pairs = self.setup.train_pairs()
        if not variant.changes_reference_groups:
            return Reference(self.setup.reference).sums(pairs, Console(quiet=True))
        # Here the reference is the start model, so its log-probs come from the program that is compiled already.
        changed = VariantGroups(pairs, variant.reference_group)
        everything = replace(plan, lengths=GroupLengths.of(changed.groups(np.arange(len(plan.lengths)))), seed=None)
        sums = []
        with jax.set_mesh(self.mesh):
            params = self.load()
            for k in range(everything.steps_per_epoch):
                lengths = everything.lengths.of_groups(everything.groups(k))
                batches = RIGHT.micro_batches(build_step(everything, changed, k, known=self.known()), self.objective)
                sums.append(self.table(params, batches, lengths)[0].sums)
        return np.concatenate(sums).astype(np.float32)

    def _put_losses(self, losses: np.ndarray, responses: ResponseLogps, batch: MicroBatch) -> None:
        """Computes the losses of a micro-batch's groups and puts each at its group's place."""
        reference = batch.of_slots.get("reference_sum", np.zeros_like(responses.sum))
        slots = Responses(*map(jnp.asarray, (*jax.device_get((responses.sum, responses.length)), reference)))
        ranking = Ranking(batch.rows.response_group, batch.rows.response_rank, batch.of_slots.get("response_score"))
        is_first = ranking.is_first
        losses[batch.rows.response_group[is_first]] = group_terms(self.objective, slots, ranking).loss[is_first]

    def run(self, folder: Path, plan: StepPlan, pairs: GroupSource, steps: int, variant: Variant = RIGHT) -> None:
        """Runs the steps of a cell and writes its results; with 0 steps, those of the first step before its update."""
        lengths = plan.lengths.of_groups(plan.groups(0))
        reference = None
        if self.objective.needs_reference:
            reference = variant.reference(self.reference_sums(plan, variant))
        build = partial(build_step, plan, pairs, known=self.known(reference))
        with jax.set_mesh(self.mesh):
            params = self.load()
            first_step = build(0)
            first = variant.micro_batches(first_step, self.objective)
            table, losses = self.table(params, first, lengths)
            _optimize(self.job, bool(steps))  # the one program that runs in every step
            accumulated = accumulate_step(self.functions, params, first_step, variant.micro_batches)
            _optimize(self.job, False)
            self.save(accumulated.gradients, folder / GRADIENTS)
            records, final = [_numbers(accumulated.metrics)], None
            if steps:
                records, state = [], self.functions.init_optimizer(params)
                for k in range(steps):
                    params, state, metrics = run_step(self.functions, params, state, build(k), variant.micro_batches)
                    # Waits for the step: on a CPU that stands for eight devices, the collectives of many programs in
                    # flight can wait for each other forever.
                    records.append(_numbers(metrics))
                final, _ = self.table(params, first, lengths)
                self.save(params, folder / EXPORT)
        facts = {"attention": self.forward.attention, "jax": metadata.version("jax")}
        save_results(folder, table=table, losses=losses, steps=records, final=final, facts=facts)


def _numbers(metrics: Mapping[str, Array]) -> dict[str, float]:
    return {name: float(value) for name, value in jax.device_get(metrics).items()}


def make_runner(job: Job, cell: Cell, variant: Variant = RIGHT) -> Runner:
    """Makes the runner of a cell's model and mesh."""
    setup = Setup(job.config(cell))
    fsdp, tensor = MESHES.get(cell.backend, (1, 1))
    mesh = make_mesh(1, fsdp, tensor, devices=jax.devices()[: fsdp * tensor])
    adapter = Path(job.adapters[cell.family]) if cell.family in job.adapters else None
    # The setup's own mesh is of all devices here; the cell's mesh says how much memory is left for logits.
    forward = capacity.training_forward(setup.forward, mesh, setup.device_memory)
    return Runner(job, setup, mesh, variant.forward(forward), variant.objective(setup.objective), adapter)


def run_cell(job: Job, runner: Runner, cell: Cell, folder: Path, steps: int, variant: Variant = RIGHT) -> None:
    """Runs one layout of a runner's model."""
    config = job.config(cell)
    pairs: Any = runner.setup.train_pairs()
    plan = step_plan(job, config, pairs.lengths)
    if variant.changes_groups:
        pairs = VariantGroups(pairs, variant.group)
        changed = GroupLengths.of(pairs.groups(np.arange(len(plan.lengths))))
        plan = step_plan(job, config, changed)
    if variant.prompt_targets:
        plan = replace(plan, prompt_targets=True)
    runner.run(folder, plan, pairs, steps, variant)


def score_export(runner: Runner, job: Job, cell: Cell) -> None:
    """Loads the reference's export and writes its log-probs of the first step's pairs."""
    export = job.results_folder(cell.on(REFERENCE)) / EXPORT
    pairs = runner.setup.train_pairs()
    plan = step_plan(job, job.config(cell), pairs.lengths)
    with jax.set_mesh(runner.mesh):
        micro_batches = RIGHT.micro_batches(build_step(plan, pairs, 0, known=runner.known()), runner.objective)
        table, _ = runner.table(runner.load(export), micro_batches, plan.lengths.of_groups(plan.groups(0)))
    np.save(job.results_folder(cell) / PYTORCH_IN_JAX, table.logps)


def try_variants(job: Job) -> None:
    """Runs the first step of every wrong variant that makes a difference here."""
    runner_of = cache(partial(make_runner, job))
    for name in job.variants:
        variant, cell = VARIANTS[name], job.variant_cell(name)
        plain = runner_of(cell)
        pairs = plain.setup.train_pairs()
        first = build_step(step_plan(job, job.config(cell), pairs.lengths), pairs, 0, known=plain.known())
        if not variant.applies(plain.forward, plain.objective, first):
            continue
        if variant.changes_reference_groups and plain.setup.config.ref_model_name_or_path is not None:
            continue  # its log-probs come from the runner's own model
        print(f"wrong variant: {name}", flush=True)
        runner = make_runner(job, cell, variant) if variant.changes_program else plain
        if not variant.changes_forward:  # then the program of the log-probs is the same, and compiled already
            runner.target_logps, runner.sum_responses = plain.target_logps, plain.sum_responses
        run_cell(job, runner, cell, job.variant_folder(name), 0, variant)


def main() -> None:
    """Runs the cells of a job one after the other, and then its wrong variants; or the cells that are for a GPU."""
    task, job = sys.argv[1], Job.load(sys.argv[2])
    backends = (JAX_GPU,) if task == "run-gpu" else tuple(MESHES)
    runners: dict[tuple[str, str, str], Runner] = {}
    injected = RIGHT if job.inject is None else VARIANTS[job.inject]
    _optimize(job, False)
    for cell in (c for c in job.cells if c.backend in backends):
        key = (cell.family, cell.dtype, cell.backend)
        if key not in runners:
            runners.clear()  # one at a time in memory
            runners[key] = make_runner(job, cell, injected)
        print(cell.name, flush=True)
        run_cell(job, runners[key], cell, job.results_folder(cell), job.steps, injected)
        if not cell.order and (job.results_folder(cell.on(REFERENCE)) / EXPORT).exists():
            score_export(runners[key], job, cell)
    if job.variants and task == "run":
        try_variants(job)


if __name__ == "__main__":
    main()
