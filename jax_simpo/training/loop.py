"""The loop over optimizer steps: step, log, evaluate, save."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NoReturn

import jax
import optax
from jax.experimental.multihost_utils import reached_preemption_sync_point
from rich.console import Console

from jax_simpo.data.loader import Known, StepBatch, step_batches
from jax_simpo.data.packing import StepPlan
from jax_simpo.data.tokenize import GroupDataset
from jax_simpo.errors import CheckpointError, StoppedError, TrainingError
from jax_simpo.hub import Publisher
from jax_simpo.models.transformer import Params
from jax_simpo.processes import distributed
from jax_simpo.run import files, signals
from jax_simpo.run.bad_steps import describe, drop_later, write_bad_step
from jax_simpo.run.best import BestRule, evaluations
from jax_simpo.run.cadence import is_due
from jax_simpo.run.checkpoint import Checkpoints
from jax_simpo.run.guard import StepGuard, weights_error
from jax_simpo.run.health import Finding, HealthWatch, write_findings
from jax_simpo.run.manifest import claim
from jax_simpo.run.metrics import MetricsLog, evaluation_line, read_metrics
from jax_simpo.run.resume import GUARD
from jax_simpo.run.stalls import StallWatch
from jax_simpo.run.sums import Sum
from jax_simpo.sharding import local_rows
from jax_simpo.tracking.trackers import Trackers
from jax_simpo.training.evaluate import Evaluation, ScoreFunction, group_records, score_step
from jax_simpo.training.progress import TrainingProgress
from jax_simpo.training.sampler import Sampler
from jax_simpo.training.setup import Setup
from jax_simpo.training.step import TrainFunctions, make_score_function, run_step


@dataclass
class TrainingLoop:
    """Runs the optimizer steps of a run, and logs, evaluates and saves between them.

    Attributes:
        setup: the objects built from the config.
        plan: the step plan of the training pairs.
        pairs: the training pairs.
        known: what is known of them besides their tokens: sums under the reference, scores, weights.
        functions: the compiled functions.
        schedule: gives the learning rate of an update.
        guard: decides which steps are applied.
        evaluation: evaluates the evaluation pairs; None where the run has none.
        sampler: answers prompts at every evaluation; None where the run does not.
        best_rule: chooses among the evaluations; None where the config asks for no choice.
        health: looks for known ways to fail; None where the config turns it off.
        checkpoints: the checkpoints of the output directory.
        identity: the run's identity, saved with every step.
        total_steps: optimizer steps of the whole run.
        output: the output directory.
        records_before: the sum of the records up to the step that the run goes on from; None where it starts afresh.
        console: where progress and notes go.
        trackers: get every record, on the first process.
        publisher: uploads the models of saves, if the config asks for it.
        on_record: is given every record on the first process; True stops the run once its state is saved. None where
            the user has no callback.
    """

    setup: Setup
    plan: StepPlan
    pairs: GroupDataset
    known: Known
    functions: TrainFunctions
    schedule: optax.Schedule
    guard: StepGuard
    evaluation: Evaluation | None
    sampler: Sampler | None
    best_rule: BestRule | None
    health: HealthWatch | None
    checkpoints: Checkpoints
    identity: Mapping[str, Any]
    total_steps: int
    output: Path
    records_before: Sum | None
    console: Console
    trackers: Trackers
    publisher: Publisher
    on_record: Callable[[dict[str, Any]], bool] | None = None

    def run(self, params: Params, state: Any, first_step: int) -> tuple[Params, int]:
        """Runs the steps from `first_step` on; returns the trained parameters and the number of steps they have had.

        Afterwards `ended_early` says whether early stopping has ended the run.

        Raises:
            TrainingError: a weight is not finite, or a step is bad and none more may be left out.
            StoppedError: a process was told to end; the last step is saved.
            CheckpointError: the best step of a resumed run has no checkpoint.
        """
        self._last_saved = done = first_step
        self._stop_asked = self._passed_on = False
        distributed.on_first("bad steps", lambda: drop_later(self.output, first_step))
        rows = local_rows(self.setup.mesh, self.plan.rows_per_micro_batch)
        with (
            MetricsLog(self.output, before=self.records_before, write=distributed.is_first()) as self._log,
            TrainingProgress(self.console, self.total_steps, first_step, self.plan.lengths.noun) as self._progress,
            StallWatch(self.setup.config.stall_seconds) as self._watch,
        ):
            self._begin_health(first_step)
            self._evaluated = self._evaluations_before(first_step)
            if first_step:  # the run may have been killed before it had removed an old step
                distributed.on_first("old steps", lambda: self.checkpoints.thin_out(first_step, self.best_step))
            self.ended_early = self._ends(first_step)  # a run that was killed before its export has no step left
            steps = range(first_step, first_step if self.ended_early else self.total_steps)
            if self.evaluation is not None and not first_step:
                self._evaluate(params, step=0, epoch=0.0)
            self._clock = _Clock(_counted_before(self.output, self.plan, first_step))
            batches = step_batches(self.plan, self.pairs, steps, rows=rows.tolist(), known=self.known)
            with closing(batches), signals.noted():
                for batch in self._clock.waiting(batches):
                    params, state, metrics = run_step(self.functions, params, state, batch, accepts=self._accepts)
                    self.checkpoints.raise_failed()
                    self._clock.count(len(batch.groups), batch.input_tokens)
                    self._watch.headway()
                    self._after(batch, params, state, metrics)
                    done = batch.step + 1
                    if self._stop_asked or self.ended_early:
                        break
                self.checkpoints.wait()
                if (stop := self._signal_alone()) is not None:  # it came while the last step was saved
                    self._end(stop, done, params, state)
        self._check_weights(done, params)
        counted = self._clock.total
        if counted.seconds:
            share = counted.waited / counted.seconds
            self.console.print(f"the host's row building kept the device waiting {share:.1%} of the time at most")
        return params, done

    @property
    def best_step(self) -> int | None:
        """The step of the best evaluation so far, if its model is the one to export."""
        rule = self.best_rule
        return rule.best_step(self._evaluated) if rule is not None and rule.keep else None

    def _accepts(self, metrics: Mapping[str, Any]) -> bool:
        """Asks the guard, and brings all of a step's figures to the host at once."""
        return self.guard.accepts(jax.device_get(dict(metrics)))

    def _after(self, batch: StepBatch, params: Params, state: Any, metrics: Mapping[str, Any]) -> None:
        """Logs, evaluates and saves where it is due."""
        done = batch.step + 1
        if self.guard.fault:
            with self._clock.paused():
                self._leave_out(batch, params, state, metrics)
        self.guard.count()
        log = done % self.setup.config.logging_steps == 0 or done == self.total_steps
        evaluate, save = self.evaluation is not None and self._is_due("eval", done), self._is_due("save", done)
        stop = self._ending_signal(done)
        if not (log or evaluate or save or stop or self._stop_asked):
            self._progress.advance(done)
            return
        if log and not self.guard.fault:
            self._write(batch, {name: float(value) for name, value in jax.device_get(dict(metrics)).items()})
        with self._clock.paused():
            if evaluate:
                self._evaluate(params, done, batch.epoch)
                self.ended_early = self._ends(done)
                save |= self.best_step == done or (self.ended_early and self.setup.config.save_strategy != "no")
                stop = stop or self._signal_alone()
            if save or self._stop_asked:
                self._save(done, params, state)
            ends = stop is not None or self._stop_asked or self.ended_early or done == self.total_steps
            if save and self.publisher.at_saves and not ends:
                self._publish(done, params)
        if stop is not None:
            self._end(stop, done, params, state)

    def _end(self, stop: signal.Signals, done: int, params: Params, state: Any) -> NoReturn:
        """Ends the run after a step, which is saved.

        Raises:
            StoppedError: always.
        """
        if self._last_saved < done:
            self._save(done, params, state)
        self.checkpoints.wait()
        raise StoppedError(
            f"ended by {stop.name} after step {done} of {self.total_steps}, which is saved. Start the same command "
            "again to go on from there",
            stop,
            saved=True,
        )

    def _ending_signal(self, done: int) -> signal.Signals | None:
        """Returns the signal that ends the run after this step. All processes return one after the same step."""
        if distributed.count() == 1:
            return self._signal_alone()
        # Any process may get a signal. JAX listens to SIGTERM and finds a step after which all of them can stop.
        if signals.asked() is not None and not self._passed_on:
            self._passed_on = True
            os.kill(os.getpid(), signal.SIGTERM)
        return signal.SIGTERM if reached_preemption_sync_point(done) and done < self.total_steps else None

    def _signal_alone(self) -> signal.Signals | None:
        """Returns the signal that a run of one process has got."""
        return signals.asked() if distributed.count() == 1 else None

    def _is_due(self, action: Literal["eval", "save"], done: int) -> bool:
        return is_due(
            self.setup.config,
            action,
            done,
            total_steps=self.total_steps,
            steps_per_epoch=self.plan.steps_per_epoch,
        )

    @cached_property
    def _score(self) -> ScoreFunction:
        """The compiled function that scores a bad step; the evaluation's is made for rows of another shape."""
        setup = self.setup
        return make_score_function(setup.forward_of(self.plan), setup.mesh, prompts=setup.objective.reads_prompts)

    def _leave_out(self, batch: StepBatch, params: Params, state: Any, metrics: Mapping[str, Any]) -> None:
        """Writes down what a bad step would have trained on. Ends the run, saved, unless the step may be left out.

        Raises:
            TrainingError: `on_bad_step` is `error`, or too many steps have been left out.
        """
        done, file, goes_on = batch.step + 1, self.output / files.BAD_STEPS, self.guard.may_leave_out
        if not goes_on and done - 1 > self._last_saved:
            self._save(done - 1, params, state)
        if not goes_on:
            self.checkpoints.wait()
        self._write_down(batch, params, metrics, left_out=goes_on)
        if not goes_on:
            raise TrainingError(self.guard.error(done, file))
        self.console.print(self.guard.warning(done, file), style="yellow")

    def _write_down(self, batch: StepBatch, params: Params, metrics: Mapping[str, Any], *, left_out: bool) -> None:
        """Writes a bad step and its groups to `bad_steps.jsonl`."""
        scores = score_step(self._score, params, self.plan, self.pairs, self.setup.mesh, batch.step, self.known)
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        scored = group_records(scores, self.setup.objective)
        record = describe(batch.step + 1, self.guard.fault, values, batch.groups.tolist(), scored, self.pairs)
        distributed.on_first("bad step", lambda: write_bad_step(self.output, {**record, "left_out": left_out}))

    def _check_weights(self, done: int, params: Params) -> None:
        """Makes sure that an update has not made weights that are not finite, before they are saved or exported.

        Raises:
            TrainingError: one has.
        """
        if not self.functions.all_finite(params):
            self.checkpoints.wait()
            raise TrainingError(weights_error(done, self._last_saved))

    def _save(self, done: int, params: Params, state: Any) -> None:
        self._check_weights(done, params)
        trained, _ = self.setup.model.split(params)
        records = self._log.synced()
        guard = self.guard.state
        run = {**self.identity, **({GUARD: guard} if guard else {})}
        self.checkpoints.save(done, trained, state, run, records, keep_step=self.best_step)
        self._last_saved = done
        self.trackers.flush()
        self._watch.headway()

    def _publish(self, done: int, params: Params) -> None:
        """Exports the model of a save and has it uploaded, unless the one before is still on its way."""
        if not distributed.collect("upload", self.publisher.may_save())[0]:
            return
        if distributed.is_first():
            claim(self.output, files.HUB)
        self.setup.export(params, self.output / files.HUB)
        self.publisher.save(done)

    def _write(self, batch: StepBatch, values: Mapping[str, float]) -> None:
        rates = self._clock.rates()
        record = {
            "step": batch.step + 1,
            **values,
            "learning_rate": float(self.schedule(batch.step - self.guard.left_out)),
            "epoch": batch.epoch,
            "pairs": len(batch.groups),
            "tokens": batch.input_tokens,
            "tokens_per_second": rates.tokens / rates.seconds,
            "pairs_per_second": rates.pairs / rates.seconds,
            "packing_fill": batch.input_tokens / batch.computed_tokens,
            "idle": rates.waited / rates.seconds,
            **{f"total_{name}": value for name, value in vars(self._clock.total).items()},
        }
        self._record(record)
        self._progress.show(batch.step + 1, record)

    def _record(self, record: dict[str, Any]) -> None:
        """Logs a record and gives it to the callback, whose answer on the first process counts for all."""
        self._log.write(record)
        self.trackers.log(record)
        if self.health is not None and (news := self.health.observe(record)):
            self._tell(news)
        if self.on_record is not None:
            asked = self.on_record(record) if distributed.is_first() else False
            self._stop_asked |= distributed.collect("stop", asked)[0]

    def _begin_health(self, first_step: int) -> None:
        """Tells what is wrong before training; of a resumed run the records before have been told of."""
        if self.health is None:
            return
        at_start = list(self.health.findings)
        for record in read_metrics(self.output) if first_step and distributed.is_first() else ():
            self.health.observe(record)
        self._tell([] if first_step else at_start)

    def _tell(self, news: Sequence[Finding]) -> None:
        """Prints new findings, and writes all of them down."""
        assert self.health is not None
        for finding in news:
            self.console.print(f"warning: step {finding.step}: {finding.sentence}", style="yellow")
        if distributed.is_first():
            write_findings(self.output, self.health.findings)

    def _evaluate(self, params: Params, step: int, epoch: float) -> None:
        assert self.evaluation is not None
        metrics = self.evaluation.run(params)
        self._watch.headway()
        if self.sampler is not None:
            metrics |= self.sampler.answer(params, step, "during")
            self._watch.headway()
        self._evaluated.append({"eval_step": step, "eval_epoch": epoch, **metrics})
        self._record(self._evaluated[-1])
        self.console.print(evaluation_line(step, metrics, list(self.evaluation.source.splits)))

    def _evaluations_before(self, first_step: int) -> list[dict[str, Any]]:
        """Reads the evaluations of the steps before. Process 0 writes the records, and what it reads counts for all.

        Raises:
            CheckpointError: the best of them has no checkpoint, or a damaged one.
        """
        before = evaluations(self.output, first_step) if first_step and distributed.is_first() else []
        before = distributed.collect("evaluations", before)[0]
        rule = self.best_rule
        if rule is not None:
            steps = distributed.collect("steps", self.checkpoints.steps())[0]
            rule.check_saved(before, steps, self.output)
            best = rule.best_step(before) if rule.keep else None
            if best is not None and (damage := self.checkpoints.damage(best)):
                raise CheckpointError(
                    f"{self.output}: the best step so far is {best}, and it is damaged: {damage}. Set "
                    "`load_best_model_at_end: false` to go on"
                )
        return before

    def _ends(self, done: int) -> bool:
        """Returns True, and says so, if early stopping ends the run after this step."""
        rule = self.best_rule
        if rule is None or done == self.total_steps or not rule.ends(self._evaluated):
            return False
        self.console.print(
            f"early stopping: {rule.patience} evaluations without a better {rule.metric}; the run ends at step {done} "
            f"of {self.total_steps}"
        )
        return True


@dataclass
class _Counted:
    """Counts of training: pairs, tokens, seconds without evaluating and saving, and the seconds waited for rows."""

    pairs: int = 0
    tokens: int = 0
    seconds: float = 0.0
    waited: float = 0.0


def _counted_before(output: Path, plan: StepPlan, first_step: int) -> _Counted:
    """Counts the pairs and tokens of the steps before `first_step`; their seconds are read from the last record."""
    tokens = plan.lengths.row_tokens(plan.prefix_sharing)
    steps = [plan.groups(step) for step in range(first_step)]
    logged = [record for record in read_metrics(output) if "step" in record]
    last = logged[-1] if steps and logged else {}
    seconds, waited = (last.get(f"total_{name}", 0.0) for name in ("seconds", "waited"))
    return _Counted(sum(map(len, steps)), int(sum(tokens[pairs].sum() for pairs in steps)), seconds, waited)


class _Clock:
    """Counts pairs, tokens and seconds of training: in all, and since the last logged step."""

    def __init__(self, before: _Counted) -> None:
        self.total = before
        self._last = _Counted(**vars(before))
        self._since = time.perf_counter()

    def count(self, pairs: int, tokens: int) -> None:
        """Counts a step."""
        self.total.pairs += pairs
        self.total.tokens += tokens

    def rates(self) -> _Counted:
        """Returns the counts since the last call."""
        time_of_call = time.perf_counter()
        self.total.seconds += time_of_call - self._since
        difference = _Counted(*(getattr(self.total, name) - last for name, last in vars(self._last).items()))
        self._since, self._last = time_of_call, _Counted(**vars(self.total))
        return difference

    def waiting(self, batches: Iterator[StepBatch]) -> Iterator[StepBatch]:
        """Yields the batches, and counts the time that the loop waits for each."""
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self.total.waited += time.perf_counter() - started
            if batch is None:
                return
            yield batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Does not count the time spent inside."""
        started = time.perf_counter()
        yield
        self._since += time.perf_counter() - started
