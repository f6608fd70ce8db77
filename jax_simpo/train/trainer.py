"""The training loop: the thin shell around the pure functions of `step`.

It reads as the run goes: check the output directory, build what the config describes, resume or start, step, log,
evaluate, save, export.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from rich.console import Console

from jax_simpo import model_card, report
from jax_simpo.checkpoint import Checkpoints, abstract_state, check_same_run
from jax_simpo.config import TrainConfig
from jax_simpo.data.loader import StepBatch, step_batches
from jax_simpo.data.packing import StepPlan
from jax_simpo.data.pairs import PairLengths
from jax_simpo.data.tokenize import PairDataset
from jax_simpo.errors import CheckpointError, ConfigError, TrainingError
from jax_simpo.generate import generate
from jax_simpo.models import hf
from jax_simpo.report import FACTS_FILE
from jax_simpo.samples import SAMPLES_FILE, read_answers, read_samples, sample_prompts, with_answers, write_samples
from jax_simpo.train.evaluate import PAIRS_PER_PLAN, Evaluation
from jax_simpo.train.metrics import METRICS_FILE, MetricsLog, TrainingProgress, read_metrics
from jax_simpo.train.optim import count_warmup_steps, learning_rate_schedule, make_optimizer
from jax_simpo.train.setup import CHECKPOINTS, MODEL, Setup
from jax_simpo.train.step import (
    Denominators,
    Params,
    TrainFunctions,
    make_score_function,
    make_train_functions,
    put_rows,
)

# What a run writes, and all that `overwrite_output_dir` removes.
RUN_FILES = (
    *("config.yaml", METRICS_FILE, CHECKPOINTS, MODEL, SAMPLES_FILE),
    *(FACTS_FILE, "README.md", "report.html", "curves.png"),
)


def train(config: TrainConfig, console: Console) -> dict[str, Any]:
    """Trains as the config says and returns the last record of `metrics.jsonl`.

    Everything that can be found wrong without the weights is found before anything is loaded, written or removed.

    Raises:
        UserError: whatever the user can mend.
    """
    output = Path(config.output_dir)
    check_output(config, output)
    setup = Setup(config, console)
    mesh = setup.mesh
    console.print(f"mesh: {', '.join(f'{axis}={size}' for axis, size in mesh.shape.items())} ({mesh.devices.flat[0]})")
    if config.model_name_or_path is not None and "learning_rate" not in config.model_fields_set:
        console.print(
            f"note: `learning_rate` is not set; {config.learning_rate} is used, published SimPO runs use 3e-7 to 1e-6",
            style="yellow",
        )
    train_pairs = setup.train_pairs()
    resume_step, saved = _starting_point(config, output)
    batch = setup.global_batch_size(saved.get("global_batch_size"))
    plan = setup.plan(train_pairs, batch=batch, seed=config.seed)
    total_steps = count_steps(config, plan)
    identity = {
        **config.run_identity(),
        "global_batch_size": batch,
        "training pairs": f"{len(plan.lengths)} pairs, lengths {_fingerprint(plan.lengths)}",
    }
    if saved:
        check_same_run(saved, identity, output)
        if resume_step >= total_steps and (output / MODEL).exists():
            raise CheckpointError(
                f"{output} holds this run, finished at step {resume_step}: nothing is left to train. Give another "
                "`output_dir`, or set `overwrite_output_dir: true` to train it again"
            )
    packing = setup.describe_plan("training", plan)
    evaluation = _evaluation(setup) if config.do_eval else None

    if config.overwrite_output_dir:
        remove_run(output)
    with Checkpoints(output / CHECKPOINTS, keep=config.save_total_limit) as checkpoints, jax.set_mesh(mesh):
        schedule, optimizer = _optimizer(config, total_steps)
        functions = make_train_functions(setup.forward, setup.objective, optimizer, mesh)
        if resume_step:
            abstract = setup.model.abstract
            params = checkpoints.params(resume_step, abstract_state(abstract, setup.model.shardings(mesh)))
            shapes = jax.eval_shape(optimizer.init, abstract)
            state = checkpoints.optimizer(resume_step, abstract_state(shapes, functions.optimizer_shardings))
            console.print(f"resuming at step {resume_step} of {total_steps}")
        else:
            params = setup.load_params()
            state = functions.init_optimizer(params)
            console.print(f"training {setup.model.parameter_count:,} parameters for {total_steps} steps")
        (output / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        report.write_facts(
            output,
            mesh=mesh.shape,
            device=mesh.devices.flat[0].device_kind,
            parameters=setup.model.parameter_count,
            training_pairs=len(train_pairs),
            total_steps=total_steps,
            tokens_saved=1 - packing.input_tokens / packing.separate_tokens,
        )
        sampler = _Sampler(setup, train_pairs if evaluation is None else evaluation.source, output)
        if not resume_step:
            sampler.answer(params, "before")

        run = _Run(config, setup, plan, functions, schedule, evaluation, checkpoints, identity, total_steps, output)
        params = run.steps(params, state, train_pairs, resume_step)
        hf.save_model(
            params, setup.model, output / MODEL, config.export_dtype or config.dtype, tokenizer=setup.tokenizer
        )
        sampler.answer(params, "after")
    report.write_report(output)
    model_card.write(output, config, global_batch_size=batch)
    report.print_summary(console, output)
    return read_metrics(output)[-1]


def _optimizer(config: TrainConfig, total_steps: int) -> tuple[optax.Schedule, optax.GradientTransformation]:
    schedule = learning_rate_schedule(
        config.lr_scheduler_type,
        config.learning_rate,
        total_steps,
        count_warmup_steps(total_steps, config.warmup_steps, config.warmup_ratio),
    )
    optimizer = make_optimizer(
        schedule,
        b1=config.adam_beta1,
        b2=config.adam_beta2,
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
    )
    return schedule, optimizer


class _Sampler:
    """Lets the model answer a few prompts before and after training."""

    def __init__(self, setup: Setup, pairs: PairDataset, output: Path) -> None:
        self._setup, self._pairs, self._output = setup, pairs, output

    def answer(self, params: Params, when: Literal["before", "after"]) -> None:
        config, tokenizer = self._setup.config, self._setup.tokenizer
        if not config.sample_prompts:
            return
        samples, prompts = sample_prompts(self._pairs, tokenizer, config.sample_prompts)
        if when == "after":
            samples = read_samples(self._output) or samples  # with what the untrained model said
        end = tokenizer.eos_token_id
        answers = generate(self._setup.forward, params, self._setup.mesh, prompts, config.sample_tokens, end)
        write_samples(self._output, with_answers(samples, when, read_answers(answers, tokenizer)))


def check_output(config: TrainConfig, output: Path) -> None:
    """Makes the output directory, or makes sure that it may be written to.

    Raises:
        CheckpointError: it cannot, or it holds a run that `overwrite_output_dir` does not give away.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CheckpointError(
            f"`output_dir` {output} cannot be written to: {error.strerror}. Give a folder that can"
        ) from error
    finished = (output / MODEL).exists() and not any((output / CHECKPOINTS).glob("*"))
    if finished and not config.overwrite_output_dir:
        raise CheckpointError(
            f"{output} holds a finished run without checkpoints, which would be lost. Give another `output_dir`, or "
            "set `overwrite_output_dir: true` to train it again"
        )


def remove_run(output: Path) -> None:
    """Removes what a run wrote, and nothing else."""
    for name in RUN_FILES:
        path = output / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def count_steps(config: TrainConfig, plan: StepPlan) -> int:
    """Optimizer steps of the whole run."""
    if config.max_steps > 0:
        return config.max_steps
    return math.ceil(config.num_train_epochs * plan.steps_per_epoch)


def _starting_point(config: TrainConfig, output: Path) -> tuple[int, dict[str, Any]]:
    """The step to continue from and the identity saved with it; step 0 starts afresh."""
    if config.overwrite_output_dir or not (output / CHECKPOINTS).is_dir():
        steps = []
    else:
        with Checkpoints(output / CHECKPOINTS, read_only=True) as checkpoints:
            steps = checkpoints.steps()
            step = _resume_step(config.resume_from_checkpoint, steps, output)
            if step:
                return step, checkpoints.run(step)
    return _resume_step(config.resume_from_checkpoint, steps, output), {}


def _resume_step(wanted: bool | int | str | None, steps: list[int], output: Path) -> int:
    """Which of the steps there are `resume_from_checkpoint` means."""
    if wanted is False:
        if steps:
            raise CheckpointError(
                f"`resume_from_checkpoint` is false, but {output} holds checkpoints (steps {steps}). Give another "
                "`output_dir`, or set `overwrite_output_dir: true` to remove them"
            )
        return 0
    if wanted is None or wanted is True:
        if wanted and not steps:
            raise CheckpointError(
                f"`resume_from_checkpoint` is true, but {output / CHECKPOINTS} holds no checkpoint. Remove the key to "
                "start afresh, or correct `output_dir`"
            )
        return steps[-1] if steps else 0
    folder = Path(str(wanted))
    step = folder.name.removeprefix("checkpoint-")
    elsewhere = len(folder.parts) > 1 and folder.parent.absolute() != (output / CHECKPOINTS).absolute()
    if not step.isdecimal() or elsewhere:
        raise ConfigError(
            f"`resume_from_checkpoint` is {wanted!r}; expected true, false, a step number, or a folder "
            f"{output / CHECKPOINTS}/STEP"
        )
    if int(step) not in steps:
        raise CheckpointError(f"{output / CHECKPOINTS}: there is no step {step}; there are: {steps or 'none'}")
    return int(step)


def _fingerprint(lengths: PairLengths) -> str:
    """Tells one set of pairs from another by what the plan depends on."""
    digest = sha256()
    for column in (lengths.chosen_inputs, lengths.rejected_inputs, lengths.shared_inputs, lengths.chosen_targets):
        digest.update(column.tobytes())
    return digest.hexdigest()[:16]


def _evaluation(setup: Setup) -> Evaluation:
    pairs = setup.eval_pairs()
    plan = setup.plan(pairs, batch=PAIRS_PER_PLAN, seed=None)
    return Evaluation(make_score_function(setup.forward, setup.mesh), plan, pairs, setup.objective, setup.mesh)


@dataclass
class _Run:
    """The loop and what it needs at hand."""

    config: TrainConfig
    setup: Setup
    plan: StepPlan
    functions: TrainFunctions
    schedule: Any
    evaluation: Evaluation | None
    checkpoints: Checkpoints
    identity: Mapping[str, Any]
    total_steps: int
    output: Path

    def steps(self, params: Params, state: Any, pairs: Any, first_step: int) -> Params:
        """Runs the steps that are left and returns the trained parameters."""
        self.clock = _Clock()
        with (
            MetricsLog(self.output, first_step=first_step) as self.log,
            TrainingProgress(self.setup.console, self.total_steps, first_step) as self.progress,
        ):
            if self.evaluation is not None and not first_step:
                self._evaluate(params, step=0, epoch=0.0)
            return self._loop(params, state, pairs, first_step)

    def _loop(self, params: Params, state: Any, pairs: Any, first_step: int) -> Params:
        for batch in step_batches(self.plan, pairs, range(first_step, self.total_steps)):
            params, state, metrics = self._step(params, state, batch)
            done = batch.step + 1
            self.clock.add(batch.input_tokens, len(batch.pairs))
            if done % self.config.logging_steps == 0 or done == self.total_steps:
                self._write(batch, metrics)
            else:
                self.progress.advance(done)
            with self.clock.paused():
                if self._is_due("eval", batch):
                    self._evaluate(params, done, batch.epoch)
                if self._is_due("save", batch):
                    self.checkpoints.save(done, params, state, self.identity)
        return params

    def _step(self, params: Params, state: Any, batch: StepBatch) -> tuple[Params, Any, dict[str, Any]]:
        denominators = Denominators(jnp.float32(len(batch.pairs)), jnp.float32(batch.chosen_tokens))
        so_far = self.functions.start(params)
        for rows in batch.micro_batches:
            so_far = self.functions.accumulate(params, so_far, put_rows(rows.arrays(), self.setup.mesh), denominators)
        params, state, norm = self.functions.update(params, state, so_far.gradients)
        return params, state, {**so_far.metrics, "grad_norm": norm}

    def _write(self, batch: StepBatch, metrics: dict[str, Any]) -> None:
        """Logs a step. Waits for the device to have finished it."""
        done = batch.step + 1
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not math.isfinite(values["loss"]) or not math.isfinite(values["grad_norm"]):
            raise TrainingError(
                f"step {done}: the loss is {values['loss']}, the gradient norm {values['grad_norm']}. The newest "
                f"checkpoint is of step {max(self.checkpoints.steps(), default=0)}. Lower `learning_rate`, raise "
                "`warmup_ratio`, or try `dtype: float32`"
            )
        seconds, tokens, pairs = self.clock.restart()
        record = {
            "step": done,
            **values,
            "learning_rate": float(self.schedule(batch.step)),
            "epoch": batch.epoch,
            "pairs": len(batch.pairs),
            "tokens": batch.input_tokens,
            "tokens_per_second": tokens / seconds,
            "pairs_per_second": pairs / seconds,
            "packing_fill": batch.input_tokens / batch.computed_tokens,
        }
        self.log.write(record)
        self.progress.show(done, record)

    def _evaluate(self, params: Params, step: int, epoch: float) -> None:
        assert self.evaluation is not None
        metrics = self.evaluation.run(params)
        self.log.write({"eval_step": step, "eval_epoch": epoch, **metrics})
        self.setup.console.print(
            f"evaluation at step {step}: loss {metrics['eval_loss']:.4f}, accuracy "
            f"{metrics['eval_rewards/accuracies']:.3f}, margin {metrics['eval_rewards/margins']:.3f}"
        )

    def _is_due(self, what: str, batch: StepBatch) -> bool:
        """Whether to evaluate ("eval") or save after this step; both happen after the last one unless switched off."""
        strategy = getattr(self.config, f"{what}_strategy")
        if (what == "eval" and self.evaluation is None) or (what == "save" and strategy == "no"):
            return False
        done = batch.step + 1
        if done == self.total_steps:
            return True
        if strategy == "epoch":
            return done % self.plan.steps_per_epoch == 0
        return strategy == "steps" and done % getattr(self.config, f"{what}_steps") == 0


class _Clock:
    """Seconds, tokens and pairs since the last logged step, without the time spent evaluating and saving."""

    def __init__(self) -> None:
        self._started, self._tokens, self._pairs = time.perf_counter(), 0, 0

    def add(self, tokens: int, pairs: int) -> None:
        """Counts a step."""
        self._tokens += tokens
        self._pairs += pairs

    def restart(self) -> tuple[float, int, int]:
        """Returns what was counted, and counts from nothing again."""
        now = time.perf_counter()
        counted = now - self._started, self._tokens, self._pairs
        self._started, self._tokens, self._pairs = now, 0, 0
        return counted

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Does not count the time spent inside."""
        since = time.perf_counter()
        yield
        self._started += time.perf_counter() - since
