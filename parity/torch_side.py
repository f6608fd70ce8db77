"""Runs the PyTorch side of the matrix, in processes of its own: `python -m parity.torch_side TASK JOB.json`.

`start` makes the random start models. `run` runs the cells: those of ZeRO-3 if torchrun started the processes, else
those of a single process. `run-gpu` runs the cells for a GPU. `crosswise` loads JAX's exports with transformers alone.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from jax_simpo.config import load_config
from jax_simpo.data.chat import load_tokenizer
from jax_simpo.data.groups import Response
from parity.cases import MESHES, SIZES, TORCH, TORCH_GPU, ZERO3, Cell, Job, step_plan
from parity.leash import end_with_leash
from parity.results import EXPORT, GRADIENTS, JAX_IN_TRANSFORMERS, TokenTable, save_results
from torch_ref.adapters import add_adapter, load_adapter
from torch_ref.batches import Batch, RankStep, build_rank_step
from torch_ref.distributed import Ranks, open_ranks
from torch_ref.engine import Engine, hugging_face_names
from torch_ref.export import export_model
from torch_ref.losses import group_losses
from torch_ref.objectives import Responses
from torch_ref.optim import learning_rate_schedule
from torch_ref.reference import reference_sums
from torch_ref.setup import Setup
from torch_ref.trainer import batch_part, make_engine


class RecordingEngine:
    """An engine that keeps the log-probs of its last batch, so that the trainer's own functions can run on it.

    Attributes:
        last_logps: the log-probs, float64.
    """

    last_logps: Tensor

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def logps(self, batch: Batch) -> Tensor:
        logps = self._engine.logps(batch)
        self.last_logps = logps.detach().double().cpu()
        return logps


def make_start(job: Job) -> None:
    """Writes the random start models and adapters.

    Norms are not one and biases not zero, so that an implementation that leaves them out is found.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    for family, values in job.new_models.items():
        config = load_config(job.configs[family])
        assert config.model_name_or_path and config.tokenizer_name_or_path
        tokenizer = load_tokenizer(config.tokenizer_name_or_path)
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        vocabulary = -(-len(tokenizer) // 8) * 8
        mapping = {**SIZES, **ids, "vocab_size": vocabulary, **values}
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(mapping.pop("model_type"), **mapping))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
        model.save_pretrained(config.model_name_or_path)
    for family, folder in job.adapters.items():
        adapted = add_adapter(load_config(job.configs[family], torch=True), _base_model(job, family))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:  # peft starts it at zero, which leaves the other matrix without a gradient
                    parameter.copy_(0.1 * torch.randn(parameter.shape))
        adapted.save_pretrained(folder)


def _base_model(job: Job, family: str) -> Any:
    """Loads the frozen model of a family with an adapter."""
    from transformers import AutoModelForCausalLM

    name = load_config(job.configs[family], torch=True).model_name_or_path
    return AutoModelForCausalLM.from_pretrained(name, attn_implementation="eager")


def _peft_name(name: str) -> str:
    """Returns a parameter's name as peft writes it, without the name of the adapter."""
    return name.replace(".default.", ".")


def start_from_adapter(engine: Engine, folder: Path) -> None:
    """Replaces the engine's random adapter by saved weights. Works in a single process, in float32."""
    start = load_file(folder / "adapter_model.safetensors")
    trained = {_peft_name(n): p for n, p in hugging_face_names(engine.policy).items() if p.requires_grad}
    assert start.keys() == trained.keys()
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(start[name])


class Run:
    """Runs one cell on these ranks."""

    def __init__(self, job: Job, cell: Cell, ranks: Ranks) -> None:
        self.job, self.ranks, self.folder = job, ranks, job.results_folder(cell)
        config = job.config(cell)
        self.setup = Setup(config, ranks)
        self.pairs = self.setup.train_pairs()
        self.plan = step_plan(job, config, self.pairs.lengths)
        deepspeed_file = job.deepspeed_file if ranks.launched else None
        self.reference = None
        if self.setup.objective.needs_reference:
            (self.reference,) = reference_sums(self.setup, [self.pairs], Console(quiet=True), deepspeed_file)
        self.known = self.setup.known(self.pairs, self.reference, training=True)
        self.engine = make_engine(self.setup, deepspeed_file)
        if cell.family in job.adapters:
            start_from_adapter(self.engine, Path(job.adapters[cell.family]))
        self.schedule = learning_rate_schedule(config, job.steps)

    def step(self, number: int) -> RankStep:
        """Builds this rank's share of a step."""
        ranks = self.ranks
        return build_rank_step(self.plan, self.pairs, number, ranks.rank, ranks.world, self.known)

    def accumulate(self, step: RankStep) -> tuple[TokenTable, dict[str, float]]:
        """Adds up the gradients of a step. Returns its log-probs and metrics over all ranks."""
        objective, engine = self.setup.objective, RecordingEngine(self.engine)
        table = TokenTable(step.lengths)
        sums = np.zeros(len(objective.metrics))
        for number, batch in enumerate(step.micro_batches, start=1):
            part = batch_part(engine, objective, batch.to(self.ranks.device), step)  # type: ignore[arg-type]
            self._put(table, batch, engine.last_logps)
            self.engine.backward(part.loss, last=number == len(step.micro_batches))
            sums += part.metrics.double().cpu().numpy()
        table.logps = self.ranks.sum(table.logps)
        return table, dict(zip(objective.metrics, self.ranks.sum(sums).tolist(), strict=True))

    def logps(self, step: RankStep) -> TokenTable:
        """Computes the log-probs of a step's pairs with the current weights."""
        table = TokenTable(step.lengths)
        with torch.no_grad():
            for batch in step.micro_batches:
                self._put(table, batch, self.engine.logps(batch.to(self.ranks.device)).double().cpu())
        table.logps = self.ranks.sum(table.logps)
        return table

    @staticmethod
    def _put(table: TokenTable, batch: Batch, logps: Tensor) -> None:
        owners = (
            (group, place)
            for group, ranking in zip(batch.groups.tolist(), batch.rankings, strict=True)
            for place in range(len(ranking))
        )
        for response, (group, place) in enumerate(owners):
            table.put(group, place, logps[batch.target_response == response].numpy())

    def _losses(self, table: TokenTable, step: RankStep) -> np.ndarray:
        """Computes the loss of every group of a step from the log-probs of its targets."""
        known = self.known.of(step.groups, self.plan.lengths.responses_of(step.groups))
        reference = None if known.reference is None else torch.from_numpy(known.reference)
        responses = Responses(torch.from_numpy(table.sums), torch.from_numpy(table.lengths), reference)
        objective = self.setup.objective
        compared = objective.comparisons(step.rankings, known.scores)
        losses: np.ndarray = group_losses(objective, responses, compared).numpy()
        return losses

    def run(self) -> None:
        """Runs the steps and writes the results."""
        records, first, table = [], self.step(0), None
        for k in range(self.job.steps):
            step_table, metrics = self.accumulate(first if k == 0 else self.step(k))
            if k == 0:
                table = step_table
                self._save_gradients()
            norm = self.engine.gradient_norm()
            self.engine.update(self.schedule(k), norm)
            records.append({**metrics, "grad_norm": norm})
        assert table is not None
        self.engine.policy.eval()
        final = self.logps(first)
        export_model(self.engine, self.folder / EXPORT, "float32", self.setup.tokenizer, self.ranks)
        if self.ranks.is_first:
            losses = self._losses(table, first)
            facts = {"attention": self.setup.attention.name, "engine": self.engine.name, "torch": torch.__version__}
            save_results(self.folder, table=table, losses=losses, steps=records, final=final, facts=facts)

    def _save_gradients(self) -> None:
        gradients = self.engine.gradients()
        if self.ranks.is_first:
            folder = self.folder / GRADIENTS
            folder.mkdir(parents=True, exist_ok=True)
            tensors = {_peft_name(name): gradient.float().cpu().contiguous() for name, gradient in gradients.items()}
            save_file(tensors, folder / "model.safetensors")


def crosswise(job: Job) -> None:
    """Loads JAX's exports with transformers alone and computes their log-probs, one plain sequence at a time."""
    from transformers import AutoModelForCausalLM

    for cell in (c for c in job.cells if c.backend in MESHES and c.dtype == "float32"):
        setup = Setup(job.config(cell), Ranks(0, 1, torch.device("cpu"), launched=False))
        pairs = setup.train_pairs()
        plan = step_plan(job, job.config(cell), pairs.lengths)
        export = job.results_folder(cell) / EXPORT
        if cell.family in job.adapters:
            model = load_adapter(_base_model(job, cell.family), str(export))
        else:
            model = AutoModelForCausalLM.from_pretrained(export, attn_implementation="eager")
        groups = plan.groups(0)
        table = TokenTable(plan.lengths.of_groups(groups))
        for number, group in enumerate(pairs.groups(groups)):
            for place, response in enumerate(group.responses):
                table.put(number, place, sequence_logps(model, response))
        np.save(job.results_folder(cell) / JAX_IN_TRANSFORMERS, table.logps)


@torch.no_grad()
def sequence_logps(model: Any, response: Response) -> np.ndarray:
    """Returns the log-prob of each scored token, from the full logits of that sequence alone."""
    tokens, scored = torch.from_numpy(response.ids.astype(np.int64)), torch.from_numpy(response.scored)
    logits = model(input_ids=tokens[None, :-1], use_cache=False).logits[0, scored - 1].float()
    return logits.log_softmax(-1).gather(-1, tokens[scored, None])[:, 0].double().numpy()


def main() -> None:
    task, job = sys.argv[1], Job.load(sys.argv[2])
    if task == "start":
        make_start(job)
    elif task == "crosswise":
        crosswise(job)
    else:
        end_with_leash()
        with open_ranks() as ranks:
            backends = tuple(TORCH_GPU) if task == "run-gpu" else (ZERO3 if ranks.launched else TORCH,)
            for cell in (c for c in job.cells if c.backend in backends):
                if ranks.is_first:
                    print(cell.name, flush=True)
                Run(job, cell, ranks).run()
                gc.collect()
        if ranks.launched:
            sys.stdout.flush()
            os._exit(0)  # DeepSpeed's remains may abort Python's normal shutdown; torch_ref does the same


if __name__ == "__main__":
    main()
