"""What does a checkpoint cost: how long are saving, its checksums, checking and resuming?

Saves the float32 weights and AdamW's moments of models of several sizes with the trainer's own checkpoints, then checks
and restores them as a run does that goes on. Where the memory has room for it, it makes optimizer steps while a step is
written, and compares their time with that of steps without a save.

Expected: the checksums take less than a twentieth of a save whose files fit into the memory, checking a step takes less
time than writing it, and training loses less time than a save takes.

Takes about 6 minutes, most of it in writing to the disk (`--quick`: half a minute). Weights of 1.2 billion parameters
take 15 GB of memory and 30 GB on the disk.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax

from benchmarks.facts import machine_facts
from benchmarks.lengths import PROFILES, profile_pairs
from benchmarks.models import model_mapping
from benchmarks.options import Option, run
from benchmarks.results import Result, Table, percent
from benchmarks.steps import Trainee, Weights, device_name, one_device, step_plan
from benchmarks.timing import seconds_of, timed
from jax_simpo.hf.config import read_model_config
from jax_simpo.models.transformer import Model
from jax_simpo.run.checkpoint import Checkpoints, abstract_state
from jax_simpo.run.seal import file_names
from jax_simpo.run.sums import NOTHING, sums_of

_INTERVAL = 500  # steps between checkpoints, the default of `save_steps`
_TOO_LARGE = 5e8  # parameters from which on this machine has no room for a step beside a save
_STEPS = 3  # that are timed alone, before a save and after it


def main(
    output: Annotated[Path, Option("Folder for the results.")] = Path("docs/benchmarks"),
    models: Annotated[list[str] | None, Option("See benchmarks/models.py (repeatable).", flag="--model")] = None,
    folder: Annotated[Path | None, Option("Where to save; the default is the folder for scratch.")] = None,
    rounds: Annotated[int, Option("Saves of each model.")] = 3,
    name: Annotated[str, Option("Stem of the files.")] = "saving",
    quick: Annotated[bool, Option("A tiny model, to see that it runs.")] = False,
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
                median["returns"],
                median["save"],
                percent(statistics.median(r["checksums"] / (r["save"] - r["checksums"]) for r in rounds_of_model)),
                median["check"],
                median["restore"],
                median["lost"],
                median["lost"] / (0.02 * _INTERVAL),
            )
        )
    columns = (
        *("model", "step, GB", "save returns, s", "step is whole, s", "checksums beside the rest", "check, s"),
        *("restore, s", "training loses, s", "2 % of a run from steps of, s"),
    )
    note = (
        f"Medians of {rounds} saves. A step is whole when everything is on the disk. Checksums: their time, as a share "
        "of the time of the rest of a save. Training loses: by how much more time optimizer steps take that are made "
        f"during a save. On a CPU the two compete for the cores. From {_TOO_LARGE:,.0f} parameters on there is no room "
        "for a second copy here, so training waits for the whole save. The last column says how long a step must take "
        f"for a save every {_INTERVAL} steps, the default, to take at most 2 % of a run."
    )
    tables = [Table("A step with float32 weights and AdamW's moments", columns, rows, note)]
    about = "What saving, checking and restoring a checkpoint take."
    Result(name, "Saving", about, machine_facts(device_name()), tables, {"measured": measured}).write(output)


def _measure(name: str, folder: Path, rounds: int) -> list[dict[str, float]]:
    model = Model(read_model_config(model_mapping(name)), "float32", "none")
    pairs = profile_pairs(PROFILES["hh-rlhf"], 4, model.config.vocab_size)
    trainee = Trainee(model, step_plan(model, pairs, "shared+packed", batch=4), pairs, one_device())
    shapes: Any = jax.eval_shape(trainee.functions.init_optimizer, model.abstract)
    abstract = (
        abstract_state(model.abstract, model.shardings(trainee.mesh)),
        abstract_state(shapes, trainee.functions.optimizer_shardings),
    )
    steps = model.parameter_count < _TOO_LARGE
    with jax.set_mesh(trainee.mesh):
        weights = trainee.fresh_weights()
        # Fresh moments are zeros, which would be compressed to nothing.
        weights.state = jax.jit(_randomised, donate_argnums=0)(weights.state)
        if steps:
            trainee.warm(weights)
        measured = []
        for number in range(1, rounds + 1):
            lost = _lost(trainee, weights, folder) if steps else None
            found = _save_and_restore(folder, number, weights, abstract)
            measured.append({**found, "lost": found["save"] if lost is None else lost})
    shutil.rmtree(folder)
    return measured


def _lost(trainee: Trainee, weights: Weights, folder: Path) -> float:
    """Returns by how many seconds steps that are made during a save take longer than steps without one."""
    alone = [trainee.seconds(weights, 0) for _ in range(_STEPS)]
    with Checkpoints(folder / "beside", keep=1) as checkpoints:
        started, count = time.perf_counter(), 0
        checkpoints.save(1, weights.params, weights.state, {}, NOTHING)
        while checkpoints.saving:
            trainee.seconds(weights, 0)
            count += 1
        checkpoints.wait()
        taken = time.perf_counter() - started
    alone += [trainee.seconds(weights, 0) for _ in range(_STEPS)]
    return taken - count * statistics.fmean(alone)


def _save_and_restore(folder: Path, step: int, weights: Weights, abstract: Sequence[Any]) -> dict[str, float]:
    """Saves weights and optimizer state, and puts the restored ones in their place: there is room for one copy."""
    jax.block_until_ready(vars(weights))
    with Checkpoints(folder, keep=1) as checkpoints:
        started = time.perf_counter()
        returns = seconds_of(lambda: checkpoints.save(step, weights.params, weights.state, {}, NOTHING))
        checkpoints.wait()
        save = time.perf_counter() - started
    saved = folder / str(step)
    sums, checksums = timed(lambda: sums_of(saved, file_names(saved)))
    weights.params = weights.state = None
    with Checkpoints(folder) as checkpoints:  # another one, which has not checked the step yet

        def restore() -> None:
            weights.params = checkpoints.params(step, abstract[0])
            weights.state = checkpoints.optimizer(step, abstract[1])
            jax.block_until_ready(vars(weights))

        damage, check = timed(lambda: checkpoints.damage(step))
        assert damage is None
        restored = seconds_of(restore)
    size = sum(found.bytes for found in sums.values())
    return {
        "bytes": size,
        "returns": returns,
        "save": save,
        "checksums": checksums,
        "check": check,
        "restore": restored,
    }


def _randomised(state: Any) -> Any:
    """Replaces the arrays of an optimizer state by random ones."""
    key = jax.random.key(0)
    return jax.tree.map(lambda x: jax.random.normal(key, x.shape, x.dtype) if x.ndim else x, state)


if __name__ == "__main__":
    run(main)
