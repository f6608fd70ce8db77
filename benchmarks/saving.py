"""Measures what a checkpoint costs: the time of saving, the share of its checksums, and the time of resuming.

Saves the float32 weights and AdamW's moments of models of several sizes with the trainer's own checkpoints, then checks
and restores them as a run does that goes on.

Expected: the checksums take less than a tenth of a save, and checking a step takes less time than writing it.

Takes about 3 minutes, most of it in writing to the disk (`--quick`: half a minute). Weights of 1.2 billion parameters
take 15 GB of memory and 30 GB on the disk.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import typer

from benchmarks.facts import machine_facts
from benchmarks.models import model_mapping
from benchmarks.results import Result, Table, percent
from benchmarks.steps import CONFIG, SIMPO, device_name, one_device
from benchmarks.timing import seconds_of, timed
from jax_simpo.hf.config import read_model_config
from jax_simpo.models.policy import Forward
from jax_simpo.models.transformer import Model
from jax_simpo.run.checkpoint import Checkpoints, abstract_state
from jax_simpo.run.seal import file_names
from jax_simpo.run.sums import NOTHING, sums_of
from jax_simpo.training.optim import run_optimizer
from jax_simpo.training.step import make_train_functions

_INTERVAL = 500  # steps between checkpoints, the default of `save_steps`


def main(
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("docs/benchmarks"),
    models: Annotated[list[str] | None, typer.Option("--model", help="See benchmarks/models.py (repeatable).")] = None,
    folder: Annotated[Path | None, typer.Option(help="Where to save; the default is the folder for scratch.")] = None,
    rounds: Annotated[int, typer.Option(help="Saves of each model.")] = 3,
    name: Annotated[str, typer.Option(help="Stem of the files.")] = "saving",
    quick: Annotated[bool, typer.Option(help="A tiny model, to see that it runs.")] = False,
) -> None:
    """Measures saving, checking and restoring."""
    names = ["tiny"] if quick else models or ["small", "hh-155m", "llama-3.2-1b"]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        measured = {model: _measure(model, Path(scratch) / model, rounds) for model in names}
    rows = []
    for model, rounds_of_model in measured.items():
        median = {key: statistics.median(r[key] for r in rounds_of_model) for key in rounds_of_model[0]}
        rows.append(
            (
                model,
                median["bytes"] / 1e9,
                median["save"],
                median["bytes"] / 1e9 / median["save"],
                percent(statistics.median(r["checksums"] / (r["save"] - r["checksums"]) for r in rounds_of_model)),
                median["check"],
                median["restore"],
                median["save"] / (0.02 * _INTERVAL),
            )
        )
    columns = (
        *("model", "step, GB", "save, s", "GB/s", "checksums beside the rest", "check, s", "restore, s"),
        "2 % of a run from steps of, s",
    )
    note = (
        f"Medians of {rounds} saves. A save waits until everything is on the disk. The last column says how long a "
        f"step must take for a save every {_INTERVAL} steps, the default, to take at most 2 % of a run."
    )
    tables = [Table("A step with float32 weights and AdamW's moments", columns, rows, note)]
    about = "What saving, checking and restoring a checkpoint take."
    Result(name, "Saving", about, machine_facts(device_name()), tables, {"measured": measured}).write(output)


def _measure(name: str, folder: Path, rounds: int) -> list[dict[str, float]]:
    model = Model(read_model_config(model_mapping(name)), "float32", "none")
    mesh = one_device()
    _, optimizer = run_optimizer(CONFIG, _INTERVAL)
    functions = make_train_functions(Forward(model, "dense"), SIMPO, optimizer, mesh)
    shapes: Any = jax.eval_shape(functions.init_optimizer, model.abstract)
    abstract = (
        abstract_state(model.abstract, model.shardings(mesh)),
        abstract_state(shapes, functions.optimizer_shardings),
    )
    with jax.set_mesh(mesh):
        params = model.init(0, mesh)
        # Fresh moments are zeros, which would be compressed to nothing.
        arrays = [params, jax.jit(_randomised, donate_argnums=0)(functions.init_optimizer(params))]
        del params
        measured = [_save_and_restore(folder, step, arrays, abstract) for step in range(1, rounds + 1)]
    shutil.rmtree(folder)
    return measured


def _save_and_restore(folder: Path, step: int, arrays: list[Any], abstract: Sequence[Any]) -> dict[str, float]:
    """Saves weights and optimizer state, and puts the restored ones in their place: there is room for one copy."""
    jax.block_until_ready(arrays)
    with Checkpoints(folder, keep=1) as checkpoints:
        save = seconds_of(lambda: checkpoints.save(step, arrays[0], arrays[1], {}, NOTHING))
    saved = folder / str(step)
    sums, checksums = timed(lambda: sums_of(saved, file_names(saved)))
    arrays.clear()
    with Checkpoints(folder) as checkpoints:  # another one, which has not checked the step yet

        def restore() -> None:
            arrays.append(checkpoints.params(step, abstract[0]))
            arrays.append(checkpoints.optimizer(step, abstract[1]))
            jax.block_until_ready(arrays)

        damage, check = timed(lambda: checkpoints.damage(step))
        assert damage is None
        restored = seconds_of(restore)
    size = sum(found.bytes for found in sums.values())
    return {"bytes": size, "save": save, "checksums": checksums, "check": check, "restore": restored}


def _randomised(state: Any) -> Any:
    """Replaces the arrays of an optimizer state by random ones."""
    key = jax.random.key(0)
    return jax.tree.map(lambda x: jax.random.normal(key, x.shape, x.dtype) if x.ndim else x, state)


if __name__ == "__main__":
    typer.run(main)
