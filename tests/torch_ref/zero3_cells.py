"""Computes, by all ranks in one start, the results that the ZeRO-3 tests check: `torchrun ... zero3_cells.py FOLDER`.

The start model lies in FOLDER/start; what was found is written to FOLDER/found.json, curves to the runs' folders.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from jax_simpo.config import TrainConfig, load_config
from jax_simpo.errors import UserError
from tests.torch_ref.start import BEST, DPO, SKIPPING, config_file
from tests.torch_ref.support import poisoned, record_memory
from torch_ref import trainer
from torch_ref.batches import build_rank_step
from torch_ref.checkpoint import Checkpoints
from torch_ref.distributed import Ranks, open_ranks
from torch_ref.evaluate import group_records, open_model, score_groups
from torch_ref.setup import Setup
from torch_ref.trainer import batch_part, make_engine, train

STEPS = 5
LAYOUTS = {"rows": (), "stacked": ("--prefix_sharing=false", "--packing=false")}


class GatheredNumbers(TorchDispatchMode):
    """Counts the numbers that all-gathers bring to this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "allgather" in func.name():
            output = args[0]
            tensors = output if isinstance(output, list | tuple) else [output]
            self.count += sum(t.numel() for t in torch.utils._pytree.tree_leaves(tensors) if t is not None)
        return func(*args, **(kwargs or {}))


def settings(folder: Path, name: str, *overrides: str) -> TrainConfig:
    own = f"config-{os.environ['RANK']}"  # or one rank might read what the other is writing
    file = config_file(folder / "start/model", folder / name, steps=STEPS, name=own, run_name=name)
    return load_config(file, overrides, torch=True)


def look_at_one_step(folder: Path, ranks: Ranks, deepspeed: Path, layout: str) -> dict[str, Any]:
    """Gradients of the first step, what its forwards gathered, and what a rank holds."""
    setup = Setup(settings(folder, f"step-{layout}", *LAYOUTS[layout]), ranks)
    pairs = setup.train_pairs()
    plan = setup.step_plan(pairs, batch=6, seed=42)
    engine = make_engine(setup, deepspeed)
    parameters = list(engine.policy.parameters())
    held = sum(p.ds_tensor.numel() for p in parameters)
    # Biases' and norms' weights, too: nothing stays gathered (the threshold in the DeepSpeed file is 0).
    visible = sum(p.numel() for p in parameters)
    step = build_rank_step(plan, pairs, 0, ranks.rank, ranks.world)
    gathered = []
    for number, batch in enumerate(step.micro_batches, start=1):
        with GatheredNumbers() as numbers:
            part = batch_part(engine, setup.objective, batch, step)
        gathered.append(numbers.count)
        engine.backward(part.loss, last=number == len(step.micro_batches))
    gradients = engine.gradients()
    if ranks.is_first:
        torch.save({name: g.float() for name, g in gradients.items()}, folder / f"gradients-{layout}.pt")
    return {
        "parameters": setup.parameter_count,
        "held": held,
        "visible": visible,
        "gathered": gathered,
    }


def train_over_a_reference(folder: Path, ranks: Ranks, deepspeed: Path) -> list[int]:
    """Trains DPO; returns the memory of all tensors before the reference is loaded, and before the policy is."""
    loads: list[int] = []
    load, Setup.load_policy = Setup.load_policy, record_memory(loads)  # type: ignore[method-assign]
    try:
        overrides = (*DPO, "--do_eval=true", "--save_strategy=no")
        train(settings(folder, "dpo", *overrides), Console(quiet=True), ranks, deepspeed)
    finally:
        Setup.load_policy = load  # type: ignore[method-assign]
    return loads


def refused(work: Callable[[], Any]) -> str:
    try:
        work()
    except UserError as error:
        return str(error)
    return "nothing was refused"


def cells(folder: Path, ranks: Ranks) -> dict[str, Any]:
    quiet, deepspeed = Console(quiet=True), folder / "deepspeed.json"
    found: dict[str, Any] = {}
    for layout, overrides in LAYOUTS.items():
        found[layout] = look_at_one_step(folder, ranks, deepspeed, layout)
        gc.collect()
        train(settings(folder, layout, *overrides), quiet, ranks, deepspeed)
        gc.collect()
    # The run with rows once more from step 3, in a folder of its own. Its last step is bad on one rank at first.
    if ranks.is_first:
        config = folder / "resumed"
        config.mkdir()
        os.system(f"cp -r {folder}/rows/run {config}/run && rm -r {config}/run/checkpoints/5 {config}/run/model")
    ranks.wait()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "batch_part", poisoned(5 if ranks.is_first else 0))
        found["bad step"] = refused(lambda: train(settings(folder, "resumed"), quiet, ranks, deepspeed))
    found["saved"] = Checkpoints(folder / "resumed/run", ranks).steps()
    gc.collect()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "batch_part", poisoned(3 if ranks.is_first else 0))
        train(settings(folder, "skipping", *SKIPPING), quiet, ranks, deepspeed)
    gc.collect()
    train(settings(folder, "resumed"), quiet, ranks, deepspeed)
    gc.collect()
    train(settings(folder, "adapter", "--use_peft=true", "--do_eval=true"), quiet, ranks, deepspeed)
    gc.collect()
    train(settings(folder, "best", *BEST), quiet, ranks, deepspeed)
    gc.collect()
    found["memory"] = train_over_a_reference(folder, ranks, deepspeed)
    gc.collect()
    train(settings(folder, "bfloat16", "--dtype=bfloat16", "--save_strategy=no"), quiet, ranks, deepspeed)
    gc.collect()
    setup = Setup(settings(folder, "bfloat16-start", "--dtype=bfloat16"), ranks)
    weights = make_engine(setup, deepspeed).weights(torch.float32)
    if ranks.is_first:
        save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "start.safetensors")
    gc.collect()
    setup = Setup(settings(folder, "score"), ranks)
    pairs = setup.split_pairs("test")
    plan = setup.step_plan(pairs, batch=4, seed=None)
    with open_model(setup, deepspeed) as forward:
        found["scores"] = list(group_records(score_groups(forward, plan, pairs, ranks), setup.objective))
    gc.collect()
    found["another config"] = refused(lambda: train(settings(folder, "rows", "--beta=3.0"), quiet, ranks, deepspeed))
    found["uneven"] = refused(
        lambda: train(settings(folder, "uneven", "--global_batch_size=7"), quiet, ranks, deepspeed)
    )
    found["plain checkpoint"] = refused(
        lambda: train(settings(folder, "plain", "--resume_from_checkpoint=3"), quiet, ranks, deepspeed)
    )
    found["ranks"] = ranks.sum(np.array([1.0])).tolist()
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    with open_ranks() as ranks:
        found = cells(folder, ranks)
        if ranks.is_first:
            (folder / "found.json").write_text(json.dumps(found))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as the command does


if __name__ == "__main__":
    main()
