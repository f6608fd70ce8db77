"""Compares `blockwise` with `dense` attention on a CPU: time and memory by row length.

Rows are packed with pairs as the trainer packs them: shared rows hold prompt, chosen and rejected, separate rows two
whole sequences a pair. Both implementations run forward and backward in turns in one process; the script reports the
median of the ratios of a turn. Every peak memory is measured in a process of its own and leaves out the memory that the
process held before.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.facts import ROOT, machine_facts
from benchmarks.results import Result, Table
from benchmarks.timing import in_turns, seconds_of, speed_up

IMPLEMENTATIONS = ("dense", "blockwise")
HEADS, KV_HEADS, WIDTH = 8, 8, 64
PROMPT, RESPONSE = 0.4, 0.3  # shares of the tokens of a shared pair
# Row length, tokens a pair (shared layout), dtype. The quickstart has rows like the first two.
CASES = ((1024, 250, "float32"), (2048, 250, "float32"), (2048, 250, "bfloat16"), (8192, 700, "float32"))
LENGTHS = (1024, 2048, 4096, 8192, 16384)


def rows(length: int, pair: int, shared: bool) -> tuple[Any, Any]:
    """Returns `key_end` and positions, [1, L], of one row packed with equal pairs.

    `pair` is the tokens of a pair whose prompt is shared; the separate layout has the prompt twice.
    """
    import numpy as np

    prompt, response = int(PROMPT * pair), int(RESPONSE * pair)
    key_end, positions = np.zeros((1, length), np.int32), np.zeros((1, length), np.int32)
    # Runs of (first position, tokens, True if the rest of the pair attends to them).
    runs = [(0, prompt, True), (prompt, response, False), (prompt, response, False)] if shared else []
    runs = runs or [(0, prompt + response, False)] * 2
    pair_tokens = sum(count for _, count, _ in runs)
    for pair_start in range(0, length - pair_tokens + 1, pair_tokens):
        start = pair_start
        for first, count, open_end in runs:
            key_end[0, start : start + count] = pair_start + pair_tokens if open_end else start + count
            positions[0, start : start + count] = first + np.arange(count)
            start += count
    return key_end, positions


def passes(length: int, pair: int, shared: bool, dtype: str, implementation: str) -> Any:
    """Returns a function that runs a forward and backward pass."""
    import jax
    import jax.numpy as jnp

    from jax_simpo.ops.attention import attention, prepare_mask

    key_end, positions = (jnp.asarray(x) for x in rows(length, pair, shared))
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, dout = (
        jax.random.normal(key, (1, length, heads, WIDTH), dtype)
        for key, heads in zip(keys, (HEADS, KV_HEADS, KV_HEADS, HEADS), strict=True)
    )

    @jax.jit
    def forward_and_backward(q: Any, k: Any, v: Any, dout: Any, mask: Any) -> Any:
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, mask, scale=WIDTH**-0.5), q, k, v)
        return out, pull(dout)

    mask = jax.jit(lambda a, b: prepare_mask(a, b, backend=implementation))(key_end, positions)
    return lambda: jax.block_until_ready(forward_and_backward(q, k, v, dout, mask))


def compare(length: int, pair: int, dtype: str, rounds: int) -> list[dict[str, Any]]:
    """Times both implementations in turns, on shared and on separate rows."""
    entries = []
    for shared in (True, False):
        runs = {name: passes(length, pair, shared, dtype, name) for name in IMPLEMENTATIONS}
        for run in runs.values():
            run()  # compiles
        seconds = in_turns({name: partial(_seconds, run) for name, run in runs.items()}, rounds)
        entries.append(
            {
                "length": length,
                "pair": pair,
                "dtype": dtype,
                "layout": "shared" if shared else "separate",
                "seconds": seconds,
                "speed_up": speed_up(seconds["dense"], seconds["blockwise"]),
            }
        )
    return entries


def _seconds(run: Callable[[], object], _: int) -> float:
    return seconds_of(run)


def peak_of(length: int, implementation: str) -> float:
    """Returns the MiB that a pass in a fresh process takes beyond the memory it held before."""
    command = [sys.executable, "-m", "benchmarks.attention_cpu", "--peak", implementation, "--length", str(length)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def report_peak(length: int, implementation: str) -> None:
    """Prints the peak; runs in the process that `peak_of` starts."""
    from benchmarks.facts import forget_peak, peak_resident_bytes

    run = passes(length, 700, True, "float32", implementation)
    run()  # compiles, which is not measured
    gc.collect()
    forget_peak()
    before = peak_resident_bytes()
    run()
    print(json.dumps((peak_resident_bytes() - before) / 2**20))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "docs/benchmarks")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="tiny rows, to see that it runs")
    parser.add_argument("--peak", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        return report_peak(options.length, options.peak)
    import jax

    cases, lengths = (((256, 60, "float32"),), (256, 512)) if options.quick else (CASES, LENGTHS)
    times = [entry for case in cases for entry in compare(*case, options.rounds)]
    # No dense attention where its scores alone would take more than 4 GiB.
    peaks = {
        name: {n: peak_of(n, name) for n in lengths if name != "dense" or 4 * HEADS * n * n <= 2**32}
        for name in IMPLEMENTATIONS
    }
    median = statistics.median
    table = Table(
        "Forward and backward pass of one row",
        ("row", "pair", "dtype", "layout", "dense ms", "blockwise ms", "dense / blockwise"),
        [
            (
                *(t[key] for key in ("length", "pair", "dtype", "layout")),
                *(1e3 * median(t["seconds"][name]) for name in IMPLEMENTATIONS),
                t["speed_up"],
            )
            for t in times
        ],
        "Milliseconds are medians; the last column is the median of the ratios of a turn.",
    )
    memory = Table(
        "Peak memory of a forward and backward pass, MiB",
        ("row", *IMPLEMENTATIONS),
        [(n, *(peaks[name].get(n, "-") for name in IMPLEMENTATIONS)) for n in lengths],
        "In a process each, beyond the memory it held before: float32, shared pairs of 700 tokens, without inputs.",
    )
    Result(
        name="attention-cpu",
        title="Attention on a CPU: blockwise and dense",
        about=f"{__doc__}\n{HEADS} heads, {KV_HEADS} key/value heads, {WIDTH} features each; of a pair's tokens "
        f"{PROMPT:.0%} are prompt and {RESPONSE:.0%} each response.",
        facts=machine_facts(jax.devices()[0].device_kind),
        tables=[table, memory],
        data={"times": times, "peak_mib": peaks},
    ).write(options.output)


if __name__ == "__main__":
    main()
