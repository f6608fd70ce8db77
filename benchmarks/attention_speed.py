"""How fast is attention itself, forward and backward, beside FlexAttention, SDPA, cuDNN and FlashAttention?

Times our backends and PyTorch's on the same rows: one causal sequence, packed pairs with each prompt once and twice,
and one pair with a long prompt. Masks are prepared before, on both sides. Each shape has a process for JAX and one for
PyTorch; each measurement dispatches many calls and waits at the end. `forward` computes the result alone, `backward`
the three gradients from what the forward pass left, `both` goes through the two in one call. The first call, which
compiles, has a time of its own. First each contender is measured on its own, one after another, and after a resume
these figures may come from several calls. Then all that could run `both` take turns in it, in one go; what is said
of our backends beside FlexAttention is the median of the ratios within these rounds.

Operations are counted over the live area, the pairs of a query and a key that it sees: for each head of size D, 4 D a
pair forward and 10 D backward, where the scores are computed a second time. They are compared with a matrix product of
the same side and shape.

Expected on an H100: our kernels reach 60 to 70 % of the matrix product forward and 40 to 48 % backward on long rows;
`pallas` is no slower than FlexAttention in `both` on any layout, and 1.2 times as fast on packed pairs with each prompt
once. Not measured yet.

Takes about two minutes a head size on two CPU cores with `--quick`. On a GPU it has not run yet.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from benchmarks.attention_speed_sides import CONTENDERS, FLEX, LAYOUTS, PASSES, PRODUCT, SIDES, Shape
from benchmarks.cells import CELLS_HELP, Cells, failed, failures_in, first_line
from benchmarks.facts import installed_versions, machine_facts
from benchmarks.lengths import PROFILES
from benchmarks.options import Option, run
from benchmarks.results import Result, Table, percent
from benchmarks.timing import in_turns, speed_up
from benchmarks.workers import RestartedWorker, WorkerFailed

CELL_LIMIT = 120.0  # seconds of a contender, compilation included
ROUNDS = 5
# How many times as fast as FlexAttention `pallas` is to be in `both`: on packed pairs that share prompts; elsewhere.
BOUND_SHARED, BOUND = 1.2, 1.0
# The packages that add contenders: of FlashAttention 2, 3 and 4.
ADDED = ("flash-attn", "flash-attn-3", "flash-attn-4")
QUICK = {"rows": 1, "length": 256, "heads": 4, "kv_heads": 2}
QUICK_SCALE = 16  # the pairs are so many times shorter


def main(
    output: Annotated[Path, Option("Folder for the results.")] = Path("docs/benchmarks"),
    name: Annotated[str, Option("Stem of the files.")] = "attention_speed",
    cells: Annotated[Path | None, Option(CELLS_HELP)] = None,
    width: Annotated[list[int] | None, Option("Features of a head (repeatable). Default: 128 and 64.")] = None,
    layout: Annotated[list[str] | None, Option("Layouts (repeatable). Default: all.", LAYOUTS)] = None,
    profile: Annotated[list[str] | None, Option("Lengths of pairs (repeatable).", list(PROFILES))] = None,
    dtype: Annotated[str, Option("Of all arrays.")] = "bfloat16",
    quick: Annotated[bool, Option("Short rows, to see that it runs.")] = False,
) -> None:
    """Times every contender on every shape."""
    extra: dict[str, Any] = {**QUICK, "scale": QUICK_SCALE} if quick else {}
    store = Cells(cells)
    measured: list[dict[str, Any]] = []
    turns: list[dict[str, Any]] = []
    for features, own_layout, pairs in product(width or (128, 64), layout or LAYOUTS, profile or ("capybara",)):
        shape = Shape(own_layout, features, dtype=dtype, profile=pairs, **extra)
        with tempfile.TemporaryDirectory() as logs, ExitStack() as stack:
            workers = {side: stack.enter_context(_worker(side, shape, Path(logs))) for side in SIDES}
            of_shape = [result for side in SIDES for result in _measure(store, shape, side, workers[side])]
            measured += of_shape
            ours = [m["contender"] for m in of_shape if m["attention"] == "jax" and "passes" in m]
            turns.append({**asdict(shape), "ours": ours, "turns": _take_turns(store, shape, of_shape, workers)})
        for line in _beside_flex(turns[-1]):
            print(*line, sep=", ", flush=True)
    device = next((m["device"] for m in measured if "device" in m), "none that could be used")
    about = f"{dtype}; pairs in the lengths of {', '.join(profile or ['capybara'])}. "
    about += __doc__.split("\n\n")[1].replace("\n", " ")
    tables = [_beside(turns), _speeds(measured), _sides(measured)]
    data = {"cells": measured, "turns": turns}
    Result(name, "Attention alone", about, machine_facts(device), tables, data).write(output)
    unable = [f"{m['attention']}: {m['failed']}" for m in measured if m["contender"] == PRODUCT and failed(m)]
    if unable:
        sys.exit(f"not even a matrix product runs, so nothing is measured: {'; '.join(unable)}")
    if not any("seconds" in data for m in measured if "passes" in m for data in _passes(m).values()):
        sys.exit("no contender could be measured")


def _worker(side: str, shape: Shape, logs: Path) -> RestartedWorker:
    """Returns the process of a side, which is started when a cell is missing."""
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    arguments = ["benchmarks.attention_speed_sides", side, json.dumps(asdict(shape))]
    return RestartedWorker(arguments, logs / side, environment)


def _measure(cells: Cells, shape: Shape, side: str, worker: RestartedWorker) -> list[dict[str, Any]]:
    """Measures all contenders of a side on a shape, each on its own."""
    settings = {"attention": side, **asdict(shape)}
    product_cell = {**settings, "contender": PRODUCT}
    facts = cells.measure(product_cell, partial(worker.ask, CELL_LIMIT, contender=PRODUCT), always=True)
    results = [{**product_cell, **facts}]
    if failed(facts):
        return results
    # Asked anew when a package is installed that adds a contender. No other measurement depends on it.
    listed = {**settings, "contender": CONTENDERS, "packages": installed_versions(ADDED)}
    there = cells.measure(listed, partial(worker.ask, CELL_LIMIT, contender=CONTENDERS), always=True)
    results[0] |= there
    for contender in there.get("contenders", ()):
        own = {**settings, "contender": contender}
        data = cells.measure(own, partial(_ask, worker, contender))
        results.append({**own, "peak": facts["flops_per_second"], "passes": data})
        print(_line(shape, results[-1]), flush=True)
    return results


def _ask(worker: RestartedWorker, contender: str) -> dict[str, Any]:
    """Returns a contender's passes. After a failure the next one gets a new process: a GPU may refuse this one."""
    data = worker.ask(CELL_LIMIT, contender=contender)
    if failures_in(data):
        worker.close()
    return data


def _take_turns(
    cells: Cells, shape: Shape, measured: list[dict[str, Any]], workers: Mapping[str, RestartedWorker]
) -> dict[str, Any]:
    """Returns, for every contender of both sides that could run `both`, its seconds in turns, or why there are none."""
    sides = {
        result["contender"]: result["attention"]
        for result in measured
        if "passes" in result and "seconds" in _passes(result)["both"]
    }

    def run() -> dict[str, Any]:
        reasons: dict[str, Any] = {}

        def window(contender: str, _: int) -> float:
            if contender in reasons:
                return 0.0
            try:
                answer = workers[sides[contender]].ask(CELL_LIMIT, contender=contender, turn=True)
            except WorkerFailed as error:
                answer = {"failed": first_line(error)}
            if failed(answer):
                reasons[contender] = answer
                return 0.0
            return float(answer["seconds"])

        seconds = in_turns({contender: partial(window, contender) for contender in sides}, ROUNDS)
        return {contender: reasons.get(contender, {"seconds": seconds[contender]}) for contender in sides}

    settings = {"attention": "turns", **asdict(shape), "contenders": sides, "rounds": ROUNDS}
    taken: dict[str, Any] = cells.measure(settings, run) if sides else {}
    return taken


def _beside_flex(result: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Returns a row for each of our backends: its time and FlexAttention's, the ratio, and if the bound is met."""
    shape = Shape(**{name: result[name] for name in Shape.__dataclass_fields__})
    turns = result["turns"]
    flex = turns.get(FLEX, {"failed": f"{FLEX} did not run `both`"})
    bound = BOUND_SHARED if shape.layout == "shared" else BOUND
    rows: list[tuple[Any, ...]] = []
    for contender in result["ours"]:
        own = turns.get(contender, {"failed": "did not run `both`"})
        place = shape.width, shape.layout, shape.profile, contender
        if "seconds" not in own or "seconds" not in flex:
            reason = own["failed"] if "failed" in own else flex["failed"]
            rows.append((*place, "", "", reason, bound, "not known"))
            continue
        ratio = speed_up(flex["seconds"], own["seconds"])
        times = (1e3 * statistics.median(seconds) for seconds in (own["seconds"], flex["seconds"]))
        rows.append((*place, *times, ratio, bound, "yes" if ratio >= bound else "no"))
    return rows


def _beside(turns: list[dict[str, Any]]) -> Table:
    rows = [row for result in turns for row in _beside_flex(result)]
    columns = ("head", "layout", "pairs", "backend", "ms", "FlexAttention, ms", "times as fast", "bound", "met")
    note = (
        f"Forward and backward in one call. All contenders of a shape, ours and PyTorch's, took turns in {ROUNDS} "
        "rounds; milliseconds are medians, the ratio is the median of those within a round. The bound is what `pallas` "
        f"is to reach: {BOUND_SHARED} on packed pairs that share their prompts, {BOUND} elsewhere."
    )
    return Table("Beside FlexAttention, in turns", columns, rows, note)


def _line(shape: Shape, result: dict[str, Any]) -> str:
    """Returns a line about a contender's passes."""
    name = f"{shape.name}, {result['contender']}"
    parts = []
    for of_pass, data in _passes(result).items():
        if failed(data):
            parts.append(f"{of_pass} failed: {data['failed']}")
        elif "left out" in data:
            parts.append(f"{of_pass} left out: {data['left out']}")
        else:
            seconds = statistics.median(data["seconds"])
            speed = shape.flops(of_pass) / seconds
            share = percent(speed / result["peak"])
            parts.append(f"{of_pass} {1e3 * seconds:.3g} ms, {speed / 1e12:.3g} TFLOP/s, {share} of a matrix product")
    return f"{name}: {'; '.join(parts)}"


def _passes(result: dict[str, Any]) -> dict[str, Any]:
    """Returns the data of each pass; if the contender failed as a whole, its reason for each."""
    data: dict[str, Any] = result["passes"]
    return dict.fromkeys(PASSES, data) if failed(data) else data


def _speeds(measured: list[dict[str, Any]]) -> Table:
    rows = []
    for result in measured:
        if "passes" not in result:
            continue
        shape = Shape(**{name: result[name] for name in Shape.__dataclass_fields__})
        for of_pass, data in _passes(result).items():
            place = shape.width, shape.layout, shape.profile, result["contender"], of_pass
            if reason := data.get("failed") or data.get("left out"):
                rows.append((*place, reason, *[""] * 4))
                continue
            seconds = statistics.median(data["seconds"])
            spread = f"{1e3 * min(data['seconds']):.3g} to {1e3 * max(data['seconds']):.3g}"
            speed = shape.flops(of_pass) / seconds
            share = percent(speed / result["peak"])
            rows.append((*place, 1e3 * seconds, spread, speed / 1e12, share, data["first_seconds"]))
    columns = (
        *("head", "layout", "pairs", "contender", "pass", "ms", "from, to", "TFLOP/s", "of matrix product"),
        "first call, s",
    )
    note = (
        "Each contender on its own, one after another. Milliseconds are medians of five windows. Operations are those "
        "of the live area, 4 D a pair forward and 10 D backward, whatever a contender computes beyond that. `backward` "
        "starts from what a forward pass left: a jitted function of the residuals in JAX, `autograd.grad` with a "
        "retained graph in PyTorch."
    )
    return Table("Passes, not in turns", columns, rows, note)


def _sides(measured: list[dict[str, Any]]) -> Table:
    rows = []
    for result in measured:
        if "passes" not in result:
            speed = result["failed"] if failed(result) else f"{result['flops_per_second'] / 1e12:.4g} TFLOP/s"
            place = result["width"], result["layout"], result["profile"]
            rows.append((*place, result["attention"], speed, result.get("missing", "")))
    return Table("Each process", ("head", "layout", "pairs", "side", "matrix product", "not here"), rows)


if __name__ == "__main__":
    run(main)
