"""Trains, loads and scores models from Python, and lets them answer; the command line calls the same functions.

These functions are re-exported by `jax_simpo`, where users find them: `import jax_simpo as js; js.train(...)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from jax_simpo.config import TrainConfig
from jax_simpo.config.objectives import code_of
from jax_simpo.config.yaml_files import read_file
from jax_simpo.data import sources
from jax_simpo.data.packing import measure
from jax_simpo.data.prompts import Prompt, make_prompts, unused_columns
from jax_simpo.data.selection import Selection
from jax_simpo.data.tokenize import GroupDataset
from jax_simpo.errors import ConfigError
from jax_simpo.models.generate import BATCH_SIZE, Generation
from jax_simpo.models.sampling import Sampling
from jax_simpo.models.transformer import Params
from jax_simpo.processes import launch
from jax_simpo.run import files
from jax_simpo.terminal import open_console
from jax_simpo.training import evaluate as evaluation
from jax_simpo.training import trainer
from jax_simpo.training.answers import answer, answer_records
from jax_simpo.training.compilation import keep_compiled_programs
from jax_simpo.training.groups import notes_on, packing_line
from jax_simpo.training.progress import GroupLines
from jax_simpo.training.reference import Reference, ReferenceSums
from jax_simpo.training.setup import Setup
from jax_simpo.training.step import make_score_function
from jax_simpo.training.trainer import TrainRun

# Pairs in memory: each is a dict as a row of a data file, with `chosen`, `rejected` and perhaps `prompt`. A
# `datasets.Dataset` is such an iterable.
Pairs = Iterable[Mapping[str, Any]]
# Is given each record of `metrics.jsonl` as it is written; True stops the run once its state is saved.
Callback = Callable[[dict[str, Any]], object]


def train(
    config: TrainConfig,
    pairs: Pairs | None = None,
    eval_pairs: Pairs | None = None,
    *,
    callbacks: Sequence[Callback] = (),
    quiet: bool = False,
    console: Console | None = None,
) -> TrainRun:
    """Trains a model, or continues the run that `config.output_dir` holds, and exports the result.

    Args:
        config: the settings of the run.
        pairs: training pairs in memory, in place of the config's `dataset_mixer`. Each pair is a dict in any form
            that a row of a data file may have.
        eval_pairs: evaluation pairs in memory. The run is evaluated on them at its end, and during training where
            `eval_strategy` says so.
        callbacks: functions that are given each record of `metrics.jsonl` as it is written, training and evaluation
            records alike, on the first process. If one returns True the run stops: its state is saved, the model is
            exported, and the same call continues the run.
        quiet: print nothing.
        console: where progress and notes go; standard error, or the notebook's output, when not given.

    Returns:
        The ended run: `run.metrics`, `run.model_path`.

    Raises:
        UserError: a mistake that you can mend; its text says where it is and what to do.
    """
    console = console or open_console(quiet=quiet or not launch.is_first())
    print_notices(config, console)
    selection = Selection.of(config)
    train_split = None if pairs is None else sources.from_memory("pairs", pairs, config.weight_column, selection)
    eval_split = None if eval_pairs is None else sources.from_memory("eval_pairs", eval_pairs, None, selection)
    if config.test_size is not None and eval_split is not None:
        raise ConfigError("`test_size` and `eval_pairs` are two ways to say what is evaluated; keep one of them")
    if config.test_size is not None and train_split is not None:
        train_split, eval_split = sources.divide(train_split, selection)
    elif eval_split is not None:  # the config that the run records says what was evaluated
        config = config.model_copy(update={"dataset_splits": [*config.train_splits, "eval_pairs"], "do_eval": True})
    return trainer.train(
        config,
        console,
        pairs=train_split,
        eval_pairs=eval_split,
        on_record=_ask(callbacks) if callbacks else None,
    )


@dataclass(frozen=True)
class LoadedModel:
    """A model on a mesh, ready to score pairs. `load_model` makes it.

    Attributes:
        setup: the objects that belong to it: tokenizer, mesh, model, objective.
        params: its parameters, split over the mesh.
    """

    setup: Setup
    params: Params

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the model, with its chat template."""
        return self.setup.tokenizer

    def __repr__(self) -> str:
        config, mesh = self.setup.model.config, dict(self.setup.mesh.shape)
        return f"<{config.model_type} model of {self.setup.model.parameter_count:,} parameters on {mesh}>"


def load_model(path: str | Path, **settings: Any) -> LoadedModel:
    """Loads a model onto all devices.

    A model that a run exported is loaded with the settings of that run (the `config.yaml` beside it).

    Args:
        path: the folder, GGUF file or hub id of a model, or of an adapter (whose base model is loaded below it).
        settings: keys of `TrainConfig` that are to differ: `dtype`, `attention`, `chat_template`, `max_length`, `beta`
            and so on. The base of an adapter that does not name one is `model_name_or_path`. Without `mesh` the
            parameters are split over as many devices as divide the model's width.

    Raises:
        ModelError: there is no such model, or it is of no supported kind.
        ConfigError: a setting is unknown or has a wrong value.
    """
    return load_setup(model_setup(path, settings))


def score(model: LoadedModel, pairs: Pairs) -> list[dict[str, Any]]:
    """Scores pairs with a model: the log-probs, rewards, margin and loss of each.

    Args:
        model: from `load_model`.
        pairs: a list of dicts or a `datasets.Dataset`, in any form that a data file may have.

    Returns:
        One dict per pair, in order, with the keys that the command `jax-simpo score` writes.

    Raises:
        DataError: a pair cannot be used; the message names its row.
    """
    return score_records(model, model.setup.tokenize(sources.from_memory("pairs", pairs)))


def evaluate(model: LoadedModel, pairs: Pairs) -> dict[str, float]:
    """Evaluates a model on pairs: the mean loss, rewards, accuracy and margin over all of them.

    Args:
        model: from `load_model`.
        pairs: a list of dicts or a `datasets.Dataset`, in any form that a data file may have.

    Returns:
        Metrics under the names of the training metrics, such as `rewards/accuracies`.

    Raises:
        DataError: a pair cannot be used; the message names its row.
    """
    return evaluate_dataset(model, model.setup.tokenize(sources.from_memory("pairs", pairs)))


def generate(
    model: LoadedModel,
    prompts: Iterable[Any],
    *,
    samples: int = 1,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
) -> list[dict[str, Any]]:
    """Lets a model answer prompts.

    An answer depends on the model, its prompt and its number, the number of the sample and the seed, not on the prompts
    beside it, but for rounding: a batch of another shape may round the last bits of a logit otherwise.

    Args:
        model: from `load_model`.
        prompts: texts, lists of messages, or dicts in any form that a row of a data file may have, with answers or
            without. The chat template writes them, and the header of an answer after them. A line on stderr names the
            columns that are not used.
        samples: answers to each prompt.
        max_new_tokens: the most tokens of an answer.
        temperature: divides the logits before a token is drawn; 0 takes the most likely token.
        top_k: draws among so many of the most likely tokens.
        top_p: draws among the most likely tokens, as few as have this probability together.
        seed: the seed of what is drawn.
        batch_size: answers that are computed at once.

    Returns:
        One dict per prompt, in order: `prompt` as it was given (its messages, if several columns make it up), and
        `answers`, each with its `text`, the number of its `tokens` (without the one that ended it) and `finished`,
        False where it was cut at `max_new_tokens`.

    Raises:
        DataError: a prompt cannot be used; the message names its row.
        ConfigError: a number is out of its range.
    """
    asked = asked_for(model.setup, samples, max_new_tokens, temperature, top_k, top_p, seed)
    read = make_prompts("prompts", prompts, model.setup.prompt_encoder)
    print_unused(read, open_console(quiet=not launch.is_first()))
    return answer_prompts(model, read, asked, batch_size)


def _ask(callbacks: Sequence[Callback]) -> Callable[[dict[str, Any]], bool]:
    """Joins callbacks to one, which is True where any of them is."""

    def on_record(record: dict[str, Any]) -> bool:
        answers = [callback(dict(record)) for callback in callbacks]  # every callback is given every record
        return any(isinstance(answer, bool | np.bool_) and bool(answer) for answer in answers)

    return on_record


def _run_settings(model: Path) -> dict[str, Any]:
    """The settings of the run that exported a model folder; empty where it is no run's."""
    config = model.parent / files.CONFIG
    exported = model.name == files.MODEL and config.is_file() and (model.parent / files.METRICS).is_file()
    return read_file(config)[0] if exported else {}


# --- for the command line


def model_setup(path: str | Path, settings: Mapping[str, Any]) -> Setup:
    """Returns the setup of the model that `load_model` loads with these settings."""
    defaults = _run_settings(Path(path).expanduser())
    if defaults.get("model_name_or_path") is None and defaults.get("model_config") is None:
        defaults["model_name_or_path"] = str(path)
    if code_of(defaults.get("objective")) and "objective" not in settings:
        raise ConfigError(
            f"{path}: its run had `objective: {defaults['objective']}`, and loading a model runs nobody's code. Give "
            'an objective, such as `load_model(path, objective="simpo")`'
        )
    keep_compiled_programs()
    choice = f"./{path}" if str(path).isdecimal() else str(path)  # a bare number is the step of a run
    return Setup(TrainConfig(**{**defaults, **settings}), choice, any_mesh="mesh" not in settings)


def load_setup(setup: Setup) -> LoadedModel:
    """Loads the parameters of a setup's model onto its mesh."""
    with jax.set_mesh(setup.mesh):
        return LoadedModel(setup, setup.load_params())


def reference_sums(setup: Setup, pairs: GroupDataset, console: Console) -> ReferenceSums | None:
    """Returns the sums of log-probs under the reference, or None if the objective needs none.

    The command line calls it before it loads the model, so that two models are never in memory together.
    """
    return Reference.of(setup).sums(pairs, console) if setup.objective.needs_reference else None


def score_records(
    model: LoadedModel, pairs: GroupDataset, console: Console | None = None, reference: ReferenceSums | None = None
) -> list[dict[str, Any]]:
    """Scores tokenised pairs; returns what `score` returns.

    Where the pairs are from several files, a record names its file beside its row.
    """
    scores = score_dataset(model, pairs, console, reference)
    several = len({file for file, _ in pairs.origins}) > 1
    return [
        {**({"file": file} if several else {}), "row": row, **record}
        for (file, row), record in zip(
            pairs.origins, evaluation.group_records(scores, model.setup.objective), strict=True
        )
    ]


def evaluate_dataset(model: LoadedModel, pairs: GroupDataset, console: Console | None = None) -> dict[str, float]:
    """Evaluates a model on tokenised pairs; returns what `evaluate` returns."""
    return evaluation.evaluation_metrics(score_dataset(model, pairs, console), model.setup.objective)


def score_dataset(
    model: LoadedModel, pairs: GroupDataset, console: Console | None = None, reference: ReferenceSums | None = None
) -> evaluation.GroupScores:
    """Computes the log-probs of tokenised pairs, and prints how they are packed if there is a console.

    Sums under the reference that are needed and not given are read from the cache, or computed beside the model.
    """
    setup = model.setup
    if reference is None:
        reference = reference_sums(setup, pairs, console or open_console(quiet=True))
    plan = setup.step_plan(pairs, batch=evaluation.GROUPS_PER_PLAN, seed=None)
    if console is not None:
        console.print(packing_line(pairs.name, plan, measure(plan)))
        trainer.print_choice("attention", setup.choose_attention(plan), console)
        trainer.print_choice("loss head", setup.choose_loss_head(plan), console)
    setup.choose_attention(plan)  # it tries backends on one device, which is no work for the mesh below
    setup.choose_loss_head(plan)
    with jax.set_mesh(setup.mesh):
        function = make_score_function(setup.forward_of(plan), setup.mesh, prompts=setup.objective.reads_prompts)
        return evaluation.score_groups(function, model.params, plan, pairs, setup.mesh, setup.known(pairs, reference))


def print_notes(pairs: GroupDataset, console: Console) -> None:
    """Prints which rows were skipped and why. Every process calls it."""
    trainer.print_notes(console, notes_on(pairs))


def print_notices(config: TrainConfig, console: Console) -> None:
    """Prints what the user should know about the keys of a config."""
    for notice in config.notices:
        console.print(f"note: {notice}", style="yellow")


def asked_for(
    setup: Setup,
    samples: int,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
) -> Generation:
    """Returns what `generate` asks for of a model."""
    sampling = Sampling(float(temperature), top_k, None if top_p is None else float(top_p))
    return Generation(max_new_tokens, setup.end_ids, samples, sampling, seed)


def print_unused(prompts: Sequence[Prompt], console: Console) -> None:
    """Prints which columns of the prompts' rows are not read."""
    if unused := unused_columns(prompts):
        console.print(f"note: {unused}", style="yellow")


def answer_prompts(
    model: LoadedModel,
    prompts: Sequence[Prompt],
    asked: Generation,
    batch_size: int = BATCH_SIZE,
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Answers prompts; returns what `generate` returns, and prints now and then how many are done."""
    if batch_size < 1:
        raise ConfigError(f"`batch_size` is {batch_size}; expected a whole number >= 1")
    console = console or open_console(quiet=True)
    trainer.print_notes(console, _notes_on_answers(model, prompts, asked))
    lines = GroupLines(console, "answers", len(prompts), 0, "prompts")
    done = 0

    def count(answered: int) -> None:
        nonlocal done
        done += answered
        lines.show(done)

    ids = [prompt.ids for prompt in prompts]
    answers = answer(model.setup, model.params, ids, asked, batch_size=batch_size, on_batch=count)
    return answer_records(prompts, answers, model.tokenizer)


def _notes_on_answers(model: LoadedModel, prompts: Sequence[Prompt], asked: Generation) -> list[str]:
    """Lists what the user should know of what is asked for."""
    most = model.setup.model.config.max_position_embeddings
    long = sum(len(prompt.ids) + asked.max_new_tokens > most for prompt in prompts)
    notes = []
    if long:
        notes.append(
            f"note: {long} of {len(prompts)} prompts and their answers may be longer than the {most:,} tokens that the "
            "model was made for (`max_position_embeddings`); lower `max_new_tokens`, or shorten them"
        )
    if asked.samples > 1 and asked.sampling.is_greedy:
        notes.append(f"note: with `temperature` 0 all {asked.samples} answers to a prompt are equal")
    return notes
