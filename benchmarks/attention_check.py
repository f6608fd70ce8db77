"""Do our attention backends compute on this device what they should, values and gradients?

Compares every backend that runs here with `dense` in float32, on the same inputs, rounded to the backend's dtype: two
rows of packed pairs with shared prompts and padding, grouped heads, standard normal numbers. The distance is the root
of the mean squared difference. That of `dense` in bfloat16 stands beside it and shows what rounding alone costs. Every
result is printed as soon as it is there, and the exit status is 3 if one failed.

Expected: in bfloat16 at most 1.5 times the distance of `dense`, and at most 2e-3; in float32 at most a thirtieth of the
distance of `dense` in bfloat16. `blockwise` on a CPU has 3.3e-4 to 7.8e-4, 0.86 to 1.08 times that of `dense`.

Takes about three and a half minutes on two CPU cores busy with other work (`--quick`: the same). On a GPU it has not
run yet.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from benchmarks.cells import CELLS_HELP, WRONG, Cells, failed
from benchmarks.facts import machine_facts
from benchmarks.options import Option, run
from benchmarks.results import Result, Table
from benchmarks.workers import Requests, RestartedWorker

# Two rows of pairs: lengths of prompt, chosen and rejected. The length of a row is no multiple of a block.
PAIRS = [[(130, 70, 90), (20, 200, 1), (5, 100, 256)], [(500, 250, 250)]]
LENGTH, HEADS, KV_HEADS = 1000, 8, 2
WINDOWS, SOFTCAPS = (None, 100), (None, 5.0)
MOST = 2e-3  # the most distance in bfloat16
OVER_DENSE = {"bfloat16": 1.5, "float32": 1 / 30}  # the most distance, in those of dense in bfloat16
CASE_LIMIT = 90.0  # seconds; a kernel that hangs must not take the time of the others
ARRAYS = ("out", "dq", "dk", "dv")


class Case(NamedTuple):
    """The static settings of an attention kernel."""

    dtype: str
    width: int
    window: int | None = None
    softcap: float | None = None


def cases(first: bool | None) -> list[Case]:
    """Returns the cases: the ones that matter most first (bfloat16 without window and cap), the others, or all."""
    from jax_simpo.ops.attention.pallas.backend import HEAD_SIZES

    most_used = [Case("bfloat16", 128), Case("bfloat16", 64)]
    variants = list(product(WINDOWS, SOFTCAPS))
    every = [Case(dtype, width, *v) for dtype, widths in HEAD_SIZES.items() for width in widths for v in variants]
    others = [case for case in every if case not in most_used]
    return [*([] if first is False else most_used), *([] if first is True else others)]


def main(
    output: Annotated[Path, Option("Folder for the results.")] = Path("docs/benchmarks"),
    name: Annotated[str, Option("Stem of the files.")] = "attention_check",
    cells: Annotated[Path | None, Option(CELLS_HELP)] = None,
    first: Annotated[bool | None, Option("Only the cases that matter most, or only the others.")] = None,
    quick: Annotated[bool, Option("Changes nothing: every case is small.")] = False,
) -> None:
    """Checks every backend in every case."""
    store = Cells(cells)
    measured: list[dict[str, Any]] = []
    device = "unknown"
    arguments, environment = ["benchmarks.attention_check", "--worker"], {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with tempfile.TemporaryDirectory() as logs, RestartedWorker(arguments, Path(logs) / "log", environment) as worker:

        def ask(case: Case, backend: str) -> dict[str, Any]:
            return worker.ask(CASE_LIMIT, case=list(case), backend=backend)

        for case in cases(first):
            known = store.measure({"check": "backends", **case._asdict()}, partial(ask, case, "backends"), always=True)
            for backend in known.get("backends", ()):
                device = known["device"]
                settings = {"check": backend, **case._asdict()}
                data = store.measure(settings, partial(ask, case, backend))
                measured.append({**settings, **(data if failed(data) else {"distances": data})})
                print(verdict(measured[-1]), flush=True)
            if failed(known):
                measured.append({"check": "backends", **case._asdict(), **known})
    rows = [_row(result) for result in measured]
    columns = ("backend", "dtype", "head", "window", "cap", *ARRAYS, "of dense in bfloat16", "")
    note = (
        "Roots of mean squared differences to `dense` in float32. The last but one column is the largest ratio to the "
        "distance of `dense` in bfloat16."
    )
    about = f"Two rows of {LENGTH} tokens, {HEADS} query heads, {KV_HEADS} key/value heads, standard normal inputs."
    tables = [Table("Distances from dense in float32", columns, rows, note)]
    Result(name, "Attention, checked", about, machine_facts(device), tables, measured).write(output)
    wrong = [result for result in measured if faults(result)]
    if not measured:
        sys.exit("no backend can run here")
    if wrong:
        print(f"{len(wrong)} of {len(measured)} cases failed, the first: {verdict(wrong[0])}", flush=True)
        sys.exit(WRONG)


def faults(result: dict[str, Any]) -> list[str]:
    """Returns what is wrong with a result, array by array; none if it is as near to the exact numbers as it should."""
    if failed(result):
        return [result["failed"]]
    wrong = []
    for name, (ours, dense) in result["distances"].items():
        bound = OVER_DENSE[result["dtype"]] * dense
        if result["dtype"] == "bfloat16":
            bound = min(bound, MOST)
        if not ours <= bound:  # NaN is no distance
            wrong.append(f"{name} is {ours:.2g} away, at most {bound:.2g} is allowed")
    return wrong


def verdict(result: dict[str, Any]) -> str:
    """Returns a line about a result."""
    name = ", ".join(f"{key} {result[key]}" for key in ("check", "dtype", "width", "window", "softcap"))
    if wrong := faults(result):
        return f"FAILED: {name}: {'; '.join(wrong)}"
    pairs = (f"{key} {ours:.2g} (dense {dense:.2g})" for key, (ours, dense) in result["distances"].items())
    return f"ok: {name}: {', '.join(pairs)}"


def _row(result: dict[str, Any]) -> tuple[Any, ...]:
    settings = [str(result[key]) for key in ("check", "dtype", "width", "window", "softcap")]
    state = "; ".join(faults(result)) or "ok"
    if failed(result):
        return (*settings, *[""] * len(ARRAYS), "", state)
    distances = result["distances"]
    ratio = max(ours / dense for ours, dense in distances.values())
    return (*settings, *(f"{distances[name][0]:.2g}" for name in ARRAYS), ratio, state)


def _serve() -> None:
    requests = Requests()

    from benchmarks.layers_sides import RUNS_ON
    from benchmarks.steps import device_name
    from jax_simpo.ops.attention import place_of

    def handle(request: dict[str, Any]) -> dict[str, Any]:
        case = Case(*request["case"])
        if request["backend"] == "backends":
            candidates = [name for name in RUNS_ON[place_of().platform] if name != "dense"]
            return {"device": device_name(), "backends": [name for name in candidates if _runs(name, case)]}
        return distances(case, request["backend"])

    requests.serve(handle, keep_on=True)


def _runs(backend: str, case: Case) -> bool:
    from jax_simpo.errors import ConfigError
    from jax_simpo.ops.attention import choose, place_of

    try:
        choose(backend, place_of(dtype=case.dtype, head_dim=case.width, softcap=case.softcap))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return False
    return True


def distances(case: Case, backend: str) -> dict[str, Any]:
    """Returns of each array the distance of a backend and that of `dense` in bfloat16 from `dense` in float32."""
    import jax
    import numpy as np

    from benchmarks.masks import fill_row, prepared
    from jax_simpo.ops.attention import attention

    key_end, positions = (np.stack(a) for a in zip(*(fill_row(p, LENGTH) for p in PAIRS), strict=True))
    shapes = [(len(PAIRS), LENGTH, heads, case.width) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    keys = jax.random.split(jax.random.key(case.width), len(shapes))
    inputs = [jax.random.normal(key, shape).astype(case.dtype) for key, shape in zip(keys, shapes, strict=True)]

    def run(backend: str, dtype: str) -> list[Any]:
        mask = prepared(key_end, positions, backend, case.window)

        def attend(q: Any, k: Any, v: Any) -> Any:
            return attention(q, k, v, mask, scale=case.width**-0.5, window=case.window, softcap=case.softcap)

        @jax.jit
        def forward_and_backward(q: Any, k: Any, v: Any, dout: Any) -> Any:
            out, pull = jax.vjp(attend, q, k, v)
            return out, *pull(dout)

        return [np.asarray(a, np.float64) for a in forward_and_backward(*(a.astype(dtype) for a in inputs))]

    exact, rounded, ours = run("dense", "float32"), run("dense", "bfloat16"), run(backend, case.dtype)
    return {
        name: [float(np.sqrt(np.mean((a - oracle) ** 2))) for a in (mine, dense)]
        for name, oracle, dense, mine in zip(ARRAYS, exact, rounded, ours, strict=True)
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        _serve()
    else:
        run(main)
