"""By which factor do prefix sharing and packing speed up training, on which lengths of pairs?

Repeats Tables 1 and 2 of the prefix-sharing paper: six length profiles, and real HH-RLHF pairs if there are any, each
in the layouts separate, shared, separate+packed and shared+packed. All layouts make optimizer steps on the same pairs
in turns; the times include planning, building and sending rows. Attention and loss head are those that a run would
take on the first pairs, packed and shared; on an accelerator they are tried before. Layouts that make a step of the
same pairs must have the same first loss; if one has not, the exit status is 3.

A second part (`benchmarks/dpo.py`) sets steps of DPO beside steps of SimPO, with the reference pass counted and not
counted. It takes few of the profiles and more rounds, because it looks for a difference of per cents. `--rounds 0` or
`--dpo-rounds 0` leaves one of the parts out.

Expected: sharing speeds packed steps up by the ratio of tokens computed, within 5 %; packed rows of eight medians are
filled to 95 % at 128 pairs a step and to 97 % at 512. A step of DPO is as fast as one of SimPO within 3 % and takes as
much memory within 2 %; the reference pass adds a third of an epoch's time.

Takes about 25 minutes on two CPU cores, 5 of them for DPO (`--quick`: one minute). On a GPU it has not run yet.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np

from benchmarks.cells import CELLS_HELP, WRONG, Cells, failed
from benchmarks.dpo import compare_dpo, dpo_table
from benchmarks.facts import machine_facts
from benchmarks.flops import linear_ideal
from benchmarks.lengths import PROFILES, Pairs, profile_pairs, read_pairs
from benchmarks.losses import TOLERANCE, disagreement
from benchmarks.models import model_mapping
from benchmarks.options import Option, run
from benchmarks.results import Result, Table, can_draw, gib, percent, picture
from benchmarks.steps import VARIANTS, Trainee, device_name, matmul_peak, one_device, step_plan, steps_in_turns
from benchmarks.timing import speed_up, total_speed_up
from jax_simpo.data.packing import ROW_MULTIPLE, measure
from jax_simpo.hf.config import read_model_config
from jax_simpo.models.transformer import Model
from jax_simpo.plan.flops import useful_flops, work_of

MEDIANS_A_ROW = 8
POOL = 1024  # pairs drawn of each profile
FILL_BATCHES = (128, 512)
FILL_POOLS = 4  # the fill is planned and not computed, so it takes as many times the pairs
PACKED = ("separate+packed", "shared+packed")
HH = "hh (real)"
DPO_PROFILES = ["hh-rlhf"]


def main(
    output: Annotated[Path, Option("Folder for the results.")] = Path("docs/benchmarks"),
    model: Annotated[str, Option("One of benchmarks/models.py.")] = "small",
    layers: Annotated[int | None, Option("Fewer layers than the model has.")] = None,
    dtype: Annotated[str, Option("Compute dtype.")] = "float32",
    remat: Annotated[str, Option("As the config key; `dots` is the fastest on a CPU.")] = "dots",
    attention: Annotated[str, Option("As the config key; `auto` is tried as a run tries it.")] = "auto",
    batch: Annotated[int, Option("Pairs a step when packed.")] = 64,
    unpacked_batch: Annotated[int, Option("Pairs a step when not packed; 0 leaves those variants out.")] = 4,
    rounds: Annotated[int, Option("Steps of each layout; 0 leaves the layouts out.")] = 2,
    dpo_rounds: Annotated[int, Option("Steps of SimPO and of DPO; 0 leaves DPO out.")] = 6,
    profiles: Annotated[list[str] | None, Option("Profiles of the layouts (repeatable). Default: all.")] = None,
    dpo_profiles: Annotated[list[str], Option("Profiles of DPO (repeatable).")] = DPO_PROFILES,
    pairs: Annotated[Path | None, Option("JSONL of real pairs. Default: where SIMPO_SHARED says.")] = None,
    tokenizer: Annotated[str | None, Option("For `--pairs`. Default: Llama-3's of SIMPO_SHARED.")] = None,
    name: Annotated[str, Option("Stem of the files.")] = "throughput",
    cells: Annotated[Path | None, Option(CELLS_HELP)] = None,
    quick: Annotated[bool, Option("A tiny model on two profiles, to see that it runs.")] = False,
) -> None:
    """Times optimizer steps of four layouts on each length profile, and of DPO beside SimPO."""
    if quick:
        model, batch, unpacked_batch, profiles = "tiny", 16, 4, profiles or ["hh-rlhf"]
        rounds, dpo_rounds = min(rounds, 2), min(dpo_rounds, 2)
    pool = 128 if quick else POOL
    policy = Model(read_model_config(model_mapping(model, layers)), dtype, remat)  # type: ignore[arg-type]
    mesh = one_device()
    of_layouts = (profiles or list(PROFILES)) if rounds else []
    of_dpo = dpo_profiles if dpo_rounds else []
    data = _data(list(dict.fromkeys([*of_layouts, *of_dpo])), pool, policy.config.vocab_size, pairs, tokenizer)
    batches = dict.fromkeys(VARIANTS, unpacked_batch) if unpacked_batch else {}
    batches |= dict.fromkeys(PACKED, batch)

    def trainee(label: str, variant: str) -> Trainee:
        own_pairs, row_length = data[label]
        plan = step_plan(policy, own_pairs, variant, batch=batches[variant], row_length=row_length)
        return Trainee(policy, plan, own_pairs, mesh, *taken)

    store = Cells(cells)
    settings = {"model": model, "layers": layers, "dtype": dtype, "remat": remat, "attention": attention, "pool": pool}
    file = str(pairs or os.environ.get("SIMPO_SHARED"))  # of the real pairs

    def of_layout(label: str) -> dict[str, Any]:
        return measure_steps({variant: trainee(label, variant) for variant in batches}, rounds)

    def of_objectives(label: str) -> dict[str, Any]:
        return compare_dpo(trainee(label, PACKED[1]), data[label][1], dpo_rounds)

    measured: dict[str, Any] = {}
    compared: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    taken = attention, "auto"
    with jax.set_mesh(mesh):
        first = next(iter(data))
        choice = store.measure(
            {**settings, "part": "backends", "pairs": first}, lambda: trainee(first, PACKED[1]).backends.as_cell()
        )
        if failed(choice):
            sys.exit(f"no attention or no loss head can be used: {choice.get('details', choice['failed'])}")
        taken = choice["attention"], choice["loss_head"]
        print(choice["reason"], flush=True)
        peak = store.measure({"peak": dtype}, lambda: matmul_peak(dtype), always=True)
        if failed(peak):
            sys.exit(f"not even a matrix product runs: {peak['failed']}")
        parts = [
            ("steps", rounds, of_layouts, of_layout, measured, batches),
            ("dpo", dpo_rounds, of_dpo, of_objectives, compared, {PACKED[1]: batch}),
        ]
        for label, (own_pairs, _) in data.items():
            print(f"{label}: {len(own_pairs)} pairs", flush=True)
            for part, its_rounds, labels, measure, results, its_batches in parts:
                if not its_rounds or label not in (*labels, HH):
                    continue
                cell = {**settings, "part": part, "pairs": label, "batches": its_batches, "rounds": its_rounds}
                cell |= {"file": file} if label == HH else {}
                result = store.measure(cell, partial(measure, label))
                if failed(result):
                    reasons[f"{label}, {part}"] = result["failed"]
                    continue
                results[label] = result
                if part == "steps":
                    print(f"{label}: {_summary(result, peak)}", flush=True)
    if reasons and not measured and not compared:
        sys.exit(f"nothing could be measured: {reasons}")
    fills = {label: packing_fill(policy, label, FILL_POOLS * pool) for label in measured if label in PROFILES}
    facts = machine_facts(device_name())
    about = (
        f"The model is {model}{'' if layers is None else f' with {layers} layers'} ({policy.parameter_count / 1e6:.1f} "
        f"M parameters), with {dtype}, remat {remat}, {choice['reason']} A step has {batch} pairs when packed, "
        f"in rows of {MEDIANS_A_ROW} medians, and {unpacked_batch} when not. Matrix products reach "
        f"{peak / 1e12:.3g} TFLOP/s. The layouts of a profile took turns; profiles may "
        "come from several calls."
    )
    tables, pictures = [], []
    if measured:
        about += f" {__doc__.split(chr(10) * 2)[1]} Each layout makes {rounds} steps."
        tables = [_table(measured, peak), _speed_ups(measured), *([_fills(fills)] if fills else [])]
        pictures = [_draw(output, f"{name}.png", measured)] if can_draw() else []
    if compared:
        tables.append(dpo_table(compared))
    if reasons:
        tables.append(Table("Could not run", ("what", "why"), list(reasons.items())))
    everything = {"matmul_flops_per_second": peak, "measured": measured, "fill": fills, "dpo": compared}
    everything |= {"failed": reasons, "backends": choice}
    Result(name, "Throughput", about, facts, tables, everything, pictures).write(output)
    if wrong := _disagreements(measured, dtype):
        print(f"WRONG: {'; '.join(wrong)}")
        sys.exit(WRONG)


def _disagreements(measured: Mapping[str, Any], dtype: str) -> list[str]:
    """Returns what is wrong with the first losses of the layouts that make steps of the same pairs."""
    wrong = []
    for label, variants in measured.items():
        for pair in (PACKED, ("separate", "shared")):
            losses = {variant: variants[variant]["first_loss"] for variant in pair if variant in variants}
            if text := disagreement(losses, dtype):
                wrong.append(f"{label}: {text}")
    return wrong


def _data(
    profiles: list[str], pool: int, vocabulary: int, file: Path | None, tokenizer: str | None
) -> dict[str, tuple[Pairs, int]]:
    """Makes or reads the pairs by name, each with the length of packed rows."""
    data = {}
    for label in profiles:
        profile = PROFILES[label]
        data[label] = profile_pairs(profile, pool, vocabulary), _row_length(profile.length)
    shared = os.environ.get("SIMPO_SHARED")
    if file is None and shared:
        file = Path(shared) / "data" / "hh_harmless.train.jsonl"
    if file is not None:
        real = read_pairs(file, tokenizer or f"{shared}/tokenizers/llama3", pool, vocabulary)
        longest = _round_up(int(real.lengths.row_tokens(False).max()))  # real lengths are not cut at four medians
        data[HH] = real, max(longest, _row_length(float(np.median(real.lengths.inputs[real.lengths.starts] + 1))))
    return data


def _row_length(median: float) -> int:
    """Returns eight medians, the length of a profile's longest pair with nothing shared."""
    return _round_up(int(MEDIANS_A_ROW * median))


def _round_up(tokens: int) -> int:
    return -(-tokens // ROW_MULTIPLE) * ROW_MULTIPLE


def _summary(variants: Mapping[str, Any], peak: float) -> str:
    """Returns a line about the layouts of some pairs: pairs a second, and useful operations beside a matrix product."""
    parts = []
    for variant, result in variants.items():
        total = sum(result["seconds"])
        share = percent(result["useful_flops"] / total / peak)
        parts.append(f"{variant} {result['pairs'] / total:.3g} pairs/s, {share} of a matrix product")
    return "; ".join(parts)


def measure_steps(trainees: Mapping[str, Trainee], rounds: int) -> dict[str, Any]:
    """Times steps of all variants in turns, on the same weights, after a step that compiles."""
    weights = next(iter(trainees.values())).fresh_weights()
    compiled_bytes = {variant: trainee.compiled_bytes() for variant, trainee in trainees.items()}
    losses = {variant: trainee.first_loss(weights) for variant, trainee in trainees.items()}
    seconds = steps_in_turns(trainees, weights, rounds)
    return {
        variant: {
            **_counts(trainee, rounds),
            **{"seconds": seconds[variant], "bytes": compiled_bytes[variant], "first_loss": losses[variant]},
        }
        for variant, trainee in trainees.items()
    }


def _counts(trainee: Trainee, rounds: int) -> dict[str, Any]:
    """Counts the pairs, tokens and useful operations of the timed steps."""
    steps = [trainee.build(k) for k in range(rounds)]
    plan, config = trainee.plan, trainee.model.config
    work = [work_of(plan.lengths.of_groups(step.groups), plan.prefix_sharing) for step in steps]
    return {
        "pairs": sum(len(step.groups) for step in steps),
        "input_tokens": sum(step.input_tokens for step in steps),
        "computed_tokens": sum(step.computed_tokens for step in steps),
        "useful_flops": sum(useful_flops(config, w) for w in work),
        "row": vars(plan.shape),
    }


def packing_fill(model: Model, profile: str, count: int) -> dict[str, float]:
    """Returns the share of computed tokens that are not padding, by variant and pairs a step, over an epoch."""
    pool = profile_pairs(PROFILES[profile], count, model.config.vocab_size)
    row_length = _row_length(PROFILES[profile].length)
    plans = {
        f"{variant}, {batch}": step_plan(model, pool, variant, batch=batch, row_length=row_length)
        for variant in PACKED
        for batch in FILL_BATCHES
    }
    return {label: measure(plan).fill for label, plan in plans.items()}


def _table(measured: Mapping[str, Any], peak: float) -> Table:
    rows = []
    for label, variants in measured.items():
        for variant, counts in variants.items():
            time = sum(counts["seconds"])
            rows.append(
                (
                    *(label, variant),
                    *(counts["pairs"] / time, counts["input_tokens"] / time),
                    percent(counts["useful_flops"] / time / peak),
                    percent(counts["input_tokens"] / counts["computed_tokens"]),
                    gib(counts["bytes"]),
                    f"{counts['first_loss']:.5f}",
                )
            )
    note = (
        "Tokens are the computed ones without padding. Useful FLOPs are those of each layout's own tokens, without "
        "padding and recomputation, against those matrix products. Memory is that of the compiled program of "
        "a micro-batch: parameters, gradients, temporaries; the optimizer's state comes on top. Without packing a row "
        "is as long as the longest pair of all, as in the trainer. Packed layouts make their first step of the same "
        f"pairs, and so do the others: their first losses may be {TOLERANCE['float32']:g} apart in float32, "
        f"{TOLERANCE['bfloat16']:g} in bfloat16."
    )
    columns = ("pairs", "layout", "pairs/s", "tokens/s", "useful FLOPs", "filled", "memory", "first loss")
    return Table("Optimizer steps", columns, rows, note)


def _speed_ups(measured: Mapping[str, Any]) -> Table:
    rows = []
    for label, variants in measured.items():
        profile = PROFILES.get(label)
        for slow, fast in (PACKED, ("separate", "shared")):
            if slow not in variants:
                continue
            times = variants[slow]["seconds"], variants[fast]["seconds"]
            tokens = variants[slow]["computed_tokens"] / variants[fast]["computed_tokens"]
            total = total_speed_up(*times)
            paper = "" if profile is None else profile.paper if slow == PACKED[0] else profile.paper_unpacked
            ideal = "" if profile is None else linear_ideal(profile.prompt, profile.response)
            rows.append(
                (label, f"{fast} over {slow}", ideal, tokens, total, speed_up(*times), percent(total / tokens), paper)
            )
    note = (
        "Ideal: 2(p+c)/(p+2c) at the medians. Tokens: the ratio of the computed tokens, padding included. Total: the "
        "ratio of the times over all rounds; median: the median of the ratios within a round. Share: total over "
        "tokens. Paper: 8 H100, FlexAttention with sharing over FlashAttention 3."
    )
    return Table(
        "What sharing gains", ("pairs", "", "ideal", "tokens", "total", "median", "share", "paper"), rows, note
    )


def _fills(fills: Mapping[str, Mapping[str, float]]) -> Table:
    columns = list(next(iter(fills.values()), {}))
    rows = [(label, *(f"{fill[column]:.3f}" for column in columns)) for label, fill in fills.items()]
    return Table(
        f"Packing fill, rows of {MEDIANS_A_ROW} medians", ("pairs", *(f"{c} pairs a step" for c in columns)), rows
    )


def _draw(output: Path, file: str, measured: Mapping[str, Any]) -> str:
    """Draws the speed-ups of sharing, and returns the name of the file."""
    with picture(output, file) as axes:
        for x, (label, variants) in enumerate(measured.items()):
            times = [variants[variant]["seconds"] for variant in PACKED]
            tokens = variants[PACKED[0]]["computed_tokens"] / variants[PACKED[1]]["computed_tokens"]
            axes.bar(x, total_speed_up(*times), color="tab:blue", width=0.6, label="measured" if not x else None)
            axes.plot([x - 0.3, x + 0.3], [tokens] * 2, "k-", label="tokens computed" if not x else None)
            if label in PROFILES:
                paper = PROFILES[label].paper
                axes.plot([x - 0.3, x + 0.3], [paper] * 2, "r:", label="paper, 8 H100" if not x else None)
        axes.set_xticks(range(len(measured)), list(measured), rotation=30, ha="right")
        axes.set_ylabel("speed-up of sharing, packed")
        axes.axhline(1.0, color="grey", linewidth=0.5)
        axes.legend(loc="lower right", framealpha=1)
    return file


if __name__ == "__main__":
    run(main)
