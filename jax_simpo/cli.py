"""The `jax-simpo` command."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer
from rich.console import Console

from jax_simpo.config import TrainConfig, load_config
from jax_simpo.errors import CheckpointError, ConfigError, MeshError, UserError
from jax_simpo.processes import launch

if TYPE_CHECKING:  # importing jax takes seconds, which `--help` and a misspelt key need not wait for
    from jax_simpo.data.tokenize import PairDataset
    from jax_simpo.train.evaluate import PairScores
    from jax_simpo.train.setup import Setup

app = typer.Typer(
    help="SimPO training on preference pairs, with prefix sharing and packing. Every command takes a config file and "
    "any number of --key=value overrides (dotted for nested keys).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The config file.", show_default=False)]
Model = Annotated[
    str | None,
    typer.Option(
        help="A folder or hub id, of a model or an adapter, or the number of a step of the run. Default: what the "
        "config starts from.",
        show_default=False,
    ),
]
# The place of this process in a run of several.
_PANEL = "Several processes (found by themselves under SLURM, GKE and Kubernetes; docs/launch.md)"
Coordinator = Annotated[
    str | None,
    typer.Option(
        "--coordinator_address",
        envvar="JAX_COORDINATOR_ADDRESS",
        help="HOST:PORT of process 0.",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]
Processes = Annotated[
    int | None,
    typer.Option(
        "--num_processes",
        envvar="JAX_NUM_PROCESSES",
        help="Processes of the run.",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]
ProcessId = Annotated[
    int | None,
    typer.Option(
        "--process_id",
        envvar="JAX_PROCESS_ID",
        help="Number of this process, from 0.",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]
Distributed = Annotated[
    bool | None,
    typer.Option(
        help="Whether to join other processes. Default: where the environment names them; "
        "on Cloud TPU VMs and with Open MPI, ask for it.",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]


@app.command(context_settings=OVERRIDES)
def train(
    context: typer.Context,
    config: ConfigFile,
    coordinator_address: Coordinator = None,
    num_processes: Processes = None,
    process_id: ProcessId = None,
    distributed: Distributed = None,
) -> None:
    """Trains; resumes by itself when the output directory holds a checkpoint of the same run."""
    launch.join(launch.Launch(coordinator_address, num_processes, process_id, distributed))
    settings, console = _begin(config, context.args)
    from jax_simpo.train.trainer import train as run

    run(settings, console)


@app.command(context_settings=OVERRIDES)
def score(
    context: typer.Context,
    config: ConfigFile,
    split: Annotated[str, typer.Option(help="Split to score.", show_default=False)],
    output: Annotated[Path, typer.Option(help="JSONL file to write, one object per pair.", show_default=False)],
    model: Model = None,
    coordinator_address: Coordinator = None,
    num_processes: Processes = None,
    process_id: ProcessId = None,
    distributed: Distributed = None,
) -> None:
    """Writes log-probs, rewards, margin and loss of every pair of a split, in file order."""
    launch.join(launch.Launch(coordinator_address, num_processes, process_id, distributed))
    settings, console = _begin(config, context.args)
    with _written_whole(output) as file:
        from jax_simpo.train.evaluate import pair_records

        setup = _setup(settings, console, model)
        pairs, scores = _score(setup, split)
        several = len({name for name, _ in pairs.origins}) > 1  # then a row number alone does not say which pair it is
        for (name, row), record in zip(pairs.origins, pair_records(scores, setup.objective), strict=True):
            origin = {"file": name, "row": row} if several else {"row": row}
            file.write(json.dumps({**origin, **record}) + "\n")
    console.print(f"{len(pairs)} pairs scored: {output}")


@app.command("eval", context_settings=OVERRIDES)
def evaluate(
    context: typer.Context,
    config: ConfigFile,
    split: Annotated[
        str | None, typer.Option(help="Split to evaluate. Default: all the config names.", show_default=False)
    ] = None,
    model: Model = None,
    coordinator_address: Coordinator = None,
    num_processes: Processes = None,
    process_id: ProcessId = None,
    distributed: Distributed = None,
) -> None:
    """Prints the evaluation metrics of a split."""
    launch.join(launch.Launch(coordinator_address, num_processes, process_id, distributed))
    settings, console = _begin(config, context.args)
    from jax_simpo.train.evaluate import evaluation_metrics

    setup = _setup(settings, console, model)
    pairs, scores = _score(setup, split)
    metrics = evaluation_metrics(scores, setup.objective)
    if launch.is_first():
        print(json.dumps({f"eval_{name}": value for name, value in {**metrics, "pairs": len(pairs)}.items()}, indent=2))


@app.command(context_settings=OVERRIDES)
def export(
    context: typer.Context,
    config: ConfigFile,
    output: Annotated[Path, typer.Option(help="Folder to write.", show_default=False)],
    model: Annotated[
        str | None,
        typer.Option(
            help="The number of a step, or a folder of a model or an adapter. Default: the newest step.",
            show_default=False,
        ),
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Merge an adapter into its base and write the whole.")] = False,
    max_shard_size: Annotated[
        str, typer.Option("--max_shard_size", help="Largest weight file, such as 500MB or 5GB.")
    ] = "5GB",
    coordinator_address: Coordinator = None,
    num_processes: Processes = None,
    process_id: ProcessId = None,
    distributed: Distributed = None,
) -> None:
    """Writes a Hugging Face checkpoint from a step of the run; where an adapter was trained, the adapter."""
    launch.join(launch.Launch(coordinator_address, num_processes, process_id, distributed))
    settings, console = _begin(config, context.args)
    import jax

    from jax_simpo import hf
    from jax_simpo.train.setup import open_checkpoints

    most = hf.shard_bytes(max_shard_size)
    if model is None:
        with open_checkpoints(settings) as checkpoints:
            model = str(checkpoints.latest())
    setup = _setup(settings, console, model)
    if merge and setup.model.lora is None:
        raise ConfigError(f"--merge: {model} is no adapter, there is nothing to merge. Leave the option out")
    with jax.set_mesh(setup.mesh):
        what = setup.export(setup.load_params(), output, merge=merge, max_shard_bytes=most)
    console.print(f"{'step ' if model.isdecimal() else ''}{model} exported ({what}): {output}")


@app.command(context_settings=OVERRIDES)
def inspect(
    context: typer.Context,
    config: ConfigFile,
    split: Annotated[
        str | None, typer.Option(help="Split to show, whole. Default: what is trained on.", show_default=False)
    ] = None,
    rows: Annotated[int, typer.Option(help="How many rows to draw.", min=0)] = 2,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write texts and tokens of every pair to this file.", show_default=False),
    ] = None,
) -> None:
    """Shows rows as the model sees them; loads no weights."""
    settings, console = _begin(config, context.args)
    from jax_simpo import inspection
    from jax_simpo.train.setup import Setup

    setup = Setup(settings, console)
    if json_file is not None:
        with _written_whole(json_file) as file:
            inspection.write_json(setup, split, file)
        console.print(f"written: {json_file}")
        return
    try:
        _ = setup.mesh
    except MeshError as error:
        console.print(f"note: {error}. Rows are planned for the devices that are here", style="yellow")
        setup = Setup(settings, console, any_mesh=True)
    inspection.show(setup, split, rows, _console(stderr=False))


@app.command(context_settings=OVERRIDES)
def plan(
    context: typer.Context,
    config: ConfigFile,
    topology: Annotated[
        str, typer.Option(help="What to compile for: v5p:2x2x4, v6e:16x16, h100:8, h100:2x8, cpu:8, ...")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    search: Annotated[bool, typer.Option(help="Look for the largest micro-batch that fits.")] = True,
) -> None:
    """Compiles the step for hardware that need not be here: memory, collectives, FLOPs, and whether it fits."""
    _begin(config, context.args)
    from jax_simpo.plan import make_plan
    from jax_simpo.plan.report import show
    from jax_simpo.plan.topology import Topology

    found = make_plan(config, context.args, Topology.parse(topology), search=search)
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        show(found, _console(stderr=False))


@app.command(context_settings=OVERRIDES)
def report(context: typer.Context, config: ConfigFile) -> None:
    """Writes the report page and curves of a run anew from the files of its output directory."""
    settings, console = _begin(config, context.args)
    from jax_simpo.run.report import write_report

    console.print(f"report: {write_report(Path(settings.output_dir))}")


def _begin(path: Path, overrides: list[str]) -> tuple[TrainConfig, Console]:
    """Reads the config and opens the console. Notes go to stderr: stdout is for results."""
    if str(path).startswith("--"):
        raise ConfigError(f"{path}: the config file comes first: jax-simpo COMMAND CONFIG.yaml {path}")
    # Orbax warns, through absl, of what a checkpoint that is opened to be read cannot do.
    logging.getLogger("absl").setLevel(logging.ERROR)
    console = _console()
    settings = load_config(path, overrides)
    for notice in settings.notices:
        console.print(f"note: {notice}", style="yellow")
    return settings, console


def _console(*, stderr: bool = True) -> Console:
    """What is printed holds paths and texts of users: nothing in it is markup, and stderr's lines are left whole.

    Of several processes only the first prints.
    """
    return Console(stderr=stderr, markup=False, highlight=False, soft_wrap=stderr, quiet=not launch.is_first())


def _setup(settings: TrainConfig, console: Console, model: str | None) -> Setup:
    """What scoring and exporting start from. A step that is not there is found before the pairs are tokenised."""
    from jax_simpo.train.compilation import keep_compiled_programs
    from jax_simpo.train.setup import Setup, open_checkpoints

    keep_compiled_programs()
    if model is not None and model.isdecimal():
        with open_checkpoints(settings) as checkpoints:
            if int(model) not in checkpoints.steps():
                there = ", ".join(map(str, checkpoints.steps())) or "none"
                raise CheckpointError(f"--model {model}: {checkpoints.directory} has no such step; there are: {there}")
    return Setup(settings, console, model, any_mesh=True)


def _score(setup: Setup, split: str | None) -> tuple[PairDataset, PairScores]:
    import jax

    from jax_simpo.train.evaluate import PAIRS_PER_PLAN, score_pairs
    from jax_simpo.train.step import make_score_function

    pairs = setup.eval_pairs() if split is None else setup.split_pairs(split)
    plan = setup.plan(pairs, batch=PAIRS_PER_PLAN, seed=None)
    setup.describe_plan(pairs.name, plan)
    with jax.set_mesh(setup.mesh):
        score = make_score_function(setup.forward, setup.mesh)
        return pairs, score_pairs(score, setup.load_params(), plan, pairs, setup.mesh)


@contextmanager
def _written_whole(output: Path) -> Iterator[TextIO]:
    """Opens a file that takes its place only when all is written; that it can be is found out before the work.

    Of several processes only the first has the file; what the others write goes nowhere.

    Raises:
        ConfigError: it cannot be written.
    """
    if not launch.is_first():
        with open(os.devnull, "w", encoding="utf-8") as nothing:
            yield nothing
        return
    path = output.absolute()
    missing = [folder for folder in path.parents if not os.path.exists(folder)]
    # A folder is refused on opening; a device such as /dev/stdout is written to, never replaced.
    replaced = os.path.isfile(path) or not os.path.exists(path)
    path = path.resolve() if replaced else path
    temporary = path.with_name(f".{path.name}.{os.getpid()}") if replaced else path
    try:
        try:
            if missing:
                path.parent.mkdir(parents=True)
            file = temporary.open("w", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{output} cannot be written: {error.strerror}. Give another path") from error
        with file:
            yield file
        if replaced:
            temporary.replace(path)
    except BaseException:
        if replaced:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        for folder in missing:  # those that were made for it, if nothing else is in them by now
            with suppress(OSError):
                folder.rmdir()
        raise


def main() -> None:
    """Entry point of the `jax-simpo` command."""
    try:
        app()
    except SystemExit as end:  # how typer ends, also when all went well
        if end.code:
            launch.fail(end)
        else:
            launch.finish()
        raise
    except UserError as error:  # a mistake of the user's is told without a traceback
        launch.fail(error)
        _console().print(f"error: {error}", style="red")
        sys.exit(1)
    except BaseException as error:
        launch.fail(error)
        raise


if __name__ == "__main__":
    main()
