"""Runs TRL's step: `python -m benchmarks.contenders.trl_trainer JOB.json DTYPE`.

SimPO is `CPOTrainer` with its SimPO loss, DPO is `DPOTrainer`. The settings are TRL's fastest for this batch: no
evaluation, no checkpoints, no reports, no gradient checkpointing unless all contenders have it, the fused optimizer,
all cores, and no loss on chosen tokens (cpo_alpha 0). bfloat16 is the Trainer's `bf16`, autocast over float32 weights.
A step takes all pairs, `stacked_batch` at a time.

`DPOTrainer` computes the log-probs of the reference before it trains (`precompute_ref_log_probs`). It keeps a reference
that is not the start model in memory nevertheless, so this script drops it: neither a step nor the peak has it.
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

    from benchmarks.contenders.job import LEARNING_RATE, MAX_LENGTH, OBJECTIVES, Job, as_pair
    from benchmarks.contenders.torch_memory import forget_peak, peak_bytes
    from benchmarks.facts import cores
    from jax_simpo.data import chat

    torch.set_num_threads(cores())
    job = Job.load(file)
    keys = OBJECTIVES[job.objective]
    if job.objective == "dpo":
        from trl import DPOConfig as Config
        from trl import DPOTrainer as Trainer

        objective: dict[str, Any] = {"loss_type": "sigmoid", "precompute_ref_log_probs": True}
    else:
        from trl.experimental.cpo import CPOConfig as Config
        from trl.experimental.cpo import CPOTrainer as Trainer

        gamma = keys["beta"] * keys["gamma_beta_ratio"]
        objective = {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": gamma}

    def load(folder: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    data = Dataset.from_list([as_pair(text) for text in job.texts()])
    model = load(job.start)

    def trainer(pairs: int, steps: int, learning_rate: float, **arguments: Any) -> Any:
        settings = Config(
            output_dir=f"{job.work}/trl",
            beta=keys["beta"],
            max_length=MAX_LENGTH,
            per_device_train_batch_size=job.stacked_batch,
            gradient_accumulation_steps=pairs // job.stacked_batch,
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
            **objective,
        )
        reference = {} if job.reference is None else {"ref_model": load(job.reference)}
        made = Trainer(
            model=model,
            args=settings,
            train_dataset=data.select(range(pairs)),
            processing_class=chat.load_tokenizer(job.tokenizer),
            **reference,
            **arguments,
        )
        if reference:  # its log-probs are computed
            made.ref_model = None
        return made

    class StepsOnRequest(TrainerCallback):
        """Waits for a request before each step and answers after it."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if job.reference is not None:
                forget_peak(job.device)

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
                loss, peak = float(logs["loss"]), peak_bytes(job.device)
                requests.answer({"seconds": self.seconds, "loss": loss, "peak_bytes": peak})

    assert (requests.next() or {}).get("do") == "warm"
    warm_up = trainer(job.stacked_batch, 1, 0.0)  # one micro-batch, and an update with a learning rate of 0
    warm_up.train()
    requests.answer({})
    # The timed steps use the same optimizer, so that they do not have to allocate its state.
    optimizer = getattr(warm_up.optimizer, "optimizer", warm_up.optimizer)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = LEARNING_RATE
    timed = trainer(job.pairs, MANY_STEPS, LEARNING_RATE, optimizers=(optimizer, None), callbacks=[StepsOnRequest()])
    timed.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
