"""Does a loss head that never holds the logits of all targets save time and memory?

Times forward and backward of the loss head alone, over vocabularies of 32k to 256k: `target_logps`, which computes the
logits in tiles, twice or (`keep_bytes`) once, and on a GPU or TPU with its kernels; full float32 logits under autodiff,
as in most trainers; and Liger's SimPO loss, and on a GPU its cross-entropy, if liger-kernel is installed. Each way and
vocabulary runs in a process of its own; the ways of a vocabulary take turns. All get the same numbers, and a way whose
mean log-prob is not that of full logits has no time.

Expected: the temporaries of the tiled head do not grow with targets x vocabulary, while those of full logits do,
several times over. The tiled head is no slower, though it computes the logits twice, and no slower than Liger's.

Takes about 12 minutes on two CPU cores (`--quick`: half a minute). On a GPU it has not run yet.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from benchmarks.cells import CELLS_HELP, WRONG, Cells, failed
from benchmarks.facts import installed, machine_facts
from benchmarks.loss_head_sides import FULL, SEQUENCE, WAYS, Sizes
from benchmarks.options import Option, run
from benchmarks.results import Result, Table, can_draw, gib, picture
from benchmarks.timing import in_turns, speed_up
from benchmarks.workers import Worker, WorkerFailed

VOCABULARIES = (32000, 64000, 128256, 256000)
# How far a mean log-prob of a target, about -ln(vocabulary), may be from that of full logits.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


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
    """Times every way and measures its memory."""
    vocabularies = [1000, 2000] if quick else list(VOCABULARIES)
    if quick:
        width, targets, rounds = 64, 256, 2
    if targets % (2 * SEQUENCE):
        sys.exit(f"--targets {targets} is not a multiple of {2 * SEQUENCE}, a pair of responses")
    store = Cells(cells)
    measured: dict[int, Any] = {}
    for vocabulary in vocabularies:
        sizes = Sizes(vocabulary, width, targets, dtype)
        settings = {"loss head": list(WAYS), "liger": installed("liger_kernel"), **asdict(sizes), "rounds": rounds}
        result = store.measure(settings, partial(_measure, sizes, rounds), always=True)
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
    wrong = {way for ways in measured.values() for way, result in ways.items() if "wrong" in result}
    if wrong:
        print(f"WRONG: {', '.join(sorted(wrong))}")
        sys.exit(WRONG)


def _draw(output: Path, name: str, measured: Mapping[int, Any]) -> None:
    with picture(output, name, columns=2) as (left, right):
        for way in WAYS:
            ran = [v for v in measured if "seconds" in measured[v][way]]
            if not ran:
                continue
            left.plot(ran, [statistics.median(measured[v][way]["seconds"]) for v in ran], "o-", label=way)
            right.plot(ran, [measured[v][way]["extra_bytes"] / 2**30 for v in ran], "o-", label=way)
        left.set_ylabel("seconds, forward and backward")
        right.set_ylabel("memory beyond inputs, GiB")
        for axes in (left, right):
            axes.set_xlabel("vocabulary")
            axes.set_ylim(bottom=0)
            axes.legend()


def _measure(sizes: Sizes, rounds: int) -> dict[str, Any]:
    """Measures seconds and memory of each way; one that fails, is wrong or is not here gets the reason instead.

    Raises:
        RuntimeError: every way failed.
    """
    measured: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work, ExitStack() as workers:
        running = {}
        for way in WAYS:
            worker = Worker(
                ["benchmarks.loss_head_sides", way, *sizes.arguments()],
                Path(work) / f"{way}.log",
                {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
            )
            workers.callback(worker.close)
            try:
                measured[way] = _checked(worker.ask(do="warm"), measured, sizes.dtype)
            except WorkerFailed as error:
                measured[way] = {"failed": str(error)}
            if "logp" in measured[way] and "wrong" not in measured[way]:
                running[way] = worker
            else:
                worker.close()
        if not running:
            raise RuntimeError("; ".join(f"{way}: {_reason(result)}" for way, result in measured.items()))
        turns = {way: partial(_seconds, worker) for way, worker in running.items()}
        for way, seconds in in_turns(turns, rounds).items():
            measured[way]["seconds"] = seconds
    return measured


def _checked(result: dict[str, Any], measured: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Returns a way's answer, with the reason why it is wrong if its mean log-prob is not that of full logits."""
    exact = measured.get(FULL, {}).get("logp")
    if exact is None or "logp" not in result or abs(result["logp"] - exact) <= TOLERANCE[dtype]:
        return result
    return {**result, "wrong": f"WRONG: a mean log-prob of {result['logp']:.6g}, and full logits give {exact:.6g}"}


def _reason(result: Mapping[str, Any]) -> str:
    """Returns why a way was not timed."""
    return next(str(result[key]).partition("\n")[0] for key in ("wrong", "failed", "left out") if key in result)


def _seconds(worker: Worker, _: int) -> float:
    return float(worker.ask()["seconds"])


def _table(by_vocabulary: Mapping[int, Any]) -> Table:
    rows: list[tuple[Any, ...]] = []
    left_out = {}
    for vocabulary, ways in by_vocabulary.items():
        full = ways[FULL].get("seconds")
        for way, measured in ways.items():
            if "left out" in measured:
                left_out[way] = measured["left out"]
                continue
            seconds = measured.get("seconds")
            rows.append(
                (
                    *(vocabulary, way),
                    _reason(measured) if seconds is None else 1e3 * statistics.median(seconds),
                    speed_up(full, seconds) if full and seconds else "",
                    *(gib(measured.get(key)) for key in ("extra_bytes", "temporary_bytes")),
                )
            )
    columns = ("vocabulary", "way", "ms", "speed-up over full", "memory", "temporaries")
    note = (
        "Memory: the most that the process held beyond its inputs (on a GPU, the most that was allocated). "
        "Temporaries: the memory that a compiled program of JAX states beside inputs and results."
    )
    note += "".join(f" Not timed here: {way} ({reason})." for way, reason in left_out.items())
    return Table("Forward and backward", columns, rows, note)


if __name__ == "__main__":
    run(main)
