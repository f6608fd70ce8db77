"""Does a loss head that never holds the logits of all targets save time and memory?

Times forward and backward of the loss head and the SimPO loss alone, over vocabularies of 32k to 256k: `target_logps`,
which computes the logits in tiles, twice or (`keep_bytes`) once, and on a GPU or TPU with its kernels; full float32
logits under autodiff, as in most trainers; and Liger's SimPO loss, and on a GPU its cross-entropy, if liger-kernel is
installed. All get the same numbers. First each way runs by itself, in a process of its own: what it computes, values
and both gradients, is compared with full logits, and its memory is measured. A way that computes something else has no
time. Then the right ways take turns, as many as fit the device together: processes give no memory back. If not all fit,
there are several groups, each with the tiles in it.

Expected: the temporaries of the tiled head do not grow with targets x vocabulary, while those of full logits do,
several times over. The tiled head is no slower, though it computes the logits twice, and no slower than Liger's.

Takes about half a minute on two CPU cores with `--quick`. The whole has not been timed since Liger and the checks of
gradients joined. On a GPU it has not run yet.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from benchmarks.cells import CELLS_HELP, WRONG, Cells, failed, first_line
from benchmarks.facts import has_gpu, installed_versions, machine_facts
from benchmarks.loss_head_sides import COMPILED_HERE, FULL, SEQUENCE, TILES, WAYS, Numbers, Sizes
from benchmarks.options import Option, run
from benchmarks.results import Result, Table, can_draw, gib, picture
from benchmarks.timing import in_turns, speed_up
from benchmarks.workers import Worker, WorkerFailed

VOCABULARIES = (32000, 64000, 128256, 256000)
GPU_LIMIT, CPU_LIMIT = 120.0, 1800.0  # seconds of an answer, compilation included
CONTEXT = 2**30  # bytes that a process takes of a GPU beside what its framework counts
SHARE = 0.9  # of the device's memory that processes may take together


def main(
    output: Annotated[Path, Option("Folder for the results.")] = Path("docs/benchmarks"),
    width: Annotated[int, Option("Of the hidden states.")] = 512,
    targets: Annotated[int, Option("Targets a micro-batch.")] = 2048,
    dtype: Annotated[str, Option("Compute dtype.")] = "float32",
    rounds: Annotated[int, Option("Runs of each, in turns.")] = 5,
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
    measured: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as work:
        start = partial(_start, Path(work))
        for vocabulary in vocabularies:
            measured[vocabulary] = _measure(store, start, Sizes(vocabulary, width, targets, dtype), rounds)
    devices = [a["device"] for ways in measured.values() for a in ways.values() if "device" in a]
    if not devices:
        sys.exit(f"nothing could be measured: {measured}")
    about = (
        f"{targets} targets of width {width}, {dtype}; medians of {rounds} rounds in turns. Forward and backward of "
        "the head with the SimPO loss of pairs of responses; Liger's cross-entropy has no such loss and computes its "
        "own."
    )
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
            known = [v for v in ran if "extra_bytes" in measured[v][way]]
            right.plot(known, [measured[v][way]["extra_bytes"] / 2**30 for v in known], "o-", label=way)
        left.set_ylabel("seconds, forward and backward")
        right.set_ylabel("memory beyond inputs, GiB")
        for axes in (left, right):
            axes.set_xlabel("vocabulary")
            axes.set_ylim(bottom=0)
            axes.legend()


Start = Callable[[str, Sizes], Worker]


def _start(work: Path, way: str, sizes: Sizes) -> Worker:
    """Starts the process of a way. Compiled programs are kept, so that the next process finds them."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(work / "jax"))
    kept = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **kept}
    return Worker(["benchmarks.loss_head_sides", way, *sizes.arguments()], work / f"{way}.log", environment)


def _limit() -> float:
    return GPU_LIMIT if has_gpu() else CPU_LIMIT


def _measure(store: Cells, start: Start, sizes: Sizes, rounds: int) -> dict[str, Any]:
    """Measures each way, alone and in turns; one that fails, is wrong or is not here gets the reason instead."""
    liger = installed_versions(("liger-kernel",))
    measured: dict[str, Any] = {}
    for way in WAYS:
        own = {"loss head": way, **asdict(sizes), **({"liger": liger} if way.startswith("Liger") else {})}
        alone = store.measure(own, partial(_alone, start, way, sizes))
        measured[way] = checked(alone, measured.get(FULL, {}), sizes.dtype)
        print(f"{sizes.vocabulary}, {way}: {_reason(measured[way]) or 'right'}", flush=True)
    needs = {way: result["need_bytes"] + CONTEXT for way, result in measured.items() if _reason(result) is None}
    room = SHARE * max((measured[way]["device_bytes"] for way in needs), default=0)
    for group in groups(needs, room):
        settings = {"loss head": "turns", "ways": group, **asdict(sizes), "rounds": rounds, "liger": liger}
        turns = store.measure(settings, partial(_turns, start, group, sizes, rounds))
        for way in group:
            result = turns if failed(turns) else turns[way]
            if "seconds" not in measured[way]:  # the tiles keep those of the first group
                measured[way] |= result
            if "seconds" in result and "seconds" in turns.get(group[0], {}):
                measured[way] |= {"beside": group[0], "times": speed_up(result["seconds"], turns[group[0]]["seconds"])}
        print(f"{sizes.vocabulary}, in turns: {turns}", flush=True)
    return measured


def _alone(start: Start, way: str, sizes: Sizes) -> dict[str, Any]:
    """Returns what a way computes and its memory, while no other way has a process.

    Raises:
        WorkerFailed: it failed.
    """
    with start(way, sizes) as worker:
        answer = worker.ask(_limit(), do="check")
        if "left out" in answer:
            return answer
        memory = worker.ask(_limit(), do="memory")
    if memory == COMPILED_HERE:  # the next process finds the program
        with start(way, sizes) as worker:
            memory = worker.ask(_limit(), do="memory")
    if memory == COMPILED_HERE:
        memory = {"memory unknown": "jax kept no compiled program"}
    return {**answer, **memory}


def groups(needs: Mapping[str, float], room: float) -> list[list[str]]:
    """Returns which ways take turns with one another: as many as fit together, and the tiles in every group.

    Args:
        needs: the bytes that each way's process takes.
        room: the bytes there are. A way that does not fit beside the tiles has a group of its own.
    """
    if not needs:
        return []
    first = TILES if TILES in needs else next(iter(needs))
    made: list[list[str]] = []
    alone = [[way] for way in needs if way != first and needs[first] + needs[way] > room]
    for way in sorted(needs, key=lambda way: needs[way]):
        if way == first or [way] in alone:
            continue
        if not made or sum(needs[other] for other in made[-1]) + needs[way] > room:
            made.append([first])
        made[-1].append(way)
    return [*(made or [[first]]), *alone]


def _turns(start: Start, group: Sequence[str], sizes: Sizes, rounds: int) -> dict[str, Any]:
    """Returns the seconds of each way of a group, in turns; one that fails gets the reason, and the others go on."""
    reasons: dict[str, Any] = {}
    with ExitStack() as workers:
        running = {way: workers.enter_context(start(way, sizes)) for way in group}

        def seconds(way: str, _: int) -> float:
            if way in reasons:
                return 0.0
            try:
                return float(running[way].ask(_limit(), do="time")["seconds"])
            except WorkerFailed as error:
                reasons[way] = {"failed": first_line(error)}
                return 0.0

        times = in_turns({way: partial(seconds, way) for way in group}, rounds)
    return {way: reasons.get(way, {"seconds": times[way]}) for way in group}


def checked(result: Mapping[str, Any], full: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Returns a way's result with what is wrong with it, if it did not compute what full logits do.

    Args:
        result: of the way.
        full: of full logits; empty for these themselves.
        dtype: the compute dtype.
    """
    wrong = []
    for function, numbers in result.get("numbers", {}).items():
        # Full logits are compared with themselves: then NaN alone is wrong.
        exact = full.get("numbers", result["numbers"] if not full else {}).get(function)
        if exact is None:
            return {**result, "failed": f"cannot be compared: full logits {_reason(full)}"}
        wrong += Numbers(**numbers).faults(Numbers(**exact), dtype)
    return {**result, **({"wrong": f"WRONG: {'; '.join(wrong)}"} if wrong else {})}


def _reason(result: Mapping[str, Any]) -> str | None:
    """Returns why a way was not timed, or None if nothing is known against it."""
    return next((str(result[key]).partition("\n")[0] for key in ("wrong", "failed", "left out") if key in result), None)


def _table(by_vocabulary: Mapping[int, Any]) -> Table:
    rows: list[tuple[Any, ...]] = []
    left_out = {}
    for vocabulary, ways in by_vocabulary.items():
        for way, measured in ways.items():
            if "left out" in measured:
                left_out[way] = measured["left out"]
                continue
            seconds = measured.get("seconds")
            rows.append(
                (
                    *(vocabulary, way),
                    _reason(measured) if seconds is None else 1e3 * statistics.median(seconds),
                    f"{measured['times']:.3g} of {measured['beside']}" if "times" in measured else "",
                    *(gib(measured.get(key)) for key in ("extra_bytes", "temporary_bytes")),
                )
            )
    columns = ("vocabulary", "way", "ms", "times as long", "memory", "temporaries")
    note = (
        "Times as long: the median of the ratios within the rounds in which both took turns. Memory: the most that a "
        "call held beyond its inputs, gradients included, in a process that has compiled nothing since the peak was "
        "counted (on a GPU, the most that was allocated). Temporaries: the memory that a compiled program of JAX "
        "states beside inputs and results."
    )
    note += "".join(f" Not timed here: {way} ({reason})." for way, reason in left_out.items())
    return Table("Forward and backward", columns, rows, note)


if __name__ == "__main__":
    run(main)
