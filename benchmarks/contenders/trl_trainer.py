"""Runs TRL's `CPOTrainer` with the SimPO loss: `python -m benchmarks.contenders.trl_cpo JOB.json DTYPE`.

The settings are TRL's fastest for this batch: no evaluation, no checkpoints, no reports, no gradient checkpointing
unless all contenders have it, the fused optimizer, all cores, and no loss on chosen tokens (cpo_alpha 0). bfloat16 is
the Trainer's `bf16`, autocast over float32 weights. A step takes all pairs, `stacked_batch` at a time.
"""

from __future__ import annotations

import sys
import time
import warnings
from typing import Any

from benchmarks.workers import Requests

MANY_STEPS = 10**6


def main(file: str, dtype: str) -> None:
    requests = Requests()
    warnings.simplefilter("ignore")  # TRL and the Trainer warn about their own future

    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    from benchmarks.contenders.job import BETA, GAMMA_BETA_RATIO, LEARNING_RATE, MAX_LENGTH, Job
    from benchmarks.facts import cores, peak_resident_bytes
    from jax_simpo.data import chat

    torch.set_num_threads(cores())
    job = Job.load(file)
    data = Dataset.from_list([vars(text) for text in job.texts()])
    model = AutoModelForCausalLM.from_pretrained(job.start, dtype=torch.float32)

    def trainer(accumulation: int, steps: int, learning_rate: float, **arguments: Any) -> Any:
        settings = CPOConfig(
            output_dir=f"{job.work}/trl",
            loss_type="simpo",
            cpo_alpha=0.0,
            beta=BETA,
            simpo_gamma=BETA * GAMMA_BETA_RATIO,
            max_length=MAX_LENGTH,
            per_device_train_batch_size=job.stacked_batch,
            gradient_accumulation_steps=accumulation,
            max_steps=steps,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=job.device == "cpu",
            bf16=dtype == "bfloat16",
            gradient_checkpointing=job.remat != "none",
            disable_tqdm=True,
        )
        return CPOTrainer(
            model=model,
            args=settings,
            train_dataset=data,
            processing_class=chat.load_tokenizer(job.tokenizer),
            **arguments,
        )

    class StepsOnRequest(TrainerCallback):
        """Waits for a request before each step and answers after it."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if requests.next() is None:
                control.should_training_stop = True
            self.started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if job.device == "gpu":
                torch.cuda.synchronize()
            self.seconds = time.perf_counter() - self.started

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs and "train_runtime" not in logs:
                peak = torch.cuda.max_memory_allocated() if job.device == "gpu" else peak_resident_bytes()
                requests.answer({"seconds": self.seconds, "loss": float(logs["loss"]), "peak_bytes": peak})

    assert (requests.next() or {}).get("do") == "warm"
    warm_up = trainer(1, 1, 0.0)  # one micro-batch, and an update with a learning rate of 0
    warm_up.train()
    requests.answer({})
    # The timed steps use the same optimizer, so that they do not have to allocate its state.
    optimizer = getattr(warm_up.optimizer, "optimizer", warm_up.optimizer)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = LEARNING_RATE
    timed = trainer(
        job.pairs // job.stacked_batch,
        MANY_STEPS,
        LEARNING_RATE,
        optimizers=(optimizer, None),
        callbacks=[StepsOnRequest()],
    )
    timed.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
