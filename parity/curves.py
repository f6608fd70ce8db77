"""Runs fifty steps of the same config with both commands and draws their curves: `python -m parity curves`."""

from __future__ import annotations

import json
import os
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from jax_simpo.data.synthetic import make_rows
from parity.cases import Job, write_config
from parity.plots import draw_curves
from parity.processes import SETTINGS, run_process

STEPS, PAIRS, BATCH = 50, 400, 16
PICTURE, FIGURES = "parity-curves.png", "parity-curves.json"
# The small Llama 3 of the cells, wider and deeper.
MODEL: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
}
KEYS = ("loss", "rewards/margins", "grad_norm", "rewards/accuracies")


def draw(output: Path) -> int:
    """Trains on both sides with the commands that a user types, and draws their curves. Returns the exit status."""
    work = output.resolve()
    work.mkdir(parents=True, exist_ok=True)
    job = _job(work)
    job.save()
    config = next(iter(job.configs.values()))
    run_process(job, "torch-start", [sys.executable, "-m", "parity.torch_side", "start", str(job.file)], print)
    options = [str(config), "--overwrite_output_dir=true"]
    torch = [sys.executable, "-m", "torch_ref", "train", *options, f"--output_dir={work}/torch"]
    jax = [sys.executable, "-m", "jax_simpo.cli", "train", *options, f"--output_dir={work}/jax"]
    run_process(job, "torch", torch, print)
    run_process(job, "jax", jax, print)
    runs = {"PyTorch": _records(work / "torch"), "JAX": _records(work / "jax")}
    theirs, ours = runs.values()
    distances = {key: float(np.abs([a[key] - b[key] for a, b in zip(theirs, ours, strict=True)]).max()) for key in KEYS}
    source = "HH-RLHF harmless" if os.environ.get("SIMPO_SHARED") else "built-in"
    caption = (
        f"{STEPS} steps on {PAIRS} {source} pairs, {BATCH} a step, shared + packed, float32: the losses are at most "
        f"{distances['loss']:.1e} apart"
    )
    (work / PICTURE).write_bytes(draw_curves(runs, caption))
    figures = {"largest distance": distances, "last": {name: records[-1] for name, records in runs.items()}}
    (work / FIGURES).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print("largest distances: " + ", ".join(f"{key} {value:.1e}" for key, value in distances.items()))
    print(work / PICTURE)
    return 0


def _job(work: Path) -> Job:
    shared = os.environ.get("SIMPO_SHARED")
    data = work / "pairs.jsonl"
    if shared:
        with open(f"{shared}/data/hh_harmless.train.jsonl", encoding="utf-8") as file:
            data.write_text("".join(islice(file, PAIRS)), encoding="utf-8")
    else:
        data.write_text("".join(json.dumps(row) + "\n" for row in make_rows("cafe", "train")[:PAIRS]), encoding="utf-8")
    values = {
        **SETTINGS,
        "model_name_or_path": str(work / "start"),
        "tokenizer_name_or_path": f"{shared}/tokenizers/bpe4k" if shared else "builtin:cafe",
        "dataset_mixer": {str(data): 1.0},
        "data_cache_dir": str(work / "cache"),
        "dtype": "float32",
        "max_length": 512,
        "global_batch_size": BATCH,
        "max_steps": STEPS,
        "sft_weight": 0.0,
        "save_strategy": "no",
    }
    write_config(work / "config.yaml", values)
    return Job(str(work), {"run": str(work / "config.yaml")}, {"run": MODEL}, [], [], PAIRS, BATCH, 1, STEPS)


def _records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if "step" in record]
