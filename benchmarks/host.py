"""Does the host keep up? How fast are steps planned and built, and how long does the device wait for them?

Plans every step of an epoch of 60,000 pairs and builds its rows on one core, without any device. Then trains a small
model for some steps as a run does, while a thread builds rows ahead, and measures how long the loop waits for rows.

Expected: thousands of pairs a second, beyond what a host's accelerators consume (about 100 pairs/s for 8B on 8 H100);
the loop waits less than 1 % of the time.

Takes about 2 minutes (`--quick`: half a minute).
"""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import jax

from benchmarks.facts import machine_facts
from benchmarks.lengths import PROFILES, profile_pairs
from benchmarks.models import model_mapping
from benchmarks.options import Option, run
from benchmarks.results import Result, Table, percent
from benchmarks.steps import Trainee, device_name, one_device, step_plan
from benchmarks.timing import seconds_of
from jax_simpo.data.loader import build_step, step_batches
from jax_simpo.hf.config import read_model_config
from jax_simpo.models.transformer import Model


def main(
    output: Annotated[Path, Option("Folder for the results.")] = Path("docs/benchmarks"),
    pairs: Annotated[int, Option("Pairs of the epoch.")] = 60_000,
    batch: Annotated[int, Option("Pairs a step.")] = 128,
    profiles: Annotated[list[str] | None, Option("Lengths of the pairs (repeatable).")] = None,
    model: Annotated[str, Option("Trained in the short run, see benchmarks/models.py.")] = "small",
    steps: Annotated[int, Option("Of the short run.")] = 6,
    name: Annotated[str, Option("Stem of the files.")] = "host",
    quick: Annotated[bool, Option("Few pairs and a tiny model, to see that it runs.")] = False,
) -> None:
    """Measures planning, building and waiting."""
    profiles = profiles or ["hh-rlhf", "capybara"]
    if quick:
        pairs, model, steps, batch, profiles = 500, "tiny", 3, 16, ["hh-rlhf"]
    policy = Model(read_model_config(model_mapping(model)), "float32", "none")
    host = {profile: _host(policy, profile, pairs, batch) for profile in profiles}
    waiting = _idle(policy, profiles[0], batch, steps)
    rows = [
        (
            profile,
            measured["shape_seconds"],
            pairs / measured["plan_seconds"],
            pairs / measured["build_seconds"],
            measured["tokens"] / measured["build_seconds"],
        )
        for profile, measured in host.items()
    ]
    columns = ("pairs", "row shape chosen, s", "planned, pairs/s", "built, pairs/s", "built, tokens/s")
    note = "Built: planned, read from memory and laid out in rows, on one core, shared and packed."
    idle = (
        f"{steps} steps of {batch} {profiles[0]} pairs with {model}: {waiting['seconds']:.3g} s, of which the loop "
        f"waited {waiting['waited']:.3g} s for rows: {percent(waiting['waited'] / waiting['seconds'])}. Building them "
        f"takes {waiting['building']:.3g} s of the background thread."
    )
    tables = [Table(f"The host's work for {pairs:,} pairs, {batch} a step", columns, rows, note)]
    tables.append(Table("A short run", ("seconds", "waited for rows", "idle share"), [_row(waiting)], idle))
    data: dict[str, Any] = {"pairs": pairs, "batch": batch, "host": host, "run": waiting}
    about = "Planning, packing and building rows without a device, and how long a device waits for them."
    Result(name, "The host", about, machine_facts(device_name()), tables, data).write(output)


def _host(model: Model, profile: str, count: int, batch: int) -> dict[str, float]:
    pool = profile_pairs(PROFILES[profile], count, model.config.vocab_size)
    started = time.perf_counter()
    plan = step_plan(model, pool, "shared+packed", batch=batch)
    shape_seconds = time.perf_counter() - started
    steps = range(plan.steps_per_epoch)
    tokens = 0

    def build() -> None:
        nonlocal tokens
        tokens = sum(build_step(plan, pool, k).input_tokens for k in steps)

    return {
        "shape_seconds": shape_seconds,
        "plan_seconds": seconds_of(lambda: [plan.step(k) for k in steps]),
        "build_seconds": seconds_of(build),
        "tokens": tokens,
    }


def _idle(model: Model, profile: str, batch: int, steps: int) -> dict[str, float]:
    """Runs steps after one that compiles, with rows built ahead as in a training run, and measures the waiting."""
    pool = profile_pairs(PROFILES[profile], batch * (steps + 1), model.config.vocab_size)
    mesh = one_device()
    plan = step_plan(model, pool, "shared+packed", batch=batch)
    plan = replace(plan, seed=None)
    trainee = Trainee(model, plan, pool, mesh)
    with jax.set_mesh(mesh):
        weights = trainee.fresh_weights()
        trainee.warm(weights)
        waited = 0.0
        started = time.perf_counter()
        with closing(step_batches(plan, pool, range(1, steps + 1))) as batches:
            for _ in range(steps):
                wait_started = time.perf_counter()
                step_batch = next(batches)
                waited += time.perf_counter() - wait_started
                trainee.compute(weights, step_batch)
        seconds = time.perf_counter() - started
    building = seconds_of(lambda: [trainee.build(k + 1) for k in range(steps)])
    return {"seconds": seconds, "waited": waited, "building": building}


def _row(waiting: dict[str, float]) -> tuple[Any, ...]:
    return waiting["seconds"], waiting["waited"], percent(waiting["waited"] / waiting["seconds"])


if __name__ == "__main__":
    run(main)
