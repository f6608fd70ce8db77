"""The training loop. It reads as the run goes: check, build, resume or start, step, log, evaluate, save, export."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from jax_simpo.config import TrainConfig
from jax_simpo.data.packing import StepPlan
from jax_simpo.data.tokenize import PairDataset
from jax_simpo.errors import CheckpointError, ConfigError, DataError, TrainingError
from torch_ref.batches import Batch, RankStep, rank_steps
from torch_ref.checkpoint import CHECKPOINTS, Checkpoints, check_same_run, identity, resume_step
from torch_ref.distributed import Ranks
from torch_ref.engine import Engine, PlainEngine
from torch_ref.evaluate import PAIRS_PER_PLAN, Evaluation, Forward
from torch_ref.export import export_model
from torch_ref.losses import Objective, StepPart, response_sums, step_part
from torch_ref.metrics import METRICS_FILE, Clock, open_metrics
from torch_ref.model import DTYPES
from torch_ref.optim import Schedule, learning_rate_schedule
from torch_ref.setup import Setup
from torch_ref.start_weights import StartWeights
from torch_ref.zero3 import Zero3Engine, Zero3Model, deepspeed_settings, partitioned_forward

MODEL = "model"
# What a run of either side writes, and all that `overwrite_output_dir` removes.
RUN_FILES = (
    *("config.yaml", METRICS_FILE, CHECKPOINTS, MODEL),
    *("samples.jsonl", "run.json", "README.md", "report.html", "curves.png"),
)


def train(config: TrainConfig, console: Console, ranks: Ranks, deepspeed_file: Path | None = None) -> dict[str, Any]:
    """Trains as the config says and returns the last record of `metrics.jsonl`; every rank calls it.

    Raises:
        UserError: whatever the user can mend; before anything is trained where it can be known by then.
    """
    _check(config)
    output = ranks.first(lambda: prepare_output(config))
    setup = Setup(config, console, ranks)
    console.print(f"torch_ref: {ranks.world} rank{'s' if ranks.world > 1 else ''} on {ranks.device.type}")
    if not _fits(config, ranks):
        console.print("note: `mesh` is not used here; ZeRO-3 splits over all ranks", style="yellow")
    if config.remat == "dots":
        console.print("note: `remat: dots` is taken as `full`: layers are recomputed whole", style="yellow")
    checkpoints = Checkpoints(output, ranks, keep=config.save_total_limit)
    # One rank looks, so that all see the same, whatever their file system shows them.
    resume = ranks.first(lambda: resume_step(config, checkpoints))
    saved = ranks.first(lambda: checkpoints.run(resume)) if resume else {}
    batch = setup.global_batch_size(saved.get("global_batch_size"))
    pairs = setup.train_pairs()
    plan = setup.plan("training", pairs, batch=batch, seed=config.seed)
    total_steps = (
        config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * plan.steps_per_epoch)
    )
    this_run = identity(config, batch, plan.lengths)
    if resume:
        check_same_run(saved, this_run, output)
        if resume >= total_steps:
            raise CheckpointError(
                f"{output} holds this run, finished at step {resume}: nothing is left to train. Give another "
                "`output_dir`, or set `overwrite_output_dir: true` to train it again"
            )
    evaluation = _evaluation(setup) if config.do_eval else None
    engine = make_engine(setup, deepspeed_file, resumes=bool(resume))
    console.print(f"engine: {engine.name}")
    if resume:
        checkpoints.load(resume, engine)
        console.print(f"resuming at step {resume} of {total_steps}")
    else:
        console.print(f"training {setup.parameter_count:,} parameters for {total_steps} steps")
    if ranks.is_first:
        (output / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    schedule = learning_rate_schedule(config, total_steps)
    run = Run(config, setup, plan, pairs, engine, schedule, evaluation, checkpoints, this_run, total_steps, output)
    record = run.steps(resume)
    export_model(engine, output / MODEL, config.export_dtype or config.dtype, setup.tokenizer, ranks)
    console.print(f"trained: {output / MODEL}")
    return record


def make_engine(setup: Setup, deepspeed_file: Path | None = None, *, resumes: bool = False) -> Engine:
    """The engine for the ranks there are, its model loaded: DeepSpeed where a launcher started the process."""
    if not setup.ranks.launched:
        policy = setup.load_policy(torch.float32, trained=True)
        return PlainEngine(policy, setup.config)
    _ = setup.attention, setup.parameter_count  # looked at before models are made partitioned
    partition = Zero3Model(deepspeed_settings(setup.config, deepspeed_file))
    engine = Zero3Engine(setup.load_policy(trained=True), setup.config, setup.ranks, partition)
    config = setup.config
    if config.model_name_or_path is not None and config.dtype != "float32" and not resumes:
        with StartWeights(config.model_name_or_path, config.model_revision) as start:
            engine.start_exactly(start, DTYPES[config.dtype])
    return engine


def make_forward(setup: Setup, deepspeed_file: Path | None = None) -> Forward:
    """What scores batches with the model as it stands, partitioned where there are several ranks."""
    if setup.ranks.world == 1:
        return setup.load_policy(trained=False)
    _ = setup.attention, setup.parameter_count
    partition = Zero3Model(deepspeed_settings(setup.config, deepspeed_file))
    return partitioned_forward(setup.load_policy(trained=False), partition)


def _fits(config: TrainConfig, ranks: Ranks) -> bool:
    """Whether the mesh of the other side says the same as the ranks there are."""
    sizes = config.mesh.model_dump().values()
    return config.mesh.tensor == 1 and (-1 in sizes or math.prod(sizes) == ranks.world)


def _check(config: TrainConfig) -> None:
    if (config.load_in_4bit or config.load_in_8bit) and not config.use_peft:
        raise ConfigError("quantised weights cannot be trained; add an adapter to them with `use_peft: true`")
    if config.use_peft and config.model_name_or_path is None:
        raise ConfigError("`use_peft` adds to a model that exists; give `model_name_or_path`, not `model_config`")


def prepare_output(config: TrainConfig) -> Path:
    """Makes the output directory, or makes sure that it may be continued.

    Raises:
        CheckpointError: it cannot be written to, or holds a run that `overwrite_output_dir` does not give away.
    """
    output = Path(config.output_dir)
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CheckpointError(
            f"`output_dir` {output} cannot be written to: {error.strerror}. Give a folder that can"
        ) from error
    if config.overwrite_output_dir:
        for name in RUN_FILES:
            path = output / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    elif (output / MODEL).exists() and not any((output / CHECKPOINTS).glob("*")):
        raise CheckpointError(
            f"{output} holds a finished run without checkpoints, which would be lost. Give another `output_dir`, or "
            "set `overwrite_output_dir: true` to train it again"
        )
    return output


def _evaluation(setup: Setup) -> Evaluation:
    splits = setup.config.eval_splits
    if not splits:
        raise DataError(
            f"`do_eval` is true, but `dataset_splits` {setup.config.dataset_splits} names no split to evaluate. Add "
            "one, or set `do_eval: false`"
        )
    pairs = setup.split_pairs(splits[0])
    plan = setup.plan(splits[0], pairs, batch=PAIRS_PER_PLAN, seed=None)
    return Evaluation(plan, pairs, setup.objective, setup.ranks)


def batch_part(engine: Engine, objective: Objective, batch: Batch, step: RankStep) -> StepPart:
    """What a micro-batch contributes to its step's loss and metrics: one forward for chosen and rejected together."""
    logps = engine.logps(batch)
    sums = response_sums(logps, batch.target_response, len(batch.response_length))
    return step_part(
        objective,
        chosen_sum=sums[batch.chosen],
        rejected_sum=sums[batch.rejected],
        chosen_length=batch.response_length[batch.chosen],
        rejected_length=batch.response_length[batch.rejected],
        step_pairs=len(step.pairs),
        step_chosen_tokens=step.chosen_tokens,
    )


@dataclass
class Run:
    """The loop and what it needs at hand."""

    config: TrainConfig
    setup: Setup
    plan: StepPlan
    pairs: PairDataset
    engine: Engine
    schedule: Schedule
    evaluation: Evaluation | None
    checkpoints: Checkpoints
    identity: Mapping[str, Any]
    total_steps: int
    output: Path

    def steps(self, first_step: int) -> dict[str, Any]:
        """Runs the steps that are left and returns the last record."""
        ranks = self.setup.ranks
        self.record: dict[str, Any] = {}
        self.clock = Clock()
        with open_metrics(self.output if ranks.is_first else None, first_step=first_step) as self.log:
            if self.evaluation is not None and not first_step:
                with self.clock.paused():
                    self._evaluate(0, 0.0)
            left = range(first_step, self.total_steps)
            for step in rank_steps(self.plan, self.pairs, left, ranks.rank, ranks.world):
                self._write(step, self._step(step))
                done = step.step + 1
                with self.clock.paused():
                    if self._is_due("eval", done):
                        self._evaluate(done, step.epoch)
                    if self._is_due("save", done):
                        self.checkpoints.save(done, self.engine, self.identity)
        return self.record

    def _step(self, step: RankStep) -> dict[str, float]:
        """One optimizer step. Returns its metrics over all ranks."""
        ranks, objective = self.setup.ranks, self.setup.objective
        # What dropout an adapter has depends on the step and nothing before it, so that a resumed run has the same.
        torch.manual_seed(hash((self.config.seed, step.step, ranks.rank)) % 2**63)
        sums = np.zeros(len(objective.metrics))
        for number, batch in enumerate(step.micro_batches, start=1):
            part = batch_part(self.engine, objective, batch.to(ranks.device), step)
            self.engine.backward(part.loss, last=number == len(step.micro_batches))
            sums += part.metrics.double().cpu().numpy()
        norm = self.engine.update(self.schedule(step.step))
        tokens = [sum(b.input_tokens for b in step.micro_batches), sum(b.tokens.numel() for b in step.micro_batches)]
        *totals, used, computed = ranks.sum(np.array([*sums, *tokens])).tolist()
        metrics = dict(zip(objective.metrics, totals, strict=True))
        return {**metrics, "grad_norm": norm, "tokens": int(used), "packing_fill": used / computed}

    def _write(self, step: RankStep, metrics: dict[str, Any]) -> None:
        done = step.step + 1
        if not math.isfinite(metrics["loss"]) or not math.isfinite(metrics["grad_norm"]):
            raise TrainingError(
                f"step {done}: the loss is {metrics['loss']}, the gradient norm {metrics['grad_norm']}. The newest "
                f"checkpoint is of step {max(self.checkpoints.steps(), default=0)}. Lower `learning_rate`, raise "
                "`warmup_ratio`, or try `dtype: float32`"
            )
        self.clock.add(metrics["tokens"], len(step.pairs))
        if done % self.config.logging_steps and done != self.total_steps:
            return
        tokens, fill = metrics.pop("tokens"), metrics.pop("packing_fill")
        self.record = {
            "step": done,
            **metrics,
            "learning_rate": self.schedule(step.step),
            "epoch": step.epoch,
            "pairs": len(step.pairs),
            "tokens": tokens,
            **self.clock.speeds(),
            "packing_fill": fill,
        }
        self.clock.restart()
        self.log.write(self.record)
        self.setup.console.print(
            f"step {done}/{self.total_steps}  loss {metrics['loss']:.4f}  accuracy {metrics['rewards/accuracies']:.2f} "
            f"{self.record['pairs_per_second']:.1f} pairs/s"
        )

    def _evaluate(self, step: int, epoch: float) -> None:
        assert self.evaluation is not None
        policy = self.engine.policy
        policy.eval()
        metrics = self.evaluation.run(self.engine.logps)
        policy.train()
        self.log.write({"eval_step": step, "eval_epoch": epoch, **metrics})
        self.setup.console.print(
            f"evaluation at step {step}: loss {metrics['eval_loss']:.4f}, accuracy "
            f"{metrics['eval_rewards/accuracies']:.3f}, margin {metrics['eval_rewards/margins']:.3f}"
        )

    def _is_due(self, what: str, done: int) -> bool:
        """Whether to evaluate ("eval") or save after this step; both happen after the last one unless switched off."""
        strategy = getattr(self.config, f"{what}_strategy")
        if (what == "eval" and self.evaluation is None) or (what == "save" and strategy == "no"):
            return False
        if done == self.total_steps:
            return True
        if strategy == "epoch":
            return done % self.plan.steps_per_epoch == 0
        return strategy == "steps" and done % getattr(self.config, f"{what}_steps") == 0
