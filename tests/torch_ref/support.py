"""Tiny random models of three families, random groups, and the oracle: each sequence run alone by transformers."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jax_simpo.config import TrainConfig
from jax_simpo.data.groups import Group, GroupLengths, Response
from jax_simpo.data.loader import Known
from jax_simpo.data.packing import make_step_plan
from jax_simpo.data.tree import common_prefix_length
from tests.objectives.oracles import Numbers
from tests.pairs import random_pairs
from torch_ref.attention_choice import choose_attention
from torch_ref.batches import Batch, RankStep, build_rank_step
from torch_ref.losses import StepPart, response_sums
from torch_ref.model import Policy, load_model_config, load_policy
from torch_ref.objectives import Objective, Responses, Settings
from torch_ref.setup import Setup
from torch_ref.trainer import batch_part

VOCABULARY = 96
CPU = torch.device("cpu")
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "mistral with a window": {"model_type": "mistral", "sliding_window": 8},
    "gemma2 with soft caps": {
        "model_type": "gemma2",
        "head_dim": 8,
        "sliding_window": 8,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
}
LAYOUTS = {
    "shared and packed": (True, True),
    "shared": (True, False),
    "packed": (False, True),
    "stacked": (False, False),
}


@dataclass(frozen=True)
class Groups:
    """Groups in memory, with the interface of a dataset."""

    all: list[Group]

    def groups(self, indices: Any) -> list[Group]:
        return [self.all[i] for i in indices]


def some_pairs(count: int, seed: int = 0) -> Groups:
    return Groups(random_pairs(np.random.default_rng(seed), count, VOCABULARY, prompt=(2, 30), response=(1, 20)))


RANKS = ((0, 1, 1, 2), (0, 1), (0, 0, 1), (0, 1, 2, 3, 4), (0, 1, 1, 1))
"""Rankings of groups of several sizes, with ties among the best, in the middle and among the worst."""


def some_groups(seed: int = 0, ranks: Sequence[tuple[int, ...]] = RANKS) -> Groups:
    """A group for each ranking; many responses are scored in several spans, and many begin alike for a while."""
    rng = np.random.default_rng(seed)
    return Groups([_random_group(rng, of_group) for of_group in ranks])


def _random_group(rng: np.random.Generator, ranks: tuple[int, ...]) -> Group:
    prompt, stem = (rng.integers(1, VOCABULARY, size).tolist() for size in (rng.integers(3, 12), 9))
    responses = []
    for number in range(len(ranks)):
        own = rng.integers(1, VOCABULARY, rng.integers(4, 12)).tolist()
        ids = np.array([*prompt, *stem[: rng.integers(0, 9)], *own], np.int32)
        start, stop = len(prompt), len(ids)
        # The second span begins right at the last token, or somewhere before; between them are tokens that only count
        # as context.
        cuts = np.sort(rng.choice(np.arange(start + 1, stop), 2, replace=False)).tolist()
        spans = ((start, stop),) if number % 3 == 2 else ((start, cuts[0]), (cuts[1], stop))
        responses.append(Response(ids, spans))
    return Group(tuple(responses), ranks, tuple(-1.5 * rank for rank in ranks))


def settings(layout: str = "shared and packed", **keys: Any) -> TrainConfig:
    sharing, packing = LAYOUTS[layout]
    base: dict[str, Any] = {
        "tokenizer_name_or_path": "builtin:cafe",
        "dataset_mixer": {"builtin:cafe": 1.0},
        "dtype": "float32",
        "remat": "none",
        "prefix_sharing": sharing,
        "packing": packing,
        "logprob_chunk": 16,
    }
    if "model_name_or_path" not in keys:
        base["model_config"] = FAMILIES["llama"]
    return TrainConfig(**{**base, **keys})


def make_policy(family: str, layout: str, **keys: Any) -> Policy:
    """The same weights for every layout."""
    config = settings(layout, **keys)
    model_config = load_model_config(config, None, {**SIZES, **FAMILIES[family]})
    attention = choose_attention(config, model_config, CPU)
    return load_policy(config, model_config, attention, CPU, dtype=torch.float32)


def step_of(
    groups: Groups,
    layout: str,
    *,
    rank: int = 0,
    world: int = 1,
    rows: int = 2,
    prompts: bool = False,
    known: Known | None = None,
) -> RankStep:
    """One rank's share of a step with all groups in file order."""
    sharing, packing = LAYOUTS[layout]
    lengths = GroupLengths.of(groups.all)
    plan = make_step_plan(
        lengths,
        global_batch_size=len(lengths),
        rows_per_micro_batch=rows * world,
        row_length=256 if packing else None,
        max_row_length=256,
        prefix_sharing=sharing,
        packing=packing,
        prompt_targets=prompts,
    )
    return build_rank_step(plan, groups, 0, rank, world, known)


def own_responses(step: RankStep, batch: Batch) -> Tensor:
    """The numbers of a batch's responses in its step."""
    return torch.from_numpy(step.lengths.responses_of(batch.groups.numpy()))


def sums_of(policy: Policy, step: RankStep) -> Tensor:
    """Sum of log-probs of each response of a step, group after group: [R]."""
    total = torch.zeros(len(step.lengths.ranks))
    for batch in step.micro_batches:
        sums = response_sums(policy(batch), batch.target_response, len(batch.response_length))
        total = total.index_add(0, own_responses(step, batch), sums)
    return total


def oracle_logps(causal_lm: nn.Module, response: Response) -> Tensor:
    """Log-prob of each scored token, from transformers' full logits of that sequence alone."""
    ids = torch.from_numpy(response.ids.astype(np.int64))
    logits = causal_lm(input_ids=ids[None, :-1], use_cache=False).logits[0].float()
    every = logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
    return torch.cat([every[start - 1 : stop - 1] for start, stop in response.spans])


def oracle_sums(policy: Policy, groups: Groups) -> Tensor:
    """Sum of log-probs of each response, group after group: [R]."""
    causal_lm = policy.causal_lm
    causal_lm.set_attn_implementation("eager")
    return torch.stack([oracle_logps(causal_lm, r).sum() for group in groups.all for r in group.responses])


def oracle_prompt_sums(policy: Policy, groups: Groups) -> Tensor:
    """Sum of log-probs of the prompt of each group's first response, but its first token: [G]."""
    causal_lm = policy.causal_lm
    causal_lm.set_attn_implementation("eager")
    prompts = [group.best.ids[: group.best.prompt_length] for group in groups.all]
    return torch.stack([oracle_logps(causal_lm, Response.after(1, ids)).sum() for ids in prompts])


def lengths_of(groups: Groups) -> Tensor:
    """The number of scored tokens of each response, group after group: [R]."""
    return torch.tensor([len(r.targets) for group in groups.all for r in group.responses])


def part_of(engine: Any, objective: Objective, step: RankStep) -> tuple[Tensor, Tensor]:
    """The loss and the metrics of a rank's share of a step."""
    parts = [batch_part(engine, objective, batch, step) for batch in step.micro_batches]
    return torch.stack([p.loss for p in parts]).sum(), torch.stack([p.metrics for p in parts]).sum(0)


def gradients(policy: nn.Module, value: Tensor) -> dict[str, Tensor]:
    policy.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def edited(group: Group, rng: np.random.Generator) -> Group:
    """The group with other tokens in its first response, from the second after where it leaves all others."""
    first, *others = group.responses
    ids = first.ids.copy()
    start = max(common_prefix_length(ids, other.ids) for other in others) + 1
    ids[start:] = rng.integers(1, VOCABULARY, len(ids) - start)
    return replace(group, responses=(replace(first, ids=ids), *others))


def objective_of(name: str, **settings: Any) -> Objective:
    return Objective({name: 1.0}, Settings(**settings))


def of_means(means: Any) -> Responses:
    """Responses of one token, so that sums and means are the same."""
    return Responses(torch.as_tensor(means), torch.ones(len(means), dtype=torch.long))


def responses_of(n: Numbers) -> tuple[Responses, Responses]:
    """The chosen and the rejected responses."""
    columns = {name: torch.from_numpy(values) for name, values in n.items()}
    chosen, rejected = (
        Responses(columns[f"{side}_sum"], columns[f"{side}_length"].long(), columns[f"{side}_reference"])
        for side in ("chosen", "rejected")
    )
    return chosen, rejected


def losses_and_gradients(objective: Objective, n: Numbers) -> tuple[np.ndarray, list[np.ndarray]]:
    """Losses, and the gradients of their sum by the sums of chosen and rejected."""
    sides = [replace(side, sum=side.sum.clone().requires_grad_()) for side in responses_of(n)]
    losses = objective.losses(*sides)
    gradients = torch.autograd.grad(losses.sum(), [side.sum for side in sides])
    return losses.detach().numpy(), [g.numpy() for g in gradients]


def tensor_bytes() -> int:
    """The memory of all tensors of this process."""
    gc.collect()
    tensors = (thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter))
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def record_memory(loads: list[int]) -> Callable[..., Policy]:
    """`Setup.load_policy`, which first notes the memory of all tensors."""
    load = Setup.load_policy

    def recorded(*arguments: Any, **keys: Any) -> Policy:
        loads.append(tensor_bytes())
        return load(*arguments, **keys)

    return recorded


def poisoned(at: int) -> Callable[..., StepPart]:
    """`batch_part` with gradients of NaN in step `at`. Its metrics are as they should be."""

    def part(engine: Any, objective: Objective, batch: Batch, step: RankStep) -> StepPart:
        good = batch_part(engine, objective, batch, step)
        return replace(good, loss=good.loss * float("nan")) if step.step + 1 == at else good

    return part
