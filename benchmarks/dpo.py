"""Compares DPO with SimPO for `benchmarks.throughput`: optimizer steps, memory, and the pass over the reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from statistics import mean
from typing import Any

from benchmarks.results import Table, gib, percent
from benchmarks.steps import DPO, ReferencePass, Trainee, steps_in_turns
from benchmarks.timing import seconds_of, speed_up, timed


def compare_dpo(simpo: Trainee, row_length: int, rounds: int) -> dict[str, Any]:
    """Times steps of SimPO and DPO in turns, on the same pairs and weights, and the reference pass before and after.

    The reference is the model that the steps start from. Called under `jax.set_mesh(simpo.mesh)`.

    Args:
        simpo: a trainee with the objective SimPO.
        row_length: the length of the rows of the reference pass.
        rounds: steps of each objective.
    """
    weights = simpo.fresh_weights()
    reference = ReferencePass(simpo, row_length)
    reference.warm(weights.params)
    sums, before = timed(lambda: reference.sums(weights.params))
    trainees = {"SimPO": simpo, "DPO": replace(simpo, objective=DPO, reference=sums)}
    compiled_bytes = {name: trainee.compiled_bytes() for name, trainee in trainees.items()}
    seconds = steps_in_turns(trainees, weights, rounds)
    after = seconds_of(lambda: reference.sums(weights.params))
    return {
        "pairs": sum(len(simpo.build(k).groups) for k in range(rounds)),
        "seconds": seconds,
        "bytes": compiled_bytes,
        "reference_pass": {"pairs": len(simpo.pairs), "seconds": [before, after]},
    }


def dpo_table(compared: Mapping[str, Any]) -> Table:
    """Returns the table of what `compare_dpo` measured on each set of pairs."""
    rows = []
    for label, measured in compared.items():
        simpo, dpo = measured["seconds"]["SimPO"], measured["seconds"]["DPO"]
        of_simpo, of_dpo = (measured["pairs"] / sum(times) for times in (simpo, dpo))
        reference_pass = measured["reference_pass"]
        with_pass = 1 / (1 / of_dpo + mean(reference_pass["seconds"]) / reference_pass["pairs"])
        ratios = [a / b for a, b in zip(simpo, dpo, strict=True)]
        spread = f"{percent(min(ratios))} to {percent(max(ratios))}"
        simpo_bytes, dpo_bytes = measured["bytes"]["SimPO"], measured["bytes"]["DPO"]
        rows += [
            (label, "SimPO", of_simpo, "", "", gib(simpo_bytes), ""),
            (
                label,
                "DPO",
                of_dpo,
                percent(speed_up(simpo, dpo)),
                spread,
                gib(dpo_bytes),
                percent(dpo_bytes / simpo_bytes),
            ),
            (label, "DPO with its reference pass", with_pass, percent(with_pass / of_simpo), "", "", ""),
        ]
    rounds = len(simpo)
    note = (
        f"Rows are shared and packed. In each of {rounds} rounds both objectives make a step on the same pairs and "
        "weights, and the one that begins changes from round to round; a step takes in planning, building and sending "
        "rows. Speed: the median of the rounds' ratios, then the lowest and the highest. A step of DPO reads the sums "
        "of log-probs under the reference, which are in memory as in training. The last line adds the pass that "
        "computes them to the time of one epoch: the program's own scoring of all pairs, already compiled, as the mean "
        "of a pass before and a pass after the rounds. Memory is that of the compiled program of a micro-batch."
    )
    columns = ("pairs", "", "pairs/s", "speed beside SimPO", "in the rounds", "memory", "memory beside SimPO")
    return Table("DPO beside SimPO", columns, rows, note)
