"""Trains: checks, builds, resumes or starts, runs the steps, logs, evaluates, saves and exports, in this order."""

from __future__ import annotations

import math
import signal
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console

from jax_simpo.config import TrainConfig, jax_only
from jax_simpo.data.loader import Known
from jax_simpo.data.packing import StepPlan
from jax_simpo.data.tokenize import GroupDataset
from jax_simpo.errors import ConfigError, StoppedError, TrainingError
from jax_simpo.run import files, signals
from jax_simpo.run.bad_steps import describe, drop_later, write_bad_step
from jax_simpo.run.best import BestRule
from jax_simpo.run.cadence import count_steps, is_due
from jax_simpo.run.facts import note_export
from jax_simpo.run.guard import StepGuard, weights_error
from jax_simpo.run.lock import locked
from jax_simpo.run.manifest import claim, write_file
from jax_simpo.run.metrics import MetricsLog, check_records, evaluation_line, read_metrics
from jax_simpo.run.output import check_output, make_output, prepare_output
from jax_simpo.run.resume import GUARD, check_not_finished, check_same_run, run_identity
from jax_simpo.run.stalls import StallWatch
from jax_simpo.run.sums import Sum
from torch_ref.batches import Batch, RankStep, rank_steps
from torch_ref.best import Choice
from torch_ref.checkpoint import Checkpoints
from torch_ref.clock import Clock
from torch_ref.distributed import Ranks
from torch_ref.engine import Engine, PlainEngine
from torch_ref.evaluate import GROUPS_PER_PLAN, Evaluation, group_records, score_step
from torch_ref.export import export_model
from torch_ref.losses import StepPart, response_sums, step_part
from torch_ref.model import DTYPES
from torch_ref.notes import print_attention, print_split
from torch_ref.objectives import Objective, Responses
from torch_ref.optim import Schedule, learning_rate_schedule
from torch_ref.reference import frozen_weights, reference_sums
from torch_ref.setup import Setup
from torch_ref.start_weights import StartWeights
from torch_ref.zero3 import Zero3Engine, Zero3Model, deepspeed_settings

_LARGEST_RATE = 1e37  # AdamW divides it by 1 - beta1 at first, in float32


def train(config: TrainConfig, console: Console, ranks: Ranks, deepspeed_file: Path | None = None) -> dict[str, Any]:
    """Trains as the config says, exports the model, and returns the last record of `metrics.jsonl`.

    Every rank calls it. A former run is removed (`overwrite_output_dir`) only once the new run's model is loaded.

    Args:
        config: the settings of the run.
        console: where notes go.
        ranks: the ranks of the run.
        deepspeed_file: a DeepSpeed JSON file; None takes the one of jax-simpo.

    Raises:
        UserError: a mistake that the user can mend; raised before training wherever it can be known by then.
    """
    _check(config)
    output = Path(config.output_dir)
    ranks.first(lambda: make_output(output))
    with ExitStack() as held:
        ranks.first(lambda: held.enter_context(locked(output)))
        ranks.first(lambda: check_output(config, output, writes=files.OF_TORCH_REF))
        return _train(config, output, console, ranks, deepspeed_file)


def _train(
    config: TrainConfig, output: Path, console: Console, ranks: Ranks, deepspeed_file: Path | None
) -> dict[str, Any]:
    setup = Setup(config, ranks)
    console.print(f"torch_ref: {ranks.world} rank{'s' if ranks.world > 1 else ''} on {ranks.device.type}")
    if not _fits(config, ranks):
        console.print("note: `mesh` is not used here; ZeRO-3 splits over all ranks", style="yellow")
    if config.remat in ("dots", "attention"):
        console.print(f"note: `remat: {config.remat}` is taken as `full`: layers are recomputed whole", style="yellow")
    checkpoints = Checkpoints(output, ranks, keep=config.save_total_limit)
    # One rank reads the folder, so that all ranks resume at the same step, whatever their file system shows them.
    chosen = ranks.first(lambda: checkpoints.choose(config))
    for note in chosen.notes:
        console.print(note, style="yellow")
    resume = chosen.step
    saved = ranks.first(lambda: checkpoints.run(resume)) if resume else {}
    batch = setup.global_batch_size(saved.get("global_batch_size"))
    groups = setup.train_pairs()
    plan = setup.step_plan(groups, batch=batch, seed=config.seed)
    print_attention(console, setup)
    print_split(console, setup, "training", groups, plan)
    total_steps = count_steps(config, plan.steps_per_epoch)
    identity = ranks.first(lambda: run_identity(config, batch, groups))
    if resume:
        check_same_run(saved, identity, output)
        ranks.first(lambda: check_not_finished(output, resume, total_steps, writes=(files.MODEL,)))
    best_rule, before = BestRule.of(config), None
    if resume:
        before = ranks.first(lambda: checkpoints.metrics(resume))
        if lost := ranks.first(lambda: check_records(output, before, needed=best_rule is not None)):
            console.print(lost, style="yellow")
    evaluation = _evaluation(setup, console, best_rule) if config.do_eval else None
    if setup.objective.needs_reference or config.use_peft:
        console.print("hashing the weights that are not trained, which no checkpoint holds")
        identity |= frozen_weights(setup)
        if saved:
            check_same_run(saved, identity, output)
    known = setup.known(groups, training=True)
    if setup.objective.needs_reference:
        splits = [groups] if evaluation is None else [groups, evaluation.source]
        reference, *of_evaluation = reference_sums(setup, splits, console, deepspeed_file)
        known = replace(known, reference=reference)
        if evaluation is not None:
            evaluation = replace(evaluation, known=replace(evaluation.known, reference=of_evaluation[0]))
    engine = make_engine(setup, deepspeed_file, resumes=bool(resume))
    console.print(f"engine: {engine.name}")
    ranks.first(lambda: prepare_output(config, output))
    if resume:
        ranks.first(lambda: checkpoints.leave_behind(chosen))
    if resume:
        checkpoints.load(resume, engine)
        console.print(f"resuming at step {resume} of {total_steps}")
    else:
        console.print(f"training {setup.parameter_count:,} parameters for {total_steps} steps")
    ranks.first(lambda: write_file(output, files.CONFIG, config.to_yaml()))
    schedule = learning_rate_schedule(config, total_steps)
    run = Run(
        config=config,
        setup=setup,
        console=console,
        plan=plan,
        groups=groups,
        known=known,
        engine=engine,
        schedule=schedule,
        guard=StepGuard.of(config, saved.get(GUARD)),
        evaluation=evaluation,
        choice=Choice(best_rule, ranks),
        checkpoints=checkpoints,
        identity=identity,
        total_steps=total_steps,
        output=output,
        records_before=before,
    )
    done = run.steps(resume)
    model_step = run.take_best(done)
    ranks.first(lambda: claim(output, files.MODEL))
    export_model(engine, output / files.MODEL, config.export_dtype or config.dtype, setup.tokenizer, ranks)
    # Only early stopping ends a run before its last step.
    ranks.first(lambda: note_export(output, done, model_step=model_step, ended_early=done < total_steps))
    console.print(f"trained: {output / files.MODEL}")
    return ranks.first(lambda: read_metrics(output)[-1])


def make_engine(setup: Setup, deepspeed_file: Path | None = None, *, resumes: bool = False) -> Engine:
    """Makes the engine with its model loaded: DeepSpeed if a launcher started this process, PyTorch alone otherwise."""
    if not setup.ranks.launched:
        policy = setup.load_policy(torch.float32, trained=True)
        return PlainEngine(policy, setup.config)
    partition = Zero3Model(deepspeed_settings(setup.config, deepspeed_file))
    engine = Zero3Engine(setup.load_policy(trained=True), setup.config, setup.ranks, partition)
    config = setup.config
    if config.model_name_or_path is not None and config.dtype != "float32" and not resumes:
        with StartWeights(config.model_name_or_path, config.model_revision) as start:
            engine.start_exactly(start, DTYPES[config.dtype])
    return engine


def _fits(config: TrainConfig, ranks: Ranks) -> bool:
    """Returns True if the config's mesh describes this number of ranks."""
    sizes = config.mesh.model_dump().values()
    return config.mesh.tensor == 1 and (-1 in sizes or math.prod(sizes) == ranks.world)


def _check(config: TrainConfig) -> None:
    if not_here := jax_only(config):
        raise ConfigError("\n".join(not_here.values()))
    if (config.load_in_4bit or config.load_in_8bit) and not config.use_peft:
        raise ConfigError("quantised weights cannot be trained; add an adapter to them with `use_peft: true`")
    if config.learning_rate > _LARGEST_RATE:
        raise ConfigError(f"`learning_rate` is {config.learning_rate:g}; PyTorch's AdamW computes with at most 1e37")
    if config.use_peft and config.model_name_or_path is None:
        raise ConfigError("`use_peft` adds to a model that exists; give `model_name_or_path`, not `model_config`")


def _evaluation(setup: Setup, console: Console, best_rule: BestRule | None) -> Evaluation:
    groups = setup.eval_pairs()
    if best_rule is not None:
        best_rule.check((*setup.objective.metrics, "pairs"), list(groups.splits))
    plan = setup.step_plan(groups, batch=GROUPS_PER_PLAN, seed=None)
    print_split(console, setup, groups.name, groups, plan)
    return Evaluation(plan, groups, setup.objective, setup.ranks, setup.known(groups))


def batch_part(engine: Engine, objective: Objective, batch: Batch, step: RankStep) -> StepPart:
    """Computes a micro-batch's share of its step's loss and metrics, with one forward pass for all responses."""
    responses = len(batch.response_length)
    sums = response_sums(engine.logps(batch), batch.target_response, responses + len(batch.groups))
    return step_part(
        objective,
        Responses(sums[:responses], batch.response_length, batch.reference),
        objective.comparisons(batch.rankings, batch.scores).to(sums.device),
        prompt_sum=sums[responses:] if objective.reads_prompts else None,
        weights=batch.weights,
        denominator=objective.denominator(step.rankings),
        step_chosen_tokens=step.chosen_tokens,
    )


@dataclass
class Run:
    """Runs the optimizer steps of a run, and logs, evaluates and saves between them.

    Attributes:
        config: the settings of the run.
        setup: the objects built from the config.
        console: where the lines about steps go.
        plan: the step plan of the training groups.
        groups: the training groups.
        known: what is known of them besides their tokens: sums under the reference, scores, weights.
        engine: the model with its optimizer.
        schedule: gives the learning rate of an update.
        guard: decides which steps are applied.
        evaluation: evaluates the evaluation groups; None where the run has none.
        choice: chooses among the evaluations.
        checkpoints: the checkpoints of the output directory.
        identity: the run's identity, saved with every step.
        total_steps: optimizer steps of the whole run.
        output: the output directory.
        records_before: the sum of the records up to the step that the run goes on from; None where it starts afresh.
    """

    config: TrainConfig
    setup: Setup
    console: Console
    plan: StepPlan
    groups: GroupDataset
    known: Known
    engine: Engine
    schedule: Schedule
    guard: StepGuard
    evaluation: Evaluation | None
    choice: Choice
    checkpoints: Checkpoints
    identity: Mapping[str, Any]
    total_steps: int
    output: Path
    records_before: Sum | None

    def steps(self, first_step: int) -> int:
        """Runs the steps that are left, and returns the number of steps done; early stopping may leave some out.

        Raises:
            TrainingError: a step is bad and none more may be left out, or a weight is not finite.
            StoppedError: a rank was told to end; the last step is saved.
        """
        ranks = self.setup.ranks
        self.clock = Clock()
        self._last_saved = done = first_step
        ranks.first(lambda: drop_later(self.output, first_step))
        with (
            MetricsLog(self.output, before=self.records_before, write=ranks.is_first) as self.log,
            StallWatch(self.config.stall_seconds) as watch,
        ):
            if first_step:
                self.choice.resume(self.output, first_step, self.checkpoints.steps())
            # A run that early stopping has ended, but that was killed before its export, takes no further step.
            left = range(first_step, first_step if self.choice.ends else self.total_steps)
            shares = rank_steps(self.plan, self.groups, left, ranks.rank, ranks.world, known=self.known)
            if self.evaluation is not None and not first_step:
                with self.clock.paused():
                    self._evaluate(0, 0.0)
            with closing(shares), signals.noted():
                for step in shares:
                    metrics, work = self._step(step)
                    done = step.step + 1
                    if not self.guard.fault:
                        self._write(step, metrics, work)
                    with self.clock.paused():
                        if self.guard.fault:
                            self._leave_out(step, metrics)
                        self.guard.count()
                        stop = self._evaluate_and_save(done, step.epoch)
                    watch.headway()
                    if stop is not None:
                        raise StoppedError(
                            f"ended by {stop.name} after step {done} of {self.total_steps}, which is saved. Start the "
                            "same command again to go on from there",
                            stop,
                            saved=True,
                        )
                    if self.choice.ends:
                        break
        self._check_weights(done)
        if done < self.total_steps and self.choice.rule is not None:
            self.console.print(
                f"early stopping: {self.choice.rule.patience} evaluations without a better {self.choice.rule.metric}; "
                f"the run ends at step {done} of {self.total_steps}"
            )
        return done

    def take_best(self, done: int) -> int | None:
        """Puts the model of the best evaluation into the engine, if it is the one to export, and returns its step."""
        rule, best = self.choice.rule, self.choice.best_step
        if rule is not None and best is not None:
            self.console.print(f"the best model by {rule.metric} is that of step {best}; it is exported")
            if best != done:
                self.checkpoints.load(best, self.engine)
        return best

    def _step(self, step: RankStep) -> tuple[dict[str, float], dict[str, float]]:
        """Runs one optimizer step, applied if `guard` accepts it.

        Returns:
            The metrics of its groups, and the tokens that it took and their share of those computed, over all ranks.
        """
        ranks, objective = self.setup.ranks, self.setup.objective
        # The dropout of an adapter depends on the step alone, so that a resumed run has the same.
        torch.manual_seed(hash((self.config.seed, step.step, ranks.rank)) % 2**63)
        sums = np.zeros(len(objective.metrics))
        for number, batch in enumerate(step.micro_batches, start=1):
            part = batch_part(self.engine, objective, batch.to(ranks.device), step)
            self.engine.backward(part.loss, last=number == len(step.micro_batches))
            sums += part.metrics.cpu().numpy()
        tokens = [sum(b.input_tokens for b in step.micro_batches), sum(b.tokens.numel() for b in step.micro_batches)]
        *totals, used, computed = ranks.sum(np.array([*sums, *tokens])).tolist()
        metrics = dict(zip(objective.metrics, totals, strict=True))
        # The gradient of a loss that is not finite may be.
        metrics["grad_norm"] = self.engine.gradient_norm() if math.isfinite(metrics["loss"]) else math.nan
        if self.guard.accepts(metrics):
            self.engine.update(self._learning_rate(step), metrics["grad_norm"])
        else:
            self.engine.discard()
        self.clock.add(int(used), len(step.groups))
        return metrics, {"tokens": int(used), "packing_fill": used / computed}

    def _learning_rate(self, step: RankStep) -> float:
        """Returns the learning rate of a step's update. The schedule counts updates."""
        return self.schedule(step.step - self.guard.left_out)

    def _write(self, step: RankStep, metrics: Mapping[str, float], work: Mapping[str, float]) -> None:
        done = step.step + 1
        if done % self.config.logging_steps and done != self.total_steps:
            return
        record = {
            "step": done,
            **metrics,
            "learning_rate": self._learning_rate(step),
            "epoch": step.epoch,
            "pairs": len(step.groups),
            **work,
            **self.clock.speeds(),
        }
        self.clock.restart()
        self.log.write(record)
        self.console.print(
            f"step {done}/{self.total_steps}  loss {metrics['loss']:.4f}  accuracy {metrics['rewards/accuracies']:.2f} "
            f"{record['pairs_per_second']:.1f} {self.plan.lengths.noun}/s"
        )

    def _leave_out(self, step: RankStep, metrics: Mapping[str, float]) -> None:
        """Writes down what a bad step would have trained on. Ends the run, saved, unless the step may be left out.

        Raises:
            TrainingError: it may not.
        """
        done, guard, file = step.step + 1, self.guard, self.output / files.BAD_STEPS
        goes_on = guard.may_leave_out
        if not goes_on and self._last_saved < done - 1:
            self._save(done - 1)
        self.engine.policy.eval()
        scores = score_step(self.engine.logps, self.plan, self.groups, self.setup.ranks, step.step, self.known)
        self.engine.policy.train()
        scored = group_records(scores, self.setup.objective)
        record = describe(done, guard.fault, metrics, step.groups.tolist(), scored, self.groups)
        self.setup.ranks.first(lambda: write_bad_step(self.output, {**record, "left_out": goes_on}))
        if not goes_on:
            raise TrainingError(guard.error(done, file))
        self.console.print(guard.warning(done, file), style="yellow")

    def _ending_signal(self) -> signal.Signals | None:
        """Returns the signal that ends the run after this step. All ranks return one after the same step."""
        asked = signals.asked()
        if not self.setup.ranks.sum(np.array([asked is not None]))[0]:
            return None
        return asked or signal.SIGTERM

    def _evaluate_and_save(self, done: int, epoch: float) -> signal.Signals | None:
        """Evaluates after a step if that is due, and saves it if that is due or the evaluation wants it.

        Returns:
            The signal that ends the run, if there is one; the step is saved then too.
        """
        if self.evaluation is not None and self._is_due("eval", done):
            self._evaluate(done, epoch)
        best = self.choice.best_step
        wanted = best == done or (self.choice.ends and self.config.save_strategy != "no")
        stop = self._ending_signal()
        if stop is not None or wanted or self._is_due("save", done):
            self._save(done)
        return stop

    def _check_weights(self, done: int) -> None:
        """Makes sure that an update has not made weights that are not finite, before they are saved or exported.

        Raises:
            TrainingError: one has.
        """
        if not self.engine.is_finite():
            raise TrainingError(weights_error(done, self._last_saved))

    def _save(self, done: int) -> None:
        self._check_weights(done)
        records = self.log.synced()
        guard = self.guard.state
        run = {**self.identity, **({GUARD: guard} if guard else {})}
        self.checkpoints.save(done, self.engine, run, records, keep_step=self.choice.best_step)
        self._last_saved = done

    def _evaluate(self, step: int, epoch: float) -> None:
        assert self.evaluation is not None
        policy = self.engine.policy
        policy.eval()
        metrics = self.evaluation.run(self.engine.logps)
        policy.train()
        record = {"eval_step": step, "eval_epoch": epoch, **metrics}
        self.log.write(record)
        self.choice.add([record])
        self.console.print(evaluation_line(step, metrics, list(self.evaluation.source.splits)))

    def _is_due(self, action: Literal["eval", "save"], done: int) -> bool:
        return is_due(
            self.config, action, done, total_steps=self.total_steps, steps_per_epoch=self.plan.steps_per_epoch
        )
