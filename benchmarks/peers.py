"""Is a step of SimPO or DPO faster than TRL's and than the PyTorch reference's, and in less memory?

All contenders make the same step, on the same pairs from the same start model: TRL (`CPOTrainer` with the SimPO loss,
or `DPOTrainer`; float32 and bfloat16), `torch_ref` with the concatenated forward of the original and with prefix
sharing and packing (FlexAttention on a GPU, SDPA on a CPU), and jax-simpo. jax-simpo keeps logits for the backward pass
where memory allows; once more it runs with `logprob_chunk: 1024`, with which it keeps none. Each runs in a process of
its own; rounds go in turns. Equal first losses show that all do the same work.

With `--objective dpo` every contender computes the log-probs of the reference first, by its own code, which neither the
times nor the memory count. The reference is another model than the start, under which all first losses would be log 2.

Expected on a CPU, HH-RLHF, 155 M parameters with Llama-3's vocabulary: 8 times TRL in float32 and 4.5 times TRL in
bfloat16, in less than half of TRL's memory; with DPO 6 times TRL in float32, in less than half of its memory. Measured
with SimPO on two cores of an EPYC: 9.0 times in float32 (9.5 and 8.5 in the two rounds) and 10.6 times in bfloat16, in
0.41 and 0.34 of its memory; with DPO in float32 15.2 times in 0.54 of its memory, which misses the half, and without
kept logits 13.3 times in 0.45.

Takes about 16 minutes on two CPU cores with `--rounds 2`, 25 with DPO in float32 alone (`--quick`: two minutes).
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from benchmarks.cells import CELLS_HELP, WRONG, Cells
from benchmarks.cells import failed as is_failed
from benchmarks.contenders.job import OBJECTIVES, Job, first_pairs, spoken_pairs
from benchmarks.facts import ROOT, machine_facts
from benchmarks.lengths import PROFILES
from benchmarks.losses import TOLERANCE, disagreement
from benchmarks.models import model_mapping
from benchmarks.options import BadOption, Option, run
from benchmarks.results import Result, Table, can_draw, gib, picture
from benchmarks.timing import in_turns, speed_up
from benchmarks.workers import Worker

TRL = "benchmarks.contenders.trl_trainer"
TORCH_REF = "benchmarks.contenders.torch_reference"
OUR_STEP = "benchmarks.contenders.ours"
CONTENDERS = {
    "TRL, float32": (TRL, "float32"),
    "TRL, bfloat16": (TRL, "bfloat16"),
    "torch_ref concatenated, float32": (TORCH_REF, "float32", "separate"),
    "torch_ref concatenated, bfloat16": (TORCH_REF, "bfloat16", "separate"),
    "torch_ref shared+packed, float32": (TORCH_REF, "float32", "shared+packed"),
    "torch_ref shared+packed, bfloat16": (TORCH_REF, "bfloat16", "shared+packed"),
    "jax-simpo, float32": (OUR_STEP, "float32"),
    "jax-simpo, float32, no logits kept": (OUR_STEP, "float32", "1024"),
    "jax-simpo, bfloat16": (OUR_STEP, "bfloat16"),
}
TITLES = {"simpo": "SimPO", "dpo": "DPO"}
# Seconds of a step, or of the warm-up before it, which tries backends and compiles. On a GPU a contender that hangs
# must leave time to the others of a part.
STEP_LIMIT = {"cpu": 1800.0, "gpu": 240.0}
OURS = [name for name in CONTENDERS if name.startswith("jax-simpo")]


def main(
    output: Annotated[Path, Option("Folder for the results.")] = Path("docs/benchmarks"),
    objective: Annotated[str, Option("simpo or dpo.")] = "simpo",
    model: Annotated[str, Option("One of benchmarks/models.py.")] = "hh-155m",
    layers: Annotated[int | None, Option("Fewer layers than the model has.")] = None,
    device: Annotated[str, Option("cpu or gpu.")] = "cpu",
    profile: Annotated[str | None, Option("Made-up pairs in these lengths, not real ones.")] = None,
    pairs: Annotated[Path | None, Option("JSONL of real pairs. Default: where SIMPO_SHARED says.")] = None,
    tokenizer: Annotated[str | None, Option("For real pairs. Default: Llama-3's of SIMPO_SHARED.")] = None,
    batch: Annotated[int, Option("Pairs a step.")] = 32,
    stacked_batch: Annotated[int, Option("Pairs a micro-batch where none are packed.")] = 8,
    remat: Annotated[str, Option("none (jax-simpo: dots) or full.")] = "none",
    rounds: Annotated[int, Option("Steps of each contender.")] = 3,
    only: Annotated[list[str] | None, Option("Contenders whose name has this (repeatable).")] = None,
    resident: Annotated[
        bool | None, Option("Keep all processes through all rounds. Default: on a GPU, not on a CPU.")
    ] = None,
    name: Annotated[str | None, Option("Stem of the files. Default: peers, peers-dpo.")] = None,
    cells: Annotated[Path | None, Option(CELLS_HELP)] = None,
    quick: Annotated[bool, Option("A tiny model on short pairs, to see that it runs.")] = False,
) -> None:
    """Times the same step of all contenders."""
    if quick:
        model, batch, stacked_batch, rounds, profile = "tiny", 8, 4, 1, profile or "hh-rlhf"
    if objective not in OBJECTIVES:
        raise BadOption(f"--objective {objective} is not one of {', '.join(OBJECTIVES)}")
    name = name or ("peers" if objective == "simpo" else f"peers-{objective}")
    shared = os.environ.get("SIMPO_SHARED")
    if profile is None and pairs is None and not shared:
        raise BadOption("no real pairs: give --pairs and --tokenizer, or --profile, or set SIMPO_SHARED")
    file = pairs or Path(f"{shared}/data/hh_harmless.train.jsonl")
    known = "builtin:cafe" if profile else tokenizer or f"{shared}/tokenizers/llama3"
    chosen = {n: c for n, c in CONTENDERS.items() if not only or any(part in n for part in only)}
    with tempfile.TemporaryDirectory() as work:
        job = Job(work, model_mapping(model, layers), known, batch, device, objective, stacked_batch, remat)
        job.save()
        rows = spoken_pairs(PROFILES[profile], batch) if profile else first_pairs(file, batch)
        job.rows.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        resident = device == "gpu" if resident is None else resident
        # The pairs are named by their text: two files, or two profiles, are not the same comparison.
        text = hashlib.sha256(job.rows.read_bytes()).hexdigest()[:12]
        settings = {**asdict(job), "work": None, "pairs text": text, "resident": resident}
        measured, failed = _compare(job, chosen, rounds, resident, Cells(cells), settings)
    if not measured:
        sys.exit(f"no contender could run: {failed}")
    recompute = "none (jax-simpo: dots)" if remat == "none" else remat
    about = (
        f"The model is {model}{'' if layers is None else f' with {layers} layers'}. A step of {TITLES[objective]} has "
        f"{batch} pairs of {profile or file.name}, in micro-batches of {stacked_batch} where they are not packed; "
        f"remat is {recompute}. Each contender runs in a process of its own, {rounds} rounds in turns; figures are "
        "medians."
    )
    tables = [_table(measured, batch), _ratios(measured), *_failures(failed)]
    pictures = [f"{name}.png"] if can_draw() else []
    for picture_name in pictures:
        _draw(output, picture_name, measured, batch)
    Result(
        *(name, f"{TITLES[objective]} beside TRL and PyTorch", about, machine_facts(device), tables),
        {"batch": batch, "measured": measured, "failed": failed},
        pictures,
    ).write(output)
    if wrong := _disagreements(measured):
        print(f"WRONG: {'; '.join(wrong)}")
        sys.exit(WRONG)


def _compare(
    job: Job,
    chosen: Mapping[str, tuple[str, ...]],
    rounds: int,
    resident: bool,
    cells: Cells,
    settings: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the answers of every contender's rounds, and the reasons of those that could not run.

    Every round is a cell of its own. A contender is started when it has a round to run.
    """
    environment = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""} if job.device == "cpu" else {}
    environment |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    limit = STEP_LIMIT[job.device]
    answers: dict[str, list[dict[str, Any]]] = {contender: [] for contender in chosen}
    failed: dict[str, str] = {}

    with ExitStack() as open_workers:
        workers: dict[str, Worker] = {}

        def started(contender: str) -> Worker:
            if contender in workers:
                return workers[contender]
            if not job.start.exists():
                start = [sys.executable, "-m", "benchmarks.contenders.start", str(job.file)]
                subprocess.run(start, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            module, *arguments = chosen[contender]
            log = Path(job.work) / "logs" / f"{contender}.log"
            worker = Worker([module, str(job.file), *arguments], log, environment)
            open_workers.callback(worker.close)
            worker.ask(limit, do="warm")
            workers[contender] = worker
            return worker

        def step(contender: str, number: int) -> dict[str, Any]:
            answer = started(contender).ask(limit, do="step", step=number if resident else 0)
            if not resident:
                workers.pop(contender).close()
            return answer

        def run(contender: str, number: int) -> float:
            if contender in failed:
                return 0.0
            cell = {"peers": contender, **settings, "round": number}
            answer = cells.measure(cell, partial(step, contender, number))
            if is_failed(answer):
                failed[contender] = answer.get("details", answer["failed"])
                return 0.0
            answers[contender].append(answer)
            print(f"round {number + 1}, {contender}: {answer}", flush=True)
            return float(answer["seconds"])

        in_turns({contender: partial(run, contender) for contender in chosen}, rounds)
    return {contender: rounds_of for contender, rounds_of in answers.items() if contender not in failed}, failed


def _disagreements(measured: Mapping[str, Any]) -> list[str]:
    """Returns what is wrong with the first losses: of the contenders in float32, and of all."""
    losses = {contender: float(answers[0]["loss"]) for contender, answers in measured.items()}
    exact = {contender: loss for contender, loss in losses.items() if "float32" in contender}
    least = "bfloat16" if len(exact) < len(losses) else "float32"
    told = [disagreement(exact, "float32"), disagreement(losses, least)]
    return [text for text in dict.fromkeys(told) if text is not None]


def _seconds(answers: list[dict[str, Any]]) -> list[float]:
    return [answer["seconds"] for answer in answers]


def _table(measured: Mapping[str, Any], batch: int) -> Table:
    rows = []
    for contender, answers in measured.items():
        rate = batch / statistics.median(_seconds(answers))
        peak = max(answer["peak_bytes"] for answer in answers)
        rows.append((contender, rate, gib(peak), f"{answers[0]['loss']:.5f}"))
    note = (
        "Peak memory is, on a CPU, the process's largest resident size from its start, or from the end of its "
        "reference pass, to the end of the step, compilation included; on a GPU it is what its framework allocated. "
        "The loss is that of the first step; all have the same start model and the same reference. Those in float32 "
        f"may be {TOLERANCE['float32']:g} apart, all together {TOLERANCE['bfloat16']:g}."
    )
    ours = {answers[0]["backends"] for contender, answers in measured.items() if contender in OURS}
    note += "".join(f" jax-simpo takes {reason}" for reason in sorted(ours))
    return Table("A step of each", ("contender", "pairs/s", "peak memory", "first loss"), rows, note)


def _ratios(measured: Mapping[str, Any]) -> Table:
    ours = [contender for contender in OURS if contender in measured]
    rows = []
    for other, answers in measured.items():
        if other in ours:
            continue
        row: list[Any] = [other]
        for own in ours:
            row.append(speed_up(_seconds(answers), _seconds(measured[own])))
            row.append(_peak(measured[own]) / _peak(answers))
        rows.append(row)
    columns = [f"{quantity} of {own}" for own in ours for quantity in ("speed-up", "memory")]
    note = "Speed-ups are medians of the rounds' ratios."
    return Table("jax-simpo beside the others", ("beside", *columns), rows, note)


def _peak(answers: list[dict[str, Any]]) -> float:
    return max(answer["peak_bytes"] for answer in answers)


def _failures(failed: Mapping[str, str]) -> list[Table]:
    rows = [(contender, reason.splitlines()[-1]) for contender, reason in failed.items()]
    return [Table("Could not run", ("contender", "why"), rows)] if rows else []


def _draw(output: Path, name: str, measured: Mapping[str, Any], batch: int) -> None:
    with picture(output, name, columns=2) as (left, right):
        names = list(measured)
        left.barh(names, [batch / statistics.median(_seconds(measured[n])) for n in names], color="tab:blue")
        left.set_xlabel("pairs/s")
        right.barh(names, [_peak(measured[n]) / 2**30 for n in names], color="tab:orange")
        right.set_yticks([])
        right.set_xlabel("peak memory, GiB")
        for axes in (left, right):
            axes.invert_yaxis()


if __name__ == "__main__":
    run(main)
