"""Runs torch_ref's step: `python -m benchmarks.contenders.torch_reference JOB.json DTYPE LAYOUT`.

LAYOUT `separate` stacks chosen and rejected along the batch, as the original SimPO code does. `shared+packed` lays them
out in rows, with FlexAttention on a GPU and SDPA with a dense mask on a CPU.
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.workers import Requests


def main(file: str, dtype: str, layout: str) -> None:
    requests = Requests()

    import torch

    from benchmarks.contenders.job import BETA, GAMMA_BETA_RATIO, LEARNING_RATE, MAX_LENGTH, Job
    from benchmarks.facts import cores, peak_resident_bytes
    from benchmarks.timing import seconds_of
    from jax_simpo.config import TrainConfig
    from torch_ref.batches import RankStep, build_rank_step
    from torch_ref.distributed import Ranks
    from torch_ref.setup import Setup
    from torch_ref.trainer import batch_part, make_engine

    torch.set_num_threads(cores())
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
        beta=BETA,
        gamma_beta_ratio=GAMMA_BETA_RATIO,
        learning_rate=LEARNING_RATE,
        max_length=MAX_LENGTH,
        max_prompt_length=MAX_LENGTH - 1,
        auto_insert_empty_system_msg=False,
    )
    ranks = Ranks(0, 1, torch.device("cuda" if job.device == "gpu" else "cpu"), launched=False)
    setup = Setup(config, ranks)
    pairs = setup.train_pairs()
    plan = setup.step_plan(pairs, batch=job.pairs, seed=0)
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
        step = build_rank_step(plan, pairs, number, 0, 1)
        loss = accumulate(step, len(step.micro_batches))
        engine.update(LEARNING_RATE)
        return loss

    def handle(request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] == "warm":  # one micro-batch, and an update with a learning rate of 0
            accumulate(build_rank_step(plan, pairs, 0, 0, 1), 1)
            engine.update(0.0)
            return {}
        losses: list[float] = []

        def run() -> None:
            losses.append(torch_step(request["step"]))
            if job.device == "gpu":
                torch.cuda.synchronize()

        seconds = seconds_of(run)
        peak = torch.cuda.max_memory_allocated() if job.device == "gpu" else peak_resident_bytes()
        return {"seconds": seconds, "loss": losses[0], "peak_bytes": peak}

    requests.serve(handle)


if __name__ == "__main__":
    main(*sys.argv[1:])
