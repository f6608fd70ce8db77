"""The command line: `python -m torch_ref train|score CONFIG.yaml --key=value ...`.

Several ranks, and ZeRO-3 with them: `torchrun --nproc_per_node N -m torch_ref train CONFIG.yaml`, or
`deepspeed --module torch_ref train CONFIG.yaml`.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from jax_simpo.config import TrainConfig, load_config
from jax_simpo.errors import ConfigError, StoppedError, UserError
from jax_simpo.run import signals
from jax_simpo.run.steps import kept_steps
from jax_simpo.run.whole import writing
from jax_simpo.terminal import open_console

if TYPE_CHECKING:  # importing torch takes seconds, which `--help` and a misspelt key need not wait for
    from torch_ref.distributed import Ranks

app = typer.Typer(
    help="jax-simpo in PyTorch, its reference: the same config files, overrides and outputs. Under torchrun "
    "or deepspeed it trains with ZeRO-3 on all ranks.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}

ConfigFile = Annotated[
    str, typer.Argument(metavar="CONFIG.yaml", help="The config file, or `builtin:NAME`.", show_default=False)
]
DeepSpeedFile = Annotated[
    Path | None,
    typer.Option(help="DeepSpeed settings. Default: the deepspeed_zero3.json of jax-simpo.", show_default=False),
]


@app.command(context_settings=OVERRIDES)
def train(context: typer.Context, config: ConfigFile, deepspeed: DeepSpeedFile = None) -> None:
    """Trains; resumes by itself when the output directory holds a checkpoint of the same run."""
    settings = _load(config, context.args)
    signals.keeping(lambda: kept_steps(Path(settings.output_dir)))
    from torch_ref.distributed import open_ranks
    from torch_ref.trainer import train as run

    with open_ranks() as ranks:
        run(settings, _console(settings, ranks), ranks, deepspeed)


@app.command(context_settings=OVERRIDES)
def score(
    context: typer.Context,
    config: ConfigFile,
    split: Annotated[str, typer.Option(help="Split to score.", show_default=False)],
    output: Annotated[Path, typer.Option(help="JSONL file to write, one object per group.", show_default=False)],
    model: Annotated[
        str | None,
        typer.Option(help="A model folder or hub id. Default: what the config starts from.", show_default=False),
    ] = None,
    deepspeed: DeepSpeedFile = None,
) -> None:
    """Writes log-probs, rewards, margin and loss of every group of a split, in file order."""
    settings = _load(config, context.args)
    signals.keeping(lambda: f"{output} was not written")
    from torch_ref.distributed import open_ranks
    from torch_ref.evaluate import GROUPS_PER_PLAN, group_records, open_model, score_groups
    from torch_ref.notes import print_attention, print_split
    from torch_ref.reference import reference_sums
    from torch_ref.setup import Setup

    with open_ranks() as ranks, writing(output if ranks.is_first else os.devnull) as file:
        console = _console(settings, ranks)
        setup = Setup(settings, ranks, model)
        groups = setup.split_pairs(split)
        plan = setup.step_plan(groups, batch=GROUPS_PER_PLAN, seed=None)
        print_attention(console, setup)
        print_split(console, setup, split, groups, plan)
        known = setup.known(groups)
        if setup.objective.needs_reference:
            known = replace(known, reference=reference_sums(setup, [groups], console, deepspeed)[0])
        with open_model(setup, deepspeed) as forward:
            scores = score_groups(forward, plan, groups, ranks, known)
        for (_, row), record in zip(groups.origins, group_records(scores, setup.objective), strict=True):
            file.write(json.dumps({"row": row, **record}) + "\n")
        console.print(f"{len(groups)} pairs scored: {output}")


def _load(config: str, overrides: list[str]) -> TrainConfig:
    """Reads the config, and makes sure that PyTorch is installed.

    Raises:
        ConfigError: the config has a mistake, or PyTorch is missing.
    """
    settings = load_config(config, overrides, torch=True)
    if find_spec("torch") is None:
        raise ConfigError("torch_ref needs PyTorch, which is not installed here: pip install 'jax-simpo[torch]'")
    return settings


def _console(settings: TrainConfig, ranks: Ranks) -> Console:
    """Opens the console for notes: stderr, of the first rank only."""
    console = open_console(quiet=not ranks.is_first)
    for notice in settings.notices:
        console.print(f"note: {notice}", style="yellow")
    return console


def main() -> None:
    """Runs the command. The first rank alone prints a mistake of the user, without a traceback."""
    rank = os.environ.get("RANK")
    status: int | str | None = 0
    # The deepspeed launcher puts this before the command, and says the same in the environment.
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank=")]
    try:
        with signals.handled(ends_process=True):
            app(arguments)
    except UserError as error:
        if rank in (None, "0"):
            stopped = isinstance(error, StoppedError)
            open_console().print(str(error) if stopped else f"error: {error}", style="yellow" if stopped else "red")
        status = error.status
    except SystemExit as end:  # how typer ends, well or not
        status = end.code
    if rank is not None:
        # What DeepSpeed leaves behind makes one process in ten abort while Python is taken down, after all is done and
        # the process group is closed; the launcher would take that for a failed run.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else int(bool(status)))
    sys.exit(status)


if __name__ == "__main__":
    main()
