"""Does a loss head that never holds the logits of all targets save time and memory?

Times forward and backward of the loss head alone, over vocabularies of 32k to 256k: `target_logps`, which computes the
logits in tiles, twice or (`keep_bytes`) once, against full float32 logits under autodiff, as in most trainers. Each way
and vocabulary runs in a process of its own; the ways of a vocabulary take turns.

Expected: the temporaries of the tiled head do not grow with targets x vocabulary, while those of full logits do,
several times over. The tiled head is no slower, though it computes the logits twice.

Takes about 8 minutes on two CPU cores (`--quick`: half a minute). On a GPU it has not run yet.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from benchmarks.cells import CELLS_HELP, Cells, failed
from benchmarks.facts import forget_peak, machine_facts, peak_resident_bytes
from benchmarks.options import Option, run
from benchmarks.results import Result, Table, can_draw, gib, picture
from benchmarks.timing import in_turns, speed_up
from benchmarks.workers import Requests, Worker, WorkerFailed

VOCABULARIES = (32000, 64000, 128256, 256000)
WAYS = ("full logits", "tiles", "tiles, logits kept")


def main(
    output: Annotated[Path, Option("Folder for the results.")] = Path("docs/benchmarks"),
    width: Annotated[int, Option("Of the hidden states.")] = 512,
    targets: Annotated[int, Option("Targets a micro-batch.")] = 2048,
    dtype: Annotated[str, Option("Compute dtype.")] = "float32",
    rounds: Annotated[int, Option("Runs of each.")] = 5,
    name: Annotated[str, Option("Stem of the files.")] = "loss_head",
    cells: Annotated[Path | None, Option(CELLS_HELP)] = None,
    quick: Annotated[bool, Option("Two tiny vocabularies, to see that it runs.")] = False,
) -> None:
    """Times both ways and measures their memory."""
    vocabularies = [1000, 2000] if quick else list(VOCABULARIES)
    if quick:
        width, targets, rounds = 64, 256, 2
    store = Cells(cells)
    measured: dict[int, Any] = {}
    for vocabulary in vocabularies:
        sizes = {"vocabulary": vocabulary, "width": width, "targets": targets}
        result = store.measure(
            {"loss head": list(WAYS), **sizes, "dtype": dtype, "rounds": rounds},
            partial(_measure, [str(size) for size in sizes.values()], dtype, rounds),
            always=True,
        )
        measured[vocabulary] = dict.fromkeys(WAYS, result) if failed(result) else result
        print(f"{vocabulary}: {measured[vocabulary]}", flush=True)
    devices = [a["device"] for ways in measured.values() for a in ways.values() if "device" in a]
    if not devices:
        sys.exit(f"nothing could be measured: {measured}")
    about = f"{targets} targets of width {width}, {dtype}; medians of {rounds} rounds in turns."
    pictures = [f"{name}.png"] if can_draw() else []
    for picture_name in pictures:
        _draw(output, picture_name, measured)
    tables = [_table(measured)]
    Result(
        name,
        "The loss head",
        about,
        machine_facts(devices[0]),
        tables,
        {str(vocabulary): ways for vocabulary, ways in measured.items()},
        pictures,
    ).write(output)


def _draw(output: Path, name: str, measured: Mapping[int, Any]) -> None:
    with picture(output, name, columns=2) as (left, right):
        for way in WAYS:
            ran = [v for v in measured if "seconds" in measured[v][way]]
            left.plot(ran, [statistics.median(measured[v][way]["seconds"]) for v in ran], "o-", label=way)
            right.plot(ran, [measured[v][way]["extra_bytes"] / 2**30 for v in ran], "o-", label=way)
        left.set_ylabel("seconds, forward and backward")
        right.set_ylabel("memory beyond inputs, GiB")
        for axes in (left, right):
            axes.set_xlabel("vocabulary")
            axes.set_ylim(bottom=0)
            axes.legend()


def _measure(arguments: list[str], dtype: str, rounds: int) -> dict[str, Any]:
    """Measures seconds and memory of each way at one vocabulary; a way that fails gets the reason instead.

    Raises:
        RuntimeError: every way failed.
    """
    measured: dict[str, Any] = {}
    running = {}
    with tempfile.TemporaryDirectory() as work, ExitStack() as workers:
        for way in WAYS:
            worker = Worker(
                ["benchmarks.loss_head", "--worker", way, *arguments, dtype],
                Path(work) / f"{way}.log",
                {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
            )
            workers.callback(worker.close)
            try:
                measured[way] = worker.ask(do="warm")
                running[way] = worker
            except WorkerFailed as error:
                measured[way] = {"failed": str(error)}
        if not running:
            raise RuntimeError("; ".join(f"{way}: {result['failed']}" for way, result in measured.items()))
        turns = {way: partial(_seconds, worker) for way, worker in running.items()}
        for way, seconds in in_turns(turns, rounds).items():
            measured[way]["seconds"] = seconds
    return measured


def _seconds(worker: Worker, _: int) -> float:
    return float(worker.ask()["seconds"])


def _table(by_vocabulary: Mapping[int, Any]) -> Table:
    rows: list[tuple[Any, ...]] = []
    for vocabulary, ways in by_vocabulary.items():
        full = ways[WAYS[0]].get("seconds")
        for way, measured in ways.items():
            seconds = measured.get("seconds")
            rows.append(
                (
                    *(vocabulary, way),
                    measured["failed"].partition("\n")[0] if seconds is None else 1e3 * statistics.median(seconds),
                    speed_up(full, seconds) if full and seconds else "",
                    *(gib(measured.get(key)) for key in ("extra_bytes", "temporary_bytes")),
                )
            )
    columns = ("vocabulary", "way", "ms", "speed-up over full", "memory", "temporaries")
    note = (
        "Memory: the most that the process held beyond its inputs (on a GPU, the most that was allocated). "
        "Temporaries: the memory that the compiled program states beside inputs and results."
    )
    return Table("Forward and backward", columns, rows, note)


def _worker(way: str, vocabulary: int, width: int, targets: int, dtype: str) -> None:
    requests = Requests()
    keep = 2**62 if way == WAYS[2] else 0

    import jax
    import jax.numpy as jnp

    from benchmarks.steps import device_name
    from benchmarks.timing import seconds_of
    from jax_simpo.ops.logprobs import target_logps
    from jax_simpo.ops.numerics import matmul_precision

    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (1, targets, width), jnp.dtype(dtype))
    head = 0.02 * jax.random.normal(keys[1], (vocabulary, width))
    token = jax.random.randint(keys[2], (1, targets), 0, vocabulary)
    index = jnp.arange(targets)[None]

    def full(hidden: jax.Array, head: jax.Array) -> jax.Array:
        weights = head.astype(hidden.dtype)
        logits = jnp.einsum("bnd,vd->bnv", hidden, weights, precision=matmul_precision(hidden.dtype))
        logps = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        return jnp.take_along_axis(logps, token[..., None], -1).mean()

    def tiled(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return target_logps(hidden, head, index, token, keep_bytes=keep).mean()

    gradient = jax.jit(jax.grad(full if way == WAYS[0] else tiled, argnums=(0, 1)))
    compiled = gradient.lower(hidden, head).compile()

    def run() -> None:
        jax.block_until_ready(compiled(hidden, head))

    def peak_bytes() -> int:
        stats = jax.devices()[0].memory_stats()
        return stats["peak_bytes_in_use"] if stats else peak_resident_bytes()

    def handle(request: dict[str, Any]) -> dict[str, Any]:
        if request.get("do") != "warm":
            return {"seconds": seconds_of(run)}
        jax.block_until_ready((hidden, head))
        stats = jax.devices()[0].memory_stats()
        if stats is None:
            forget_peak()
        before = stats["bytes_in_use"] if stats else peak_resident_bytes()
        run()
        memory: Any = compiled.memory_analysis()
        return {
            "extra_bytes": peak_bytes() - before,
            "temporary_bytes": memory.temp_size_in_bytes,
            "device": device_name(),
        }

    requests.serve(handle)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        _worker(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]), sys.argv[6])
    else:
        run(main)
