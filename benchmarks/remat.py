"""Is a rematerialisation policy worth its time: how much does each cost, and how much memory does it save?

Runs the trainer's step under `remat: none`, `dots`, `attention` and `full` and measures the memory of the compiled
program of a micro-batch and the seconds of whole optimizer steps, in turns, on the same pairs and weights. A 1B model
is compiled and not run, to see the memory of its micro-batch.

Expected: `full` computes the layers' forward twice (at most 4/3 of the time of `none`) and keeps one hidden state a
layer; `attention` keeps attention's result besides, about twice as much, and saves its forward pass; `dots` lies
between `attention` and `none`.

Takes about 7 minutes on two CPU cores (`--quick`: half a minute).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import jax

from benchmarks.facts import machine_facts
from benchmarks.lengths import PROFILES, profile_pairs
from benchmarks.models import model_mapping
from benchmarks.options import Option, run
from benchmarks.results import Result, Table, can_draw, gib, picture
from benchmarks.steps import Trainee, device_name, one_device, step_plan, steps_in_turns
from benchmarks.timing import speed_up
from jax_simpo.hf.config import read_model_config
from jax_simpo.models.transformer import Model

POLICIES = ("none", "dots", "attention", "full")


def main(
    output: Annotated[Path, Option("Folder for the results.")] = Path("docs/benchmarks"),
    model: Annotated[str, Option("One of benchmarks/models.py.")] = "hh-155m",
    layers: Annotated[int | None, Option("Fewer layers than the model has.")] = None,
    profile: Annotated[str, Option("Lengths of the pairs.")] = "hh-rlhf",
    batch: Annotated[int, Option("Pairs a step.")] = 16,
    row_length: Annotated[int, Option("Tokens a row.")] = 2048,
    dtype: Annotated[str, Option("Compute dtype.")] = "float32",
    rounds: Annotated[int, Option("Steps of each policy.")] = 3,
    compile_only: Annotated[str, Option("Model to compile and not run; empty for none.")] = "llama-3.2-1b",
    compile_row_length: Annotated[int, Option("Its tokens a row.")] = 4096,
    name: Annotated[str, Option("Stem of the files.")] = "remat",
    quick: Annotated[bool, Option("Tiny models, to see that it runs.")] = False,
) -> None:
    """Compares the policies."""
    if quick:
        model, batch, rounds, compile_only, row_length, compile_row_length = "tiny", 8, 2, "tiny", 1024, 1024
    mesh = one_device()

    def trainees(which: str, count: int | None, compute: str, length: int) -> dict[str, Trainee]:
        config = read_model_config(model_mapping(which, count))
        pairs = profile_pairs(PROFILES[profile], 8 * batch, config.vocab_size)
        models = [Model(config, compute, policy) for policy in POLICIES]  # type: ignore[arg-type]
        plan = step_plan(models[0], pairs, "shared+packed", batch=batch, row_length=length)
        return {model.remat: Trainee(model, plan, pairs, mesh) for model in models}

    with jax.set_mesh(mesh):
        run = trainees(model, layers, dtype, row_length)
        step_bytes = {policy: trainee.compiled_bytes() for policy, trainee in run.items()}
        weights = run["none"].fresh_weights()
        seconds = steps_in_turns(run, weights, rounds)
        del weights
        compiled = {}
        if compile_only:
            large = trainees(compile_only, None, "bfloat16", compile_row_length)
            compiled = {policy: trainee.compiled_bytes() for policy, trainee in large.items()}
    parameters = run["none"].model.parameter_count
    rows: list[tuple[Any, ...]] = [
        (
            *(policy, statistics.median(seconds[policy]), speed_up(seconds[policy], seconds["none"])),
            *(gib(step_bytes[policy]), gib(step_bytes[policy] - 8 * parameters)),
        )
        for policy in POLICIES
    ]
    columns = ("remat", "seconds a step", "time beside none", "memory", "of which activations")
    tables = [Table(f"{model}, measured", columns, rows, _NOTE)]
    if compiled:
        count = large["none"].model.parameter_count
        rows = [(p, gib(compiled[p]), gib(compiled[p] - 8 * count)) for p in POLICIES]
        title = f"{compile_only}, bfloat16, rows of {compile_row_length}, compiled only"
        tables.append(Table(title, ("remat", "memory", "of which activations"), rows))
    about = (
        f"{model}, {parameters / 1e6:.0f} M parameters, {dtype}, {batch} pairs of {profile} a step in rows of "
        f"{row_length}; medians of {rounds} rounds in turns."
    )
    pictures = [f"{name}.png"] if can_draw() else []
    for picture_name in pictures:
        _draw(output, picture_name, seconds, {policy: step_bytes[policy] - 8 * parameters for policy in POLICIES})
    data = {"seconds": seconds, "bytes": step_bytes, "parameters": parameters, "compiled_only_bytes": compiled}
    Result(name, "Rematerialisation", about, machine_facts(device_name()), tables, data, pictures).write(output)


def _draw(output: Path, name: str, seconds: Mapping[str, list[float]], activations: Mapping[str, int]) -> None:
    points = {policy: (activations[policy] / 2**30, statistics.median(seconds[policy])) for policy in POLICIES}
    with picture(output, name) as axes:
        for policy, point in points.items():
            axes.plot(*point, "o")
            axes.annotate(policy, point, xytext=(6, 4), textcoords="offset points")
        axes.set_xlabel("activations of a micro-batch, GiB")
        axes.set_ylabel("seconds a step")
        axes.set_xlim(0, 1.15 * max(x for x, _ in points.values()))
        axes.set_ylim(0, 1.15 * max(y for _, y in points.values()))


_NOTE = (
    "Memory: that of the compiled program of a micro-batch, without the optimizer's state. Activations: the same "
    "without the parameters and the sum of the gradients, both float32; a micro-batch's own gradients are included."
)

if __name__ == "__main__":
    run(main)
