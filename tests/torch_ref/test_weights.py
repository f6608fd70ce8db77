"""Weights of pairs: what they do to the loss and its gradients, and what they leave alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from jax_simpo.data.loader import Known
from jax_simpo.run.metrics import read_metrics
from tests.torch_ref.start import config_file, make_start
from tests.torch_ref.support import (
    LAYOUTS,
    Groups,
    gradients,
    lengths_of,
    make_policy,
    objective_of,
    oracle_prompt_sums,
    oracle_sums,
    part_of,
    some_groups,
    some_pairs,
    step_of,
)
from torch_ref.__main__ import app
from torch_ref.batches import RankStep
from torch_ref.objectives import Objective

OBJECTIVE = replace(objective_of("simpo", beta=2.5, gamma_beta_ratio=0.55), sft_weight=0.3)
WEIGHTS = np.array([0.0, 0.7, 1.4, 2.1, 0.3], np.float32)


def loss_of(policy: Any, step: RankStep, objective: Objective) -> Tensor:
    return part_of(SimpleNamespace(logps=policy), objective, step)[0]


def expected_loss(policy: Any, pairs: Groups, *, prompts: bool) -> Tensor:
    """The weighted loss from the log-probs of each sequence alone; it divides by numbers of pairs and of tokens."""
    sums, weights = oracle_sums(policy, pairs).reshape(-1, 2), torch.from_numpy(WEIGHTS)
    lengths = lengths_of(pairs).reshape(-1, 2)
    margins = 2.5 * (sums / lengths).diff(dim=1)[:, 0].neg() - 2.5 * 0.55
    preference = (weights * torch.log1p(torch.exp(-margins))).sum() / len(weights)
    targets, tokens = sums[:, 0], int(lengths[:, 0].sum())
    if prompts:
        targets = targets + oracle_prompt_sums(policy, pairs)
        tokens = sum(len(p.responses[0].inputs) for p in pairs.all)
    return preference - 0.3 * (weights * targets).sum() / tokens


@pytest.mark.parametrize("prompts", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_weight_multiplies_what_its_pair_adds_to_the_loss(layout: str, prompts: bool) -> None:
    pairs, policy = some_pairs(5), make_policy("llama", layout)
    objective = replace(OBJECTIVE, sft_over="prompt_and_response" if prompts else "response")
    known = Known(weights=WEIGHTS)
    shares = [step_of(pairs, layout, rank=rank, world=2, rows=1, prompts=prompts, known=known) for rank in range(2)]
    loss = torch.stack([loss_of(policy, share, objective) for share in shares]).sum()
    found = gradients(policy, loss)
    oracle = expected_loss(policy, pairs, prompts=prompts)
    torch.testing.assert_close(loss, oracle, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients(policy, oracle).items():
        distance = torch.linalg.norm(found[name] - gradient) / torch.linalg.norm(gradient)
        assert distance < 1e-5, name


@pytest.mark.parametrize("groups", [some_pairs(5), some_groups()], ids=["pairs", "groups"])
@pytest.mark.parametrize("layout", ["shared and packed", "stacked"])
def test_the_targets_of_a_group_with_weight_0_have_no_gradient_and_all_others_have_one(
    layout: str, groups: Groups
) -> None:
    step = step_of(groups, layout, prompts=True, rows=5, known=Known(weights=WEIGHTS))
    (batch,) = step.micro_batches
    logps = torch.linspace(-3.0, -0.5, len(batch.target_token)).requires_grad_()
    loss_of(lambda _: logps, step, replace(OBJECTIVE, sft_over="prompt_and_response")).backward()
    (weightless,) = torch.nonzero(batch.groups == 0)[0].tolist()
    first = sum(map(len, batch.rankings[:weightless]))
    responses = range(first, first + len(batch.rankings[weightless]))
    prompt = len(batch.response_length) + weightless
    own = torch.isin(batch.target_response, torch.tensor([*responses, prompt]))
    assert logps.grad is not None and own.any()
    assert torch.equal(logps.grad == 0, own)


# --- a run


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_start(tmp_path_factory.mktemp("start"))


def run(start: Path, folder: Path, **keys: Any) -> list[Mapping[str, Any]]:
    """The records of three steps and an evaluation before and after, without what depends on time."""
    file = config_file(start, folder, steps=3, do_eval=True, save_strategy="no", **keys)
    app(["train", str(file)], standalone_mode=False)
    timed = ("tokens_per_second", "pairs_per_second", "eval_runtime")
    return [{k: v for k, v in record.items() if k not in timed} for record in read_metrics(folder / "run")]


def test_weights_of_a_column_reach_the_loss_and_nothing_else(start: Path, tmp_path: Path) -> None:
    without, weighted = run(start, tmp_path / "a"), run(start, tmp_path / "b", weight_column="weight")
    assert weighted[0] == without[0]  # the evaluation counts every pair once
    differing = {key for key in without[1] if weighted[1][key] != without[1][key]}
    assert differing == {"loss", "sft_loss", "grad_norm"}
    assert weighted[-1] != without[-1]


def test_a_column_of_ones_changes_no_bit(start: Path, tmp_path: Path) -> None:
    ones = tmp_path / "ones"
    ones.mkdir()
    for split in ("train", "test"):
        text = (start.parent / f"{split}.jsonl").read_text()
        (ones / f"{split}.jsonl").write_text(text.replace('"chosen"', '"one": 1, "chosen"'))
    assert run(start, tmp_path / "a", dataset_mixer={str(ones): 1.0}, weight_column="one") == run(start, tmp_path / "b")
