"""Runs jax-simpo's step, prefix shared and packed: `python -m benchmarks.contenders.ours JOB.json DTYPE [CHUNK]`.

CHUNK is the config key `logprob_chunk`. By default it is `auto`, which keeps the logits for the backward pass where
memory allows; a number of tokens never keeps them.

For an objective with a reference the program's own scoring computes the log-probs under it first, and its weights are
freed.
"""

from __future__ import annotations

import gc
import sys
from dataclasses import replace
from typing import Any

from benchmarks.workers import Requests


def main(file: str, dtype: str, chunk: str = "auto") -> None:
    requests = Requests()

    import jax

    from benchmarks.contenders.job import MAX_LENGTH, OBJECTIVES, Job
    from benchmarks.facts import forget_peak, peak_resident_bytes
    from benchmarks.lengths import Pairs
    from benchmarks.steps import ReferencePass, Trainee, one_device, step_plan
    from benchmarks.timing import timed
    from jax_simpo import hf
    from jax_simpo.data import chat
    from jax_simpo.data.tokenize import tokenize_group
    from jax_simpo.models.transformer import Model
    from jax_simpo.objectives import make_objective

    job = Job.load(file)
    tokenizer = chat.load_tokenizer(job.tokenizer)
    pairs = Pairs(
        [
            tokenize_group(
                text, tokenizer, max_length=MAX_LENGTH, max_prompt_length=MAX_LENGTH - 1, truncation_mode="keep_end"
            )
            for text in job.texts()
        ]
    )
    config, _ = hf.load_model_config(job.start)
    # Without checkpointing TRL and torch_ref keep all activations; `dots` recomputes the cheap ones and is faster.
    model = Model(config, dtype, "dots" if job.remat == "none" else job.remat)  # type: ignore[arg-type]
    mesh = one_device()
    plan = step_plan(model, pairs, "shared+packed", batch=job.pairs)
    objective = make_objective({job.objective: 1.0}, OBJECTIVES[job.objective])
    trainee = Trainee(model, plan, pairs, mesh, chunk="auto" if chunk == "auto" else int(chunk), objective=objective)
    print(f"rows: {plan.shape}, {plan.step(0).micro_batches} micro-batches, {trainee.backends.reason}")

    def peak() -> int:
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use") or peak_resident_bytes()

    with jax.set_mesh(mesh):
        if job.reference is not None:
            sums = ReferencePass(trainee).sums(hf.load_params(job.reference, model, mesh))
            trainee = replace(trainee, reference=sums)
            gc.collect()
            forget_peak()  # the peak of a GPU cannot be forgotten, but the pass takes less than a step
        weights = trainee.fresh_weights(hf.load_params(job.start, model, mesh))

        def handle(request: dict[str, Any]) -> dict[str, Any]:
            if request["do"] == "warm":  # compiles, then loads the start model again for the first timed loss
                trainee.compute(weights, trainee.build(0))
                weights.params = weights.state = None
                fresh = trainee.fresh_weights(hf.load_params(job.start, model, mesh))
                weights.params, weights.state = fresh.params, fresh.state
                return {}
            metrics, seconds = timed(lambda: trainee.compute(weights, trainee.build(request["step"])))
            return {
                **{"seconds": seconds, "loss": metrics["loss"], "peak_bytes": peak()},
                "backends": trainee.backends.reason,
            }

        requests.serve(handle)


if __name__ == "__main__":
    main(*sys.argv[1:])
