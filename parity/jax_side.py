"""The JAX side of the matrix, in processes of its own: `python -m parity.jax_side run|run-gpu JOB.json`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float
from rich.console import Console

from jax_simpo import hf
from jax_simpo.data.loader import PairSource, build_step
from jax_simpo.data.packing import StepPlan
from jax_simpo.data.pairs import PairLengths
from jax_simpo.hf import adapters
from jax_simpo.models.policy import Forward, Rows
from jax_simpo.models.transformer import Params
from jax_simpo.objectives.simpo import Objective
from jax_simpo.ops.attention import prepare_mask
from jax_simpo.ops.logprobs import target_logps
from jax_simpo.ops.responses import match_pairs
from jax_simpo.sharding import make_mesh, put_rows
from jax_simpo.train.optim import count_warmup_steps, learning_rate_schedule, make_optimizer
from jax_simpo.train.setup import Setup
from jax_simpo.train.step import Denominators, make_score_function, make_train_functions
from parity.cases import JAX_GPU, MESHES, REFERENCE, Cell, Job, make_plan
from parity.results import EXPORT, GRADIENTS, PYTORCH_IN_JAX, TokenTable, save_found
from parity.variants import RIGHT, VARIANTS, MicroBatch, Variant, VariantPairs


@dataclass
class Runner:
    """One model on one mesh, with its compiled functions; layouts share them, for their rows have one shape."""

    job: Job
    setup: Setup
    mesh: Mesh
    forward: Forward
    objective: Objective
    adapter: Path | None = None  # to start from

    @cached_property
    def functions(self) -> Any:
        c, steps = self.setup.config, self.job.steps
        warmup = count_warmup_steps(steps, c.warmup_steps, c.warmup_ratio)
        schedule = learning_rate_schedule(c.lr_scheduler_type, c.learning_rate, steps, warmup)
        optimizer = make_optimizer(
            schedule,
            b1=c.adam_beta1,
            b2=c.adam_beta2,
            eps=c.adam_epsilon,
            weight_decay=c.weight_decay,
            max_grad_norm=c.max_grad_norm,
        )
        return make_train_functions(self.forward, self.objective, optimizer, self.mesh)

    @cached_property
    def score(self) -> Any:
        return make_score_function(self.forward, self.mesh)

    @cached_property
    def token_logps(self) -> Any:
        return jax.jit(token_logps, static_argnums=0, out_shardings=NamedSharding(self.mesh, P()))

    def load(self, folder: Path | None = None) -> Params:
        """The weights of a folder, or those the run starts from. An adapter's folder is loaded on the run's base."""
        config, model = self.setup.config, self.setup.model
        assert config.model_name_or_path is not None
        start = hf.resolve_model_folder(config.model_name_or_path, config.model_revision)
        if self.adapter is None:
            return hf.load_params(folder or start, model, self.mesh)
        adapter = adapters.load(folder or self.adapter, model, self.mesh)
        return model.join(adapter, hf.load_params(start, model, self.mesh))

    def save(self, params: Params, folder: Path) -> None:
        """Writes weights, or gradients, of what is trained."""
        model, tokenizer = self.setup.model, self.setup.tokenizer
        if self.adapter is None:
            hf.save_model(params, model, folder, "float32", tokenizer=tokenizer)
        else:
            base = self.setup.config.model_name_or_path
            adapters.save(params, model, folder, "float32", base=base, tokenizer=tokenizer)

    def table(self, params: Params, micro_batches: Iterable[MicroBatch], lengths: PairLengths) -> TokenTable:
        """The log-prob of every target of a step's rows."""
        table = TokenTable(lengths)
        for batch in micro_batches:
            rows = put_rows(batch.rows.arrays(), self.mesh)
            logps = np.asarray(self.token_logps(self.forward, params, rows))
            for row, slot in zip(*np.nonzero(batch.rows.response_pair >= 0), strict=True):
                pair, rank = batch.rows.response_pair[row, slot], batch.rows.response_rank[row, slot]
                table.put(pair, rank, logps[row][batch.rows.target_response[row] == slot])
        return table

    def losses(self, params: Params, micro_batches: Iterable[MicroBatch], count: int) -> np.ndarray:
        """The loss of each pair of a step, through the functions that score pairs."""
        losses = np.zeros(count)
        for batch in micro_batches:
            means = self.score(params, put_rows(batch.rows.arrays(), self.mesh)).mean
            slots = (np.asarray(means), batch.rows.response_pair, batch.rows.response_rank)
            pairs = match_pairs(*map(jnp.asarray, slots))
            valid = np.asarray(pairs.valid)
            every = np.asarray(self.objective.losses(pairs.chosen, pairs.rejected))
            losses[batch.rows.response_pair[valid]] = every[valid]
        return losses

    def accumulate(self, params: Params, micro_batches: Iterable[MicroBatch]) -> Any:
        """The gradients and metrics of a step."""
        so_far = None
        for batch in micro_batches:
            denominators = Denominators(jnp.float32(batch.pairs), jnp.float32(batch.chosen_tokens))
            rows = put_rows(batch.rows.arrays(), self.mesh)
            so_far = self.functions.accumulate(params, so_far, rows, denominators)
        return so_far

    def run(self, folder: Path, plan: StepPlan, pairs: PairSource, steps: int, variant: Variant = RIGHT) -> None:
        """Runs the steps of a cell and writes what it found; with no step, what the first one begins with."""
        lengths = plan.lengths.of_pairs(plan.pairs(0))
        with jax.set_mesh(self.mesh):
            params = self.load()
            first = variant.micro_batches(build_step(plan, pairs, 0))
            table, losses = self.table(params, first, lengths), self.losses(params, first, len(lengths))
            state, records, final = self.functions.init_optimizer(params), [], None
            for k in range(max(1, steps)):
                so_far = self.accumulate(params, variant.micro_batches(build_step(plan, pairs, k)))
                if k == 0:
                    self.save(so_far.gradients, folder / GRADIENTS)
                params, state, norm = self.functions.update(params, state, so_far.gradients)
                metrics = jax.device_get({**so_far.metrics, "grad_norm": norm})
                records.append({name: float(value) for name, value in metrics.items()})
            if steps:
                final = self.table(params, first, lengths)
                self.save(params, folder / EXPORT)
        facts = {"attention": self.forward.attention, "jax": metadata.version("jax")}
        save_found(folder, table=table, losses=losses, steps=records, final=final, facts=facts)


def token_logps(forward: Forward, params: Params, rows: Rows) -> Float[Array, "B T"]:
    """`Forward.response_logps` before it adds up."""
    mask = prepare_mask(
        rows["key_end"],
        rows["positions"],
        forward.model.config.windows,
        forward.attention,
        sequences=rows["response_pair"].shape[1],
    )
    hidden = forward.model.hidden_states(params, rows["tokens"], rows["positions"], mask)
    return target_logps(
        hidden,
        forward.model.head(params),
        rows["target_index"],
        rows["target_token"],
        softcap=forward.model.config.logit_softcap,
        chunk=None if forward.logprob_chunk == "auto" else forward.logprob_chunk,
    )


def make_runner(job: Job, cell: Cell, variant: Variant = RIGHT) -> Runner:
    """The runner of a cell's model and mesh."""
    setup = Setup(job.config(cell))
    fsdp, tensor = MESHES.get(cell.backend, (1, 1))
    mesh = make_mesh(1, fsdp, tensor, devices=jax.devices()[: fsdp * tensor])
    adapter = Path(job.adapters[cell.family]) if cell.family in job.adapters else None
    forward, objective = variant.forward(setup.training_forward), variant.objective(setup.objective)
    return Runner(job, setup, mesh, forward, objective, adapter)


def run_cell(job: Job, runner: Runner, cell: Cell, folder: Path, steps: int, variant: Variant = RIGHT) -> None:
    """Runs one layout of a runner's model."""
    config = job.config(cell)
    pairs: Any = runner.setup.train_pairs()
    plan = make_plan(job, config, pairs.lengths)
    if variant.changes_pairs:
        pairs = VariantPairs(pairs, variant.pair)
        changed = PairLengths.of(pairs.pairs(np.arange(len(plan.lengths))))
        plan = make_plan(job, config, changed)
    runner.run(folder, plan, pairs, steps, variant)


def score_export(runner: Runner, job: Job, cell: Cell) -> None:
    """The other side's export, loaded here: its log-probs of the first step's pairs."""
    export = job.found(cell.on(REFERENCE)) / EXPORT
    pairs = runner.setup.train_pairs()
    plan = make_plan(job, job.config(cell), pairs.lengths)
    with jax.set_mesh(runner.mesh):
        micro_batches = RIGHT.micro_batches(build_step(plan, pairs, 0))
        table = runner.table(runner.load(export), micro_batches, plan.lengths.of_pairs(plan.pairs(0)))
    np.save(job.found(cell) / PYTORCH_IN_JAX, table.logps)


def try_variants(job: Job) -> None:
    """Runs the first step of every wrong variant that makes a difference here."""
    made = cache(partial(make_runner, job))
    for name in job.variants:
        variant, cell = VARIANTS[name], job.variant_cell(name)
        plain = made(cell)
        pairs = plain.setup.train_pairs()
        first = build_step(make_plan(job, job.config(cell), pairs.lengths), pairs, 0)
        if not variant.applies(plain.forward, plain.objective, first):
            continue
        print(f"wrong variant: {name}", flush=True)
        runner = make_runner(job, cell, variant) if variant.changes_program else plain
        run_cell(job, runner, cell, job.variant(name), 0, variant)


def main() -> None:
    """Runs the cells of a job one after the other, and then its wrong variants; or the cells that are for a GPU."""
    what, job = sys.argv[1], Job.load(sys.argv[2])
    backends = (JAX_GPU,) if what == "run-gpu" else tuple(MESHES)
    runners: dict[tuple[str, str, str], Runner] = {}
    injected = RIGHT if job.inject is None else VARIANTS[job.inject]
    for cell in (c for c in job.cells if c.backend in backends):
        key = (cell.family, cell.dtype, cell.backend)
        if key not in runners:
            runners.clear()  # one at a time in memory
            runners[key] = make_runner(job, cell, injected)
        print(cell.name, flush=True)
        run_cell(job, runners[key], cell, job.found(cell), job.steps, injected)
        if not cell.order and (job.found(cell.on(REFERENCE)) / EXPORT).exists():
            score_export(runners[key], job, cell)
    if job.variants and what == "run":
        try_variants(job)


if __name__ == "__main__":
    main()
