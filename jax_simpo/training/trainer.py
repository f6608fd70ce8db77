"""A training run from its config to its exported model: the thin shell around the pure functions of `step`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from jax_simpo import hf
from jax_simpo.config import TrainConfig
from jax_simpo.data.packing import measure
from jax_simpo.data.sources import RawSplit
from jax_simpo.data.tokenize import GroupDataset
from jax_simpo.hub import Publisher
from jax_simpo.pages import page_url
from jax_simpo.processes import distributed
from jax_simpo.run import files, model_card, report, signals
from jax_simpo.run.best import BestRule
from jax_simpo.run.cadence import count_steps
from jax_simpo.run.checkpoint import Checkpoints, abstract_state, starting_point
from jax_simpo.run.facts import note_export, write_facts
from jax_simpo.run.guard import StepGuard
from jax_simpo.run.health import HealthWatch
from jax_simpo.run.lock import locked
from jax_simpo.run.manifest import claim, write_file
from jax_simpo.run.metrics import check_records, read_metrics
from jax_simpo.run.output import check_output, make_output, prepare_output
from jax_simpo.run.resume import GUARD, check_not_finished, check_same_run, run_identity
from jax_simpo.sharding import hosts_share_tensor
from jax_simpo.tracking.trackers import Trackers
from jax_simpo.training import capacity
from jax_simpo.training.backend_choice import BackendChoice
from jax_simpo.training.compilation import keep_compiled_programs
from jax_simpo.training.evaluate import GROUPS_PER_PLAN, Evaluation
from jax_simpo.training.groups import idle_warning, notes_on
from jax_simpo.training.health import traits_of
from jax_simpo.training.loop import TrainingLoop
from jax_simpo.training.optim import run_optimizer
from jax_simpo.training.reference import Reference, frozen_weights
from jax_simpo.training.sampler import Sampler
from jax_simpo.training.setup import Setup
from jax_simpo.training.step import make_score_function, make_train_functions
from jax_simpo.training.xla_options import step_options


@dataclass(frozen=True)
class TrainRun:
    """A run that has ended, and the place of everything it wrote.

    Attributes:
        output_dir: the folder of the run.
        model_path: the exported model, or adapter, in Hugging Face's format.
        report_path: the HTML report.
        steps: optimizer steps of the run.
        stopped_early: a callback stopped the run; starting it again continues it.
        model_step: optimizer steps that the exported model has had: `steps`, or with `load_best_model_at_end` those of
            the best evaluation.
    """

    output_dir: Path
    model_path: Path
    report_path: Path
    steps: int
    stopped_early: bool
    model_step: int

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The records of `metrics.jsonl`, training and evaluation, in the order they were written."""
        return read_metrics(self.output_dir)


def train(
    config: TrainConfig,
    console: Console,
    *,
    pairs: RawSplit | None = None,
    eval_pairs: RawSplit | None = None,
    on_record: Callable[[dict[str, Any]], bool] | None = None,
) -> TrainRun:
    """Trains as the config says, and exports the model.

    Everything that can be found wrong without the weights is found before anything is loaded, written or removed.
    In a run of several processes every process calls this; the first one prints and writes all but the checkpoints.

    Args:
        config: the settings of the run.
        console: where progress and notes go.
        pairs: training pairs in memory, in place of the config's `dataset_mixer`.
        eval_pairs: evaluation pairs in memory, in place of the config's evaluation splits.
        on_record: is given every record on the first process; True stops the run once its state is saved.

    Raises:
        UserError: a mistake that the user can mend; its text says where it is and what to do.
    """
    output = Path(config.output_dir)
    distributed.on_first("output directory", lambda: make_output(output))
    distributed.check_shared(output, "output_dir")
    with (
        signals.handled(sigterm=distributed.count() == 1),  # of several processes JAX listens to SIGTERM
        locked(output) if distributed.is_first() else nullcontext(),
        Trackers(config, output, console, write=distributed.is_first()) as trackers,
    ):
        publisher = Publisher(config, output, console, write=distributed.is_first())
        return _train(config, output, console, pairs, eval_pairs, on_record, trackers, publisher)


def _train(
    config: TrainConfig,
    output: Path,
    console: Console,
    pairs: RawSplit | None,
    eval_pairs: RawSplit | None,
    on_record: Callable[[dict[str, Any]], bool] | None,
    trackers: Trackers,
    publisher: Publisher,
) -> TrainRun:
    distributed.on_first("former run", lambda: check_output(config, output))
    distributed.on_first("trackers", trackers.check)
    distributed.on_first("hub", publisher.check)
    keep_compiled_programs()
    setup = Setup(config, memory_pairs=pairs, memory_eval_pairs=eval_pairs)
    mesh = setup.mesh
    _print_start(setup, console)
    # Before the training pairs, which are more: a split that is missing is found at once.
    evaluated = setup.eval_pairs() if config.do_eval else None
    training = setup.train_pairs()
    print_notes(console, notes_on(training))
    checkpoints = Checkpoints(output / files.CHECKPOINTS, keep=config.save_total_limit)
    resume, saved = starting_point(config, output, checkpoints)
    print_notes(console, resume.notes)
    first_step = resume.step
    capacity.check_fits(config, setup.model, mesh, setup.device_memory)
    plan = setup.step_plan(training, batch=setup.global_batch_size(saved.get("global_batch_size")), seed=config.seed)
    total_steps = count_steps(config, plan.steps_per_epoch)
    identity = run_identity(config, plan.global_batch_size, training)
    advice = "Start all processes with the same config and options, on the same files"
    distributed.check_same(
        "the run",
        {
            **identity,
            "step to begin at": first_step,
            "rows": f"{plan.shape}, {plan.rows_per_micro_batch} a micro-batch",
        },
        advice,
    )
    records = None
    if saved:
        check_same_run(saved, identity, output)
        check_not_finished(output, first_step, total_steps)
        records = checkpoints.metrics(first_step)
        print_notes(console, [check_records(output, records, needed=BestRule.of(config) is not None)])
    packing = measure(plan)
    console.print(setup.packing_lines("training", plan, packing))
    print_notes(console, [idle_warning(plan, packing, setup.data_parallel)])
    evaluation = None if evaluated is None else _evaluation(setup, evaluated, console)
    best_rule = BestRule.of(config)
    if best_rule is not None:
        assert evaluation is not None  # the config is refused without
        best_rule.check([*setup.objective.metrics, "pairs"], list(evaluation.source.splits))
    print_choice("attention", setup.choose_attention(plan), console)
    print_choice("loss head", setup.choose_loss_head(plan), console)

    _check_weights(setup, resumes=bool(first_step))
    reference = Reference.of(setup) if setup.objective.needs_reference else None
    if reference is not None:
        _check_weights(reference.setup, resumes=False)
    if reference is not None or config.use_peft:
        console.print("hashing the weights that are not trained, which no checkpoint holds")
        identity |= frozen_weights(setup, reference)
        if saved:
            check_same_run(saved, identity, output)
    distributed.on_first("output", lambda: prepare_output(config, output))
    distributed.on_first("runs of trackers", lambda: trackers.begin(first_step))
    if first_step:
        distributed.on_first("later steps", lambda: checkpoints.folders.leave_behind(first_step, resume.damaged))
    sums, start = None, None
    if reference is not None:
        sums = reference.sums(training, console)
        if evaluation is not None:
            of_evaluation = reference.sums(evaluation.source, console)
            evaluation = replace(evaluation, known=setup.known(evaluation.source, of_evaluation))
        start = reference.take()  # before the policy is loaded: two models are never in memory together
    with checkpoints, jax.set_mesh(mesh):
        schedule, optimizer = run_optimizer(config, total_steps)
        accumulates = packing.most_micro_batches > 1
        functions = make_train_functions(
            setup.training_forward_of(plan),
            setup.objective,
            optimizer,
            mesh,
            accumulates=accumulates,
        )
        if first_step:
            start = None
            params = setup.restore_params(checkpoints, first_step)
            shapes = jax.eval_shape(functions.init_optimizer, setup.model.abstract)
            state = checkpoints.optimizer(first_step, abstract_state(shapes, functions.optimizer_shardings))
            console.print(f"resuming at step {first_step} of {total_steps}")
        else:
            params = setup.load_params() if start is None else start
            start = None  # the first step gives its memory to the new parameters
            state = functions.init_optimizer(params)
            count, trained = setup.model.parameter_count, setup.model.trained_count
            frozen = f" (beside {count - trained:,} frozen ones)" if trained < count else ""
            console.print(f"training {trained:,} parameters{frozen} for {total_steps} steps")
        if config.save_strategy != "no":
            of_a_step = setup.model.split(params)[0]
            distributed.on_first("room", lambda: checkpoints.check_room(of_a_step, state))
        if distributed.is_first():
            write_file(output, files.CONFIG, config.to_yaml())
            write_facts(
                output,
                mesh=mesh.shape,
                device=mesh.devices.flat[0].device_kind,
                parameters=setup.model.trained_count,
                training_pairs=len(training),
                noun=training.lengths.noun,
                total_steps=total_steps,
                tokens_saved=1 - packing.input_tokens / packing.separate_tokens,
                remarks=[
                    *training.public_remarks(),
                    *(f"evaluation: {remark}" for remark in (evaluation.source.public_remarks() if evaluation else [])),
                ],
            )
        sampler = Sampler(setup, training if evaluation is None else evaluation.source, output)
        if first_step:
            sampler.resume(first_step)
        else:
            sampler.answer(params, 0, "before")

        loop = TrainingLoop(
            setup=setup,
            plan=plan,
            pairs=training,
            known=setup.known(training, sums, training=True),
            functions=functions,
            schedule=schedule,
            guard=StepGuard.of(config, saved.get(GUARD)),
            evaluation=evaluation,
            sampler=sampler if config.generate_during_eval else None,
            best_rule=best_rule,
            health=HealthWatch(traits_of(setup, training, total_steps)) if config.health_checks else None,
            checkpoints=checkpoints,
            identity=identity,
            total_steps=total_steps,
            output=output,
            records_before=records,
            console=console,
            trackers=trackers,
            publisher=publisher,
            on_record=on_record,
        )
        params, done = loop.run(params, state, first_step)
        del state
        exported, finished = done, done == total_steps or loop.ended_early
        if finished and (best := loop.best_step) is not None and best_rule is not None:
            console.print(f"the best model by {best_rule.metric} is that of step {best}; it is exported")
            exported = best
            if best != done:
                del params  # two models are never in memory together
                params = setup.restore_params(checkpoints, best)
        if distributed.is_first():
            claim(output, files.MODEL)
        setup.export(params, output / files.MODEL)
        if distributed.is_first():
            note_export(output, done, model_step=exported, ended_early=loop.ended_early)
        sampler.answer(params, exported, "after")
    if distributed.is_first():
        report.write_report(output)
        model_card.write(output, config, global_batch_size=plan.global_batch_size)
        report.print_summary(console, output)
        trackers.finish(finished=finished)
    distributed.on_first("upload", lambda: publisher.finish(exported))
    distributed.barrier("report")
    return TrainRun(output, output / files.MODEL, output / files.REPORT, done, not finished, exported)


def _check_weights(setup: Setup, *, resumes: bool) -> None:
    """Makes sure that the parameters can be loaded onto the mesh, before anything is removed.

    Raises:
        MeshError: the mesh does not divide the model.
        ModelError: a weight file of the start model is missing, cut or changed, or does not fit `config.json`.
    """
    setup.model.shardings(setup.mesh)  # raises
    if resumes and setup.model.lora is None:
        return  # a step holds all parameters
    if setup.start_folder is not None:
        hf.check_params(setup.start_folder, setup.model)


def _print_start(setup: Setup, console: Console) -> None:
    """Prints the mesh, and notes on settings that the user may want to change."""
    config, mesh = setup.config, setup.mesh
    console.print(f"mesh: {', '.join(f'{axis}={size}' for axis, size in mesh.shape.items())} ({mesh.devices.flat[0]})")
    if options := step_options(mesh):
        console.print(f"XLA options of the step: {', '.join(options)} ({page_url('performance')})")
    notes = []
    if hosts_share_tensor(mesh):
        notes.append(
            "warning: `mesh.tensor` reaches over several processes, whose connection is slower than that within one. "
            f"Choose a divisor of the {jax.local_device_count()} devices of a process"
        )
    if config.model_name_or_path is not None and "learning_rate" not in config.model_fields_set:
        notes.append(
            f"note: `learning_rate` is not set; {config.learning_rate} is used, published SimPO runs use 3e-7 to 1e-6"
        )
    print_notes(console, notes)


def print_choice(name: str, choice: BackendChoice, console: Console) -> None:
    """Prints which backend is used and why, and which ones were passed over.

    Args:
        name: of what it computes.
        choice: the backend.
        console: the console to print to.
    """
    print_notes(console, choice.warnings)
    console.print(f"{name}: {choice.backend} ({choice.reason})")


def print_notes(console: Console, notes: Sequence[str]) -> None:
    """Prints sentences the user should read; empty ones are left out."""
    for note in filter(None, notes):
        console.print(note, style="yellow")


def _evaluation(setup: Setup, pairs: GroupDataset, console: Console) -> Evaluation:
    print_notes(console, notes_on(pairs))
    plan = setup.step_plan(pairs, batch=GROUPS_PER_PLAN, seed=None)
    score = make_score_function(setup.forward_of(plan), setup.mesh, prompts=setup.objective.reads_prompts)
    return Evaluation(score, plan, pairs, setup.objective, setup.mesh, setup.known(pairs))
