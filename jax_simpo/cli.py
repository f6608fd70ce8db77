"""The `jax-simpo` command: reads options and configs, calls the Python API, prints."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from jax_simpo import __version__
from jax_simpo.config import TrainConfig, builtin_configs, load_config, read_overrides
from jax_simpo.errors import CheckpointError, ConfigError, MeshError, StoppedError, UserError
from jax_simpo.pages import page_url
from jax_simpo.processes import launch
from jax_simpo.run import signals
from jax_simpo.run.steps import kept_steps
from jax_simpo.run.whole import writing
from jax_simpo.terminal import open_console

if TYPE_CHECKING:  # importing jax takes seconds, which `--help` and a misspelt key need not wait for
    from jax_simpo.training.setup import Setup

app = typer.Typer(
    help="SimPO training on preference pairs, with prefix sharing and packing. Every command takes a config file and "
    "any number of --key=value overrides (dotted for nested keys).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}

ConfigFile = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG.yaml",
        help="The config file, or `builtin:NAME` (`jax-simpo configs` lists them).",
        show_default=False,
        autocompletion=lambda: [f"builtin:{name}" for name in builtin_configs()],
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        help="A folder, GGUF file or hub id, of a model or an adapter, or the number of a step of the run. Default: "
        "what the config starts from.",
        show_default=False,
    ),
]
# What `generate` and `chat` answer with, and how.
AnsweringModel = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder, GGUF file or hub id, of a model or an adapter. Any --key=value of a config after it changes "
        "how it is loaded: --dtype, --chat_template, --mesh.tensor, ...",
        show_default=False,
    ),
]
Temperature = Annotated[float, typer.Option(help="Divides the logits before a token is drawn. 0: the likeliest token.")]
TopK = Annotated[
    int | None, typer.Option("--top_k", help="Draw among so many of the likeliest tokens.", show_default=False)
]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top_p", help="Draw among the likeliest tokens that have this probability together.", show_default=False
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of what is drawn.")]
# The place of this process in a run of several.
_PANEL = f"Several processes ({page_url('launch')})"
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
        help="Join other processes. Default: where the environment names them, as SLURM, GKE and Kubernetes do; "
        "on Cloud TPU VMs and with Open MPI, ask for it.",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"jax-simpo {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options that belong to no command."""


@app.command()
def configs(
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of config files instead, for editors.")
    ] = False,
) -> None:
    """Lists the configs that come with the program."""
    if schema:
        from jax_simpo.config import json_schema

        print(json.dumps(json_schema.schema(TrainConfig), indent=1, ensure_ascii=False))
        return
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, description in builtin_configs().items():
        table.add_row(f"builtin:{name}", description)
    _console(stderr=False).print(table)


@app.command()
def init(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The file to write.")] = Path("config.yaml"),
    model: Annotated[str | None, typer.Option(help="Model to start from.", show_default=False)] = None,
    data: Annotated[str | None, typer.Option(help="Preference data.", show_default=False)] = None,
    objective: Annotated[str | None, typer.Option(help="Objective, such as simpo or dpo.", show_default=False)] = None,
    method: Annotated[str | None, typer.Option(help="full or lora.", show_default=False)] = None,
    output_dir: Annotated[
        str | None, typer.Option("--output_dir", help="Folder of the run.", show_default=False)
    ] = None,
) -> None:
    """Asks five questions and writes a config; options answer them beforehand."""
    from jax_simpo.config.first_config import QUESTIONS, Answers, write_config

    if config.exists():
        raise ConfigError(f"{config}: exists already; name another file")
    given = {"model": model, "data": data, "objective": objective, "method": method, "output_dir": output_dir}
    open_questions = [question for question in QUESTIONS if given[question.option] is None]
    if not sys.stdin.isatty() and (model is None or data is None):
        needed = " ".join(f"--{question.option} {question.default}" for question in open_questions)
        raise ConfigError(f"there is no terminal to ask on; answer with options, such as {needed}")
    for question in open_questions:
        ask = sys.stdin.isatty()
        given[question.option] = typer.prompt(question.text, default=question.default) if ask else question.default
    text = write_config(Answers(**{option: str(answer) for option, answer in given.items()}))
    with writing(config) as file:
        file.write(text)
    _console().print(f"written: {config}. Next: jax-simpo inspect {config}, then jax-simpo train {config}")


@app.command()
def convert(
    file: Annotated[Path, typer.Argument(metavar="FILE.yaml", help="A config of TRL, LLaMA-Factory, Axolotl, ...")],
    output: Annotated[
        Path | None, typer.Option(help="The file to write. Default: standard output.", show_default=False)
    ] = None,
    origin: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="What the file is for: trl-cpo, trl-dpo, trl-orpo, llama-factory, axolotl or open-instruct. Default: "
            "known by its keys.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="A source to train on in place of the file's; may be given again.")
    ] = None,
    devices: Annotated[
        int | None, typer.Option(help="Devices the file was made for: writes their batch.", min=1, show_default=False)
    ] = None,
    drop: Annotated[list[str] | None, typer.Option(help="A key of the file to leave out; may be given again.")] = None,
) -> None:
    """Converts the config of another trainer; every line says what it was, and what cannot be kept is an error."""
    from jax_simpo.config.convert.engine import convert as convert_file
    from jax_simpo.config.convert.rules import Options

    if output is not None and output.exists():
        raise ConfigError(f"{output}: exists already; name another file")
    options = Options(data=tuple(data or ()), devices=devices, drop=tuple(drop or ()))
    converted, console = convert_file(file, origin, options), _console()
    for note in converted.notes:
        console.print(f"note: {note}", style="yellow")
    if output is None:
        print(converted.text, end="")
        return
    with writing(output) as stream:
        stream.write(converted.text)
    console.print(f"written: {output}, from a {converted.trainer} file")


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
    settings = _load(config, context.args)
    signals.keeping(lambda: kept_steps(Path(settings.output_dir)))
    from jax_simpo import api

    api.train(settings)


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
    signals.keeping(lambda: f"{output} was not written")
    with writing(output if launch.is_first() else os.devnull) as file:
        from jax_simpo import api

        setup = _setup(settings, console, model)
        pairs = setup.split_pairs(split)
        api.print_notes(pairs, console)
        reference = api.reference_sums(setup, pairs, console)
        for record in api.score_records(api.load_setup(setup), pairs, console, reference):
            file.write(json.dumps(record) + "\n")
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
    """Prints evaluation metrics, over all pairs and of each split."""
    launch.join(launch.Launch(coordinator_address, num_processes, process_id, distributed))
    settings, console = _begin(config, context.args)
    from jax_simpo import api
    from jax_simpo.training.evaluate import split_metrics

    setup = _setup(settings, console, model)
    pairs = setup.eval_pairs() if split is None else setup.split_pairs(split)
    api.print_notes(pairs, console)
    reference = api.reference_sums(setup, pairs, console)
    scores = api.score_dataset(api.load_setup(setup), pairs, console, reference)
    metrics = split_metrics(scores, setup.objective, pairs.splits)
    if launch.is_first():
        print(json.dumps(metrics, indent=2))


@app.command(context_settings=OVERRIDES)
def generate(
    context: typer.Context,
    model: AnsweringModel,
    prompts: Annotated[
        Path,
        typer.Argument(
            metavar="PROMPTS",
            help="File of prompts (.jsonl, .json, .csv, also with .gz, or .parquet). Its rows are read as those of "
            "training data; they may have answers or none.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option(help="JSONL file to write, one object per prompt.", show_default=False)],
    samples: Annotated[int, typer.Option(help="Answers to each prompt.")] = 1,
    max_new_tokens: Annotated[int, typer.Option("--max_new_tokens", help="The most tokens of an answer.")] = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option("--batch_size", help="Answers computed at once.")] = 32,
    coordinator_address: Coordinator = None,
    num_processes: Processes = None,
    process_id: ProcessId = None,
    distributed: Distributed = None,
) -> None:
    """Writes the answers of a model to every prompt of a file, in file order."""
    launch.join(launch.Launch(coordinator_address, num_processes, process_id, distributed))
    settings, console = _settings(context.args)
    if unread := sorted({"dataset_columns", "dataset_format"} & settings.keys()):
        raise ConfigError(f"`{unread[0]}`: generate finds prompts by the names of columns; rename those of {prompts}")
    signals.keeping(lambda: f"{output} was not written")
    with writing(output if launch.is_first() else os.devnull) as file:
        from jax_simpo import api
        from jax_simpo.data.prompts import read_prompts

        setup = api.model_setup(model, settings)
        asked = api.asked_for(setup, samples, max_new_tokens, temperature, top_k, top_p, seed)
        read = read_prompts(prompts, setup.prompt_encoder)
        api.print_unused(read, console)
        for record in api.answer_prompts(api.load_setup(setup), read, asked, batch_size, console):
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    console.print(f"{len(read)} prompts answered: {output}")


@app.command(context_settings=OVERRIDES)
def chat(
    context: typer.Context,
    model: AnsweringModel,
    system: Annotated[
        str | None, typer.Option(help="A system turn to begin the conversation with.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max_new_tokens", help="The most tokens of an answer.")] = 1024,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
) -> None:
    """Talks with a model; reads lines from the terminal, or from standard input."""
    settings, console = _settings(context.args)
    from jax_simpo import api
    from jax_simpo.chat import Chat

    setup = api.model_setup(model, settings)
    asked = api.asked_for(setup, 1, max_new_tokens, temperature, top_k, top_p, seed)
    Chat(setup, api.load_setup(setup).params, asked, console, system).run()


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
    signals.keeping(lambda: f"{output} was not written")
    import jax

    from jax_simpo import hf
    from jax_simpo.training.setup import open_checkpoints

    most = hf.shard_bytes(max_shard_size)
    if model is None:
        with open_checkpoints(settings) as checkpoints:
            model = str(checkpoints.latest())
    setup = _setup(settings, console, model)
    if merge and setup.model.lora is None:
        raise ConfigError(f"--merge: {model} is no adapter, there is nothing to merge. Leave the option out")
    with jax.set_mesh(setup.mesh):
        written = setup.export(setup.load_params(), output, merge=merge, max_shard_bytes=most)
    console.print(f"{'step ' if model.isdecimal() else ''}{model} exported ({written}): {output}")


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
    from jax_simpo.sharding import make_mesh
    from jax_simpo.training.setup import Setup

    if json_file is not None:
        with writing(json_file) as file:
            inspection.write_json(Setup(settings), split, file)
        console.print(f"written: {json_file}")
        return
    any_mesh = False
    try:
        make_mesh(**settings.mesh.model_dump())
    except MeshError as error:
        console.print(f"note: {error}. Rows are planned for the devices that are here", style="yellow")
        any_mesh = True
    inspection.show(Setup(settings, any_mesh=any_mesh), split, rows, _console(stderr=False))


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
    from jax_simpo.plan import make_hardware_plan
    from jax_simpo.plan.report import show
    from jax_simpo.plan.topology import Topology

    hardware_plan = make_hardware_plan(config, context.args, Topology.parse(topology), search=search)
    if as_json:
        print(json.dumps(hardware_plan.to_json(), indent=2))
    else:
        show(hardware_plan, _console(stderr=False))


@app.command(context_settings=OVERRIDES)
def doctor(
    context: typer.Context,
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="[CONFIG.yaml]",
            help="A config whose model gives the shapes to try. Default: those of an 8B model, on a CPU small ones.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Checks this machine: devices, versions, settings, and whether attention and loss head are right and fast here.

    Ends with status 1 if something would stop a run or spoil it.
    """
    if config is None and context.args:
        raise ConfigError(f"{context.args[0]}: there is no config to override; give its file first")
    settings, console = (None, _console()) if config is None else _begin(config, context.args)
    from jax_simpo.doctor import examine_machine, show

    examination = examine_machine(settings, console)
    if as_json:
        print(json.dumps(examination.to_json(), indent=2))
    else:
        show(examination, _console(stderr=False))
    raise typer.Exit(0 if examination.healthy else 1)


@app.command(context_settings=OVERRIDES)
def report(
    context: typer.Context,
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN...",
            help="The folder of a run, or its config file with --key=value overrides. Curves of several are overlaid.",
            show_default=False,
        ),
    ],
    watch: Annotated[
        bool, typer.Option("--watch", help="Serve the page to a browser on this machine, live; write nothing.")
    ] = False,
    port: Annotated[int, typer.Option(help="Where to serve it. 0: a free port.", min=0, max=65535)] = 0,
    output: Annotated[Path, typer.Option(help="The page to write of several runs.")] = Path("comparison.html"),
) -> None:
    """Writes the report page and curves of a run anew; of several runs a page that compares them; or serves it live."""
    overrides = [argument for argument in context.args if argument.startswith("--")]
    runs = [run, *(argument for argument in context.args if not argument.startswith("--"))]
    folders, console = _run_folders(runs, overrides), _console()
    if watch:
        _serve(folders, port, console)
        return
    from jax_simpo.run.comparison import write_comparison
    from jax_simpo.run.report import write_report

    page = write_report(folders[0]) if len(folders) == 1 else write_comparison(folders, output)
    console.print(f"report: {page}")


def _run_folders(runs: list[str], overrides: list[str]) -> list[Path]:
    """Returns the folders of runs that are named by their folders or by their configs."""
    folders = []
    for name in runs:
        if Path(name).is_dir():
            folders.append(Path(name))
        elif Path(name).is_file() or name.endswith((".yaml", ".yml")) or name.startswith(("builtin:", "--")):
            folders.append(Path(_begin(name, overrides)[0].output_dir))
        else:
            raise CheckpointError(
                f"{name}: there is no such folder. Give the `output_dir` of a run, or its config file"
            )
    if overrides and all(Path(name).is_dir() for name in runs):
        raise ConfigError(f"{overrides[0]}: there is no config to override; a run's folder was given")
    return folders


def _serve(folders: list[Path], port: int, console: Console) -> None:
    """Serves the page of runs until Ctrl-C."""
    from jax_simpo.run.live import LiveServer, watched_runs

    with LiveServer(watched_runs(folders), port) as server:
        console.print(f"watching {', '.join(map(str, folders))}: open {server.url} in a browser; Ctrl-C ends it")
        with signals.interrupting(server.shutdown):
            server.serve_forever()
    console.print("no longer watching; the runs go on")


@app.command(context_settings=OVERRIDES)
def track(context: typer.Context, config: ConfigFile) -> None:
    """Sends the records, config and report of a run that is over to trackers: --report_to=wandb."""
    settings, console = _begin(config, context.args)
    from jax_simpo.tracking.trackers import send_run

    send_run(settings, Path(settings.output_dir), console)


@app.command(context_settings=OVERRIDES)
def push(context: typer.Context, config: ConfigFile) -> None:
    """Uploads the model of a run that is over to the Hugging Face hub, or what is left of an interrupted upload."""
    settings, console = _begin(config, context.args)
    from jax_simpo.hub import push_run

    push_run(settings, Path(settings.output_dir), console)


def _load(path: str, overrides: list[str]) -> TrainConfig:
    """Reads the config, or says that it comes first."""
    if path.startswith("--"):
        raise ConfigError(f"{path}: the config file comes first: jax-simpo COMMAND CONFIG.yaml {path}")
    return load_config(path, overrides)


def _begin(path: str, overrides: list[str]) -> tuple[TrainConfig, Console]:
    """Reads the config and prints its notices. Notes go to stderr: stdout is for results."""
    settings, console = _load(path, overrides), _console()
    for notice in settings.notices:
        console.print(f"note: {notice}", style="yellow")
    return settings, console


def _settings(overrides: list[str]) -> tuple[dict[str, Any], Console]:
    """Reads overrides of how a model is loaded, and prints their notices."""
    (settings, notices), console = read_overrides(overrides), _console()
    for notice in notices:
        console.print(f"note: {notice}", style="yellow")
    return settings, console


def _console(*, stderr: bool = True) -> Console:
    """Opens a console. Of several processes only the first prints."""
    return open_console(stderr=stderr, quiet=not launch.is_first())


def _setup(settings: TrainConfig, console: Console, model: str | None) -> Setup:
    """Builds what scoring and exporting start from. A missing step is found before the pairs are tokenised."""
    from jax_simpo.training.compilation import keep_compiled_programs
    from jax_simpo.training.setup import Setup, open_checkpoints

    keep_compiled_programs()
    if model is not None and model.isdecimal():
        with open_checkpoints(settings) as checkpoints:
            if int(model) not in checkpoints.steps():
                steps = ", ".join(map(str, checkpoints.steps())) or "none"
                raise CheckpointError(f"--model {model}: {checkpoints.directory} has no such step; there are: {steps}")
    setup = Setup(settings, model, any_mesh=True)
    if setup.start.note:
        console.print(f"note: {setup.start.note}", style="yellow")
    return setup


def main() -> None:
    """Entry point of the `jax-simpo` command."""
    try:
        with signals.handled(ends_process=True, before_end=launch.fail):
            app()
    except SystemExit as end:  # how typer ends, also when all went well
        if end.code:
            launch.fail(end)
        else:
            launch.finish()
        raise
    except StoppedError as error:
        console = _console()
        launch.finish() if error.saved else launch.fail(error)
        with suppress(OSError):  # the terminal may be gone, which is no failure
            console.print(str(error), style="yellow")
        sys.exit(error.status)
    except UserError as error:  # a mistake of the user's is told without a traceback
        launch.fail(error)
        _console().print(f"error: {error}", style="red")
        sys.exit(error.status)
    except BaseException as error:
        launch.fail(error)
        raise


if __name__ == "__main__":
    main()
