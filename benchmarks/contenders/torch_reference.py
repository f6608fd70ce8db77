"""Runs torch_ref's step: `python -m benchmarks.contenders.torch_reference JOB.json DTYPE LAYOUT`.

LAYOUT `separate` stacks chosen and rejected along the batch, as the original SimPO code does. `shared+packed` lays them
out in rows, with FlexAttention on a GPU, compiled or not at all (`benchmarks/flex.py`), and SDPA with a dense mask on
a CPU. For an objective with a reference the
trainer's own pass computes the log-probs under it first, and frees its weights.
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.workers import Requests


def main(file: str, dtype: str, layout: str) -> None:
    requests = Requests()

    import torch
    from rich.console import Console

    from benchmarks.contenders.job import LEARNING_RATE, MAX_LENGTH, OBJECTIVES, Job
    from benchmarks.contenders.torch_memory import forget_peak, peak_bytes
    from benchmarks.facts import cores
    from benchmarks.flex import compile_or_raise
    from benchmarks.timing import timed
    from jax_simpo.config import TrainConfig
    from torch_ref.batches import RankStep, build_rank_step
    from torch_ref.distributed import Ranks
    from torch_ref.reference import reference_sums
    from torch_ref.setup import Setup
    from torch_ref.trainer import batch_part, make_engine

    torch.set_num_threads(cores())
    compile_or_raise()
    job = Job.load(file)
    rows = layout == "shared+packed"
    config = TrainConfig(
        model_name_or_path=str(job.start),
        tokenizer_name_or_path=job.tokenizer,
        dataset_mixer={str(job.rows): 1.0},
        data_cache_dir=f"{job.work}/cache",
        dtype=dtype,  # type: ignore[arg-type]
        prefix_sharing=rows,
        packing=rows,
        rows_per_device=1 if rows else job.stacked_batch,
        global_batch_size=job.pairs,
        logprob_chunk=1024,
        remat=job.remat,  # type: ignore[arg-type]
        objective=job.objective,
        **OBJECTIVES[job.objective],
        ref_model_name_or_path=None if job.reference is None else str(job.reference),
        learning_rate=LEARNING_RATE,
        max_length=MAX_LENGTH,
        max_prompt_length=MAX_LENGTH - 1,
        auto_insert_empty_system_msg=False,
    )
    ranks = Ranks(0, 1, torch.device("cuda" if job.device == "gpu" else "cpu"), launched=False)
    setup = Setup(config, ranks)
    pairs = setup.train_pairs()
    plan = setup.step_plan(pairs, batch=job.pairs, seed=0)
    reference = None
    if setup.objective.needs_reference:
        (reference,) = reference_sums(setup, [pairs], Console())
        forget_peak(job.device)
    known = setup.known(pairs, reference)
    engine = make_engine(setup)
    engine.policy.train()

    def accumulate(step: RankStep, micro_batches: int) -> float:
        loss = 0.0
        for number, batch in enumerate(step.micro_batches[:micro_batches], start=1):
            part = batch_part(engine, setup.objective, batch.to(ranks.device), step)
            engine.backward(part.loss, last=number == micro_batches)
            loss += float(part.loss)
        return loss

    def torch_step(number: int) -> float:
        step = build_rank_step(plan, pairs, number, 0, 1, known)
        loss = accumulate(step, len(step.micro_batches))
        engine.update(LEARNING_RATE, engine.gradient_norm())
        if job.device == "gpu":
            torch.cuda.synchronize()
        return loss

    def handle(request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] == "warm":  # one micro-batch, and an update with a learning rate of 0
            accumulate(build_rank_step(plan, pairs, 0, 0, 1, known), 1)
            engine.update(0.0, engine.gradient_norm())
            return {}
        loss, seconds = timed(lambda: torch_step(request["step"]))
        return {"seconds": seconds, "loss": loss, "peak_bytes": peak_bytes(job.device)}

    requests.serve(handle)


if __name__ == "__main__":
    main(*sys.argv[1:])
