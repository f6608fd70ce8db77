"""How many steps do the attention kernels walk, and how long would a GPU wait for the last tile?

Counts, on packed rows of shared pairs, the steps of the backward kernels over lists of whole and of half blocks, and
lays the tiles of the forward and of the dK/dV kernel on an H100's 132 multiprocessors in the order in which they are
launched: the next tile goes to the multiprocessor that is free first. A tile costs its steps and two more for its start
and end. Nothing runs on a GPU: the table shows how well the orders balance, not how fast they are, and it knows nothing
of the cache.

Expected: lists of half blocks save most where pairs are short; heavy tiles first leave multiprocessors idle for less
than the order of the row.

Takes about half a minute on two CPU cores.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from jaxtyping import Int

from benchmarks.facts import machine_facts
from benchmarks.lengths import PROFILES, profile_pairs
from benchmarks.options import Option, run
from benchmarks.results import Result, Table, percent

MULTIPROCESSORS, START_STEPS = 132, 2
HEADS, KV_HEADS = 32, 8  # of an 8B model
PAIRS = 128  # of a step
KERNELS = ("forward", "dK/dV")
ORDERS = ("as in the row", "heavy first")


def main(
    output: Annotated[Path, Option("Folder for the results.")] = Path("docs/benchmarks"),
    row_length: Annotated[int, Option("Tokens of a row.")] = 8192,
    rows: Annotated[int, Option("Rows that a device computes at once.")] = 1,
    quick: Annotated[bool, Option("One profile, to see that it works.")] = False,
) -> None:
    """Counts and simulates, and writes the tables."""
    data = []
    for name in list(PROFILES)[: 1 if quick else None]:
        key_end, positions = packed_rows(name, row_length)
        data.append({"profile": name, **measure(key_end[:rows], positions[:rows])})
        print(f"measured {name}", flush=True)
    Result(
        name="kernel_schedule",
        title="Steps and order of the attention kernels' tiles",
        about=(
            f"Rows of {row_length} tokens of shared pairs, {rows} at once, {HEADS} query heads and {KV_HEADS} "
            "key/value heads, no window. Counted and simulated; nothing ran on a GPU."
        ),
        facts=machine_facts("none"),
        tables=[
            Table(
                "Steps of the dK/dV kernel",
                ["pairs", "whole blocks", "half blocks", "saved", "mixed, whole blocks", "mixed, half blocks"],
                [
                    [
                        d["profile"],
                        *(d[k]["live"] for k in ("whole", "half")),
                        percent(1 - d["half"]["live"] / d["whole"]["live"]),
                        *(d[k]["mixed"] for k in ("whole", "half")),
                    ]
                    for d in data
                ],
                "Steps of 64 queries by a tile of 128 keys, for one query head.",
            ),
            Table(
                "Multiprocessors idle",
                ["pairs", *(f"{kernel}, {order}" for kernel in KERNELS for order in ORDERS)],
                [[d["profile"], *(percent(x) for kernel in KERNELS for x in d[kernel].values())] for d in data],
                "Share of the multiprocessors' time, from the first tile's start to the last one's end.",
            ),
        ],
        data={"profiles": data},
    ).write(output)


def packed_rows(profile: str, row_length: int) -> tuple[Int[np.ndarray, "B L"], Int[np.ndarray, "B L"]]:
    """Returns `key_end` and positions of the rows of one step."""
    from jax_simpo.data.packing import make_step_plan
    from jax_simpo.data.rows import build_rows

    pairs = profile_pairs(PROFILES[profile], PAIRS, vocabulary=1000)
    plan = make_step_plan(
        pairs.lengths,
        global_batch_size=PAIRS,
        rows_per_micro_batch=1,
        row_length=row_length,
        max_row_length=row_length,
        seed=0,
    )
    step = plan.step(0)
    numbered = [[(int(n), pairs.all[step.groups[n]]) for n in row] for row in step.rows]
    batch = build_rows(numbered, plan.shape, prefix_sharing=True)
    return batch.key_end, batch.positions


def measure(key_end: Int[np.ndarray, "B L"], positions: Int[np.ndarray, "B L"]) -> dict[str, Any]:
    """Counts the steps over both kinds of lists, and simulates the orders."""
    import jax.numpy as jnp

    from jax_simpo.ops.attention.pallas.bounds import find_block_bounds

    row = jnp.asarray(key_end), jnp.asarray(positions)
    by_order = [find_block_bounds(*row, None, heavy_first=heavy) for heavy in (False, True)]
    # Tiles of keys have the same whole blocks as tiles of queries, and a whole block is two steps.
    tiles = np.asarray(by_order[0].queries.tiles)
    half = np.asarray(by_order[0].keys_halves.tiles)
    steps = {
        "whole": {"live": 2 * int(tiles[..., 2].sum()), "mixed": 2 * int((tiles[..., 2] - tiles[..., 1]).sum())},
        "half": {"live": int(half[..., 2].sum()), "mixed": int((half[..., 2] - half[..., 1]).sum())},
    }
    group = HEADS // KV_HEADS
    idle: dict[str, dict[str, float]] = {"forward": {}, "dK/dV": {}}
    for order, bounds in zip(ORDERS, by_order, strict=True):
        by_head = order == ORDERS[0]
        idle["forward"][order] = idle_share(np.asarray(bounds.queries.tiles)[..., 2], HEADS, by_head)
        idle["dK/dV"][order] = idle_share(group * np.asarray(bounds.keys_halves.tiles)[..., 2], KV_HEADS, by_head)
    return steps | idle


def idle_share(steps: Int[np.ndarray, "B Q"], heads: int, by_head: bool) -> float:
    """Returns the share of time that multiprocessors wait.

    Tiles are launched in the order of the lists, the same tile of all rows together; head by head, or each for all
    heads.
    """
    costs = steps.T.reshape(-1) + START_STEPS
    costs = np.tile(costs, heads) if by_head else np.repeat(costs, heads)
    return float(1 - costs.sum() / (MULTIPROCESSORS * finish_time(costs.tolist())))


def finish_time(costs: Iterable[int]) -> int:
    """Returns when the last tile ends if each goes to the multiprocessor that is free first."""
    free_at = [0] * MULTIPROCESSORS
    for cost in costs:
        heapq.heapreplace(free_at, free_at[0] + cost)
    return max(free_at)


if __name__ == "__main__":
    run(main)
