"""In which parts of a layer does prefix sharing pay, and which attention kernel is fastest under its mask?

Repeats Figures 3 to 5 of the prefix-sharing paper: forward and backward of the MLP, of attention alone and of a layer's
whole attention part, for one pair as two sequences and with its prefix computed once; prefixes of 128 to 16k tokens,
several response lengths, Mistral-7B's shapes. Speed-ups stand beside the ideals 2(p+c)/(p+2c) (linear parts) and
2(p+c)²/(p²+4pc+2c²) (attention). The script times all our implementations, and PyTorch's FlexAttention, SDPA and
flash-attn where they run. JAX and PyTorch run in processes of their own, a cell at a time in turns.

Expected: near the ideal from a prefix of some 1000 tokens on. With shorter prefixes the blocks of 128 that are partly
masked cost as much as whole ones.

Takes about 21 minutes on two CPU cores with `--model small --dtype float32 --response 128 --response 512 --rounds 3` (5
with prefixes up to 2048; `--quick`: one minute). On a GPU it has not run yet.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from benchmarks.cells import CELLS_HELP, Cells, failed, first_line
from benchmarks.facts import machine_facts
from benchmarks.flops import attention_ideal, attention_layer_ideal, linear_ideal, part_flops
from benchmarks.models import model_mapping
from benchmarks.options import Option, run
from benchmarks.results import Result, Table, can_draw, percent, picture
from benchmarks.timing import speed_up
from benchmarks.workers import RestartedWorker, WorkerFailed
from jax_simpo.hf.config import read_model_config
from jax_simpo.models.config import ModelConfig

Ideal = Callable[[str, int, int], float]  # part, prefix length, response length -> ideal speed-up
PARTS = ("mlp", "attention", "attention layer")
# Seconds of a run, compilation included. On a CPU long prefixes take minutes. On a GPU a run that hangs must not take
# the time of the others.
CPU_LIMIT, GPU_LIMIT = 1800.0, 90.0
FACTS_LIMIT = 120.0
_ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def main(
    output: Annotated[Path, Option("Folder for the results.")] = Path("docs/benchmarks"),
    model: Annotated[str, Option("Whose shapes, one of benchmarks/models.py.")] = "mistral-7b",
    dtype: Annotated[str, Option("Compute dtype.")] = "bfloat16",
    prefix: Annotated[list[int] | None, Option("Prefix lengths (repeatable).")] = None,
    response: Annotated[list[int] | None, Option("Response lengths (repeatable).")] = None,
    implementation: Annotated[
        list[str] | None, Option("Our attention implementations (repeatable). Default: all that run here.")
    ] = None,
    rounds: Annotated[int, Option("Runs of each, after one that compiles.")] = 5,
    name: Annotated[str, Option("Stem of the files.")] = "layers",
    cells: Annotated[Path | None, Option(CELLS_HELP)] = None,
    quick: Annotated[bool, Option("Tiny shapes and short prefixes, to see that it runs.")] = False,
) -> None:
    """Times each part in every cell."""
    prefixes, responses = prefix or [128, 512, 2048, 8192, 16384], response or [128, 512, 2048]
    if quick:
        model, dtype, prefixes, responses, rounds = "tiny", "float32", [128, 256], [128], 2
    store = Cells(cells)
    measured: list[dict[str, Any]] = []
    reasons: dict[str, str] = {}
    base = {"layers": model, "dtype": dtype}
    with tempfile.TemporaryDirectory() as logs, ExitStack() as workers:
        sides = {
            side: workers.enter_context(
                RestartedWorker(
                    ["benchmarks.layers_sides", side, model, dtype], Path(logs) / f"{side}.log", _ENVIRONMENT
                )
            )
            for side in ("jax", "torch")
        }
        facts = store.measure({**base, "do": "facts"}, partial(sides["jax"].ask, FACTS_LIMIT, do="facts"), always=True)
        if failed(facts):
            sys.exit(f"the side of JAX cannot run: {facts.get('details', facts['failed'])}")
        limit = GPU_LIMIT if facts["device"].startswith("gpu") else CPU_LIMIT
        ask = {"implementations": implementation or facts["implementations"], "rounds": rounds}
        for p in prefixes:
            for c in responses:
                times: dict[str, Any] = {}
                for side, worker in sides.items():
                    request = {"do": "time", "prefix": p, "response": c, **ask}
                    data = store.measure({**base, "side": side, **request}, partial(_ask, worker, limit, request))
                    if failed(data):
                        reasons[f"{side}, prefix {p}, response {c}"] = data["failed"]
                    else:
                        times |= data
                measured.append({"prefix": p, "response": c, "times": times})
                print(f"prefix {p}, response {c}: {_summary(times)}", flush=True)
    if not any("seconds" in timing for cell in measured for timing in cell["times"].values()):
        sys.exit(f"nothing could be measured: {reasons}")
    shapes = model_mapping(model, 1)
    config = read_model_config(shapes)
    ideal = partial(_ideal, config)
    peak = facts["matmul_flops_per_second"]
    about = (
        f"{model}: hidden {shapes['hidden_size']}, {shapes['num_attention_heads']} heads, "
        f"{shapes['num_key_value_heads']} key/value heads of {shapes['head_dim']}, feed-forward "
        f"{shapes['intermediate_size']}; {dtype}, forward and backward, one pair, medians of {rounds} rounds in turns. "
        f"Masks are prepared before. Matrix products reach {peak / 1e12:.3g} TFLOP/s. What takes turns are the "
        "implementations of a side in a cell; cells, and the two sides of one, may come from several calls."
    )
    tables = [_speed_ups(measured, ideal), _times(measured), _shares(measured, config, peak)]
    if reasons:
        tables.append(Table("Could not run", ("what", "why"), list(reasons.items())))
    pictures = [f"{name}.png"] if can_draw() else []
    for picture_name in pictures:
        _draw(output, picture_name, measured, ideal)
    Result(
        *(name, "A layer's parts", about, machine_facts(facts["device"]), tables),
        {"cells": measured, "failed": reasons, "matmul_flops_per_second": peak},
        pictures,
    ).write(output)


def _ask(worker: RestartedWorker, limit: float, request: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a side's timings of a cell.

    A run that raises, hangs or ends its process gets the reason, and a new process times the others.

    Raises:
        RuntimeError: every run failed, or the process did before it began one.
    """
    reasons: dict[str, Any] = {}
    while True:
        try:
            answer = worker.ask(limit, **request, without=list(reasons))
        except WorkerFailed as error:
            if error.doing is None or error.doing in reasons:
                raise
            answer = {"run": error.doing, "failed": first_line(error)}
        if not failed(answer):
            break
        reasons[answer["run"]] = {"failed": answer["failed"]}
        print(f"{answer['run']}: {answer['failed']}", flush=True)
    if reasons and not answer:
        raise RuntimeError("; ".join(f"{name}: {reason['failed']}" for name, reason in reasons.items()))
    return {**reasons, **answer}


def _summary(times: Mapping[str, Any]) -> str:
    """Returns a line about a cell: the milliseconds of everything that ran."""
    return ", ".join(
        f"{label} {1e3 * statistics.median(timing['seconds']):.3g} ms" if "seconds" in timing else f"{label} failed"
        for label, timing in times.items()
    )


def _pairs_of(cell: Mapping[str, Any]) -> dict[tuple[str, str], tuple[list[float], list[float]]]:
    """Returns (part, implementation) -> seconds separate and shared, for those that ran both."""
    times = {tuple(label.split("/")): timing.get("seconds") for label, timing in cell["times"].items()}
    pairs = {}
    for part, implementation, layout in times:
        separate, shared = (times.get((part, implementation, which)) for which in ("separate", "shared"))
        if layout == "shared" and separate and shared:
            pairs[part, implementation] = separate, shared
    return pairs


def _ideal(config: ModelConfig, part: str, prefix: int, response: int) -> float:
    if part == "attention layer":
        return attention_layer_ideal(config, prefix, response)
    return {"mlp": linear_ideal, "attention": attention_ideal}[part](prefix, response)


def _speed_ups(cells: list[dict[str, Any]], ideal_of: Ideal) -> Table:
    rows = []
    for cell in cells:
        p, c = cell["prefix"], cell["response"]
        for (part, implementation), (separate, shared) in sorted(_pairs_of(cell).items()):
            ideal = ideal_of(part, p, c)
            measured = speed_up(separate, shared)
            rows.append((p, c, part, implementation, ideal, measured, f"{100 * measured / ideal:.0f} %"))
    columns = ("prefix", "response", "part", "implementation", "ideal", "measured", "of ideal")
    note = (
        "The ideal of the attention layer (attention with its projections) is that of its floating-point operations. "
        "One pair a row; as separate sequences they stand one after the other in it."
    )
    return Table("What sharing gains", columns, rows, note)


def _times(cells: list[dict[str, Any]]) -> Table:
    """Makes a table of the milliseconds of attention alone."""
    names = sorted({tuple(label.split("/")[1:]) for cell in cells for label in cell["times"] if "attention/" in label})
    rows = []
    for cell in cells:
        times = [cell["times"].get("/".join(("attention", *name)), {}) for name in names]
        values = [1e3 * statistics.median(t["seconds"]) if "seconds" in t else "failed" if t else "" for t in times]
        rows.append((cell["prefix"], cell["response"], *values))
    columns = ("prefix", "response", *(", ".join(name) for name in names))
    note = "Milliseconds. SDPA and flash-attn are given the separate pair as a batch of two, their best case."
    return Table("Attention alone, forward and backward", columns, rows, note)


def _shares(cells: list[dict[str, Any]], config: ModelConfig, peak: float) -> Table:
    """Makes a table of useful operations a second beside the matrix product's."""
    rows = []
    for cell in cells:
        p, c = cell["prefix"], cell["response"]
        for label, timing in sorted(cell["times"].items()):
            part, implementation, layout = label.split("/")
            if "seconds" in timing:
                speed = part_flops(config, part, p, c, layout == "shared") / statistics.median(timing["seconds"])
                rows.append((p, c, part, implementation, layout, speed / 1e12, percent(speed / peak)))
    columns = ("prefix", "response", "part", "implementation", "layout", "TFLOP/s", "of matrix product")
    note = "Useful operations: three times those of the forward pass, of tokens and visible pairs in the layout."
    return Table("Share of the matrix product", columns, rows, note)


def _draw(output: Path, name: str, cells: list[dict[str, Any]], ideal_of: Ideal) -> None:
    responses = sorted({cell["response"] for cell in cells})
    with picture(output, name, columns=len(PARTS)) as axes:
        for part, ax in zip(PARTS, axes, strict=True):
            for number, c in enumerate(responses):
                column = [cell for cell in cells if cell["response"] == c]
                ax.plot([x["prefix"] for x in column], [ideal_of(part, x["prefix"], c) for x in column], f"C{number}:")
                best = {}
                for cell in column:
                    speed_ups = [(sum(s[1]), speed_up(*s)) for (p, _), s in _pairs_of(cell).items() if p == part]
                    if speed_ups:
                        best[cell["prefix"]] = min(speed_ups)[1]  # of the implementation that is fastest when shared
                ax.plot(list(best), list(best.values()), f"C{number}o-", label=f"responses of {c}")
            ax.set_title(part)
            ax.set_xscale("log", base=2)
            ax.set_xlabel("prefix, tokens (dotted: ideal)")
        axes[0].set_ylabel("speed-up of sharing")
        axes[0].legend()


if __name__ == "__main__":
    run(main)
