"""The objective against the original's check values, TRL, and its own bookkeeping."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from torch_ref.losses import Objective, response_sums, step_part

CHOSEN, REJECTED = torch.tensor([-0.5, -1.0, -0.8]), torch.tensor([-0.9, -0.7, -0.8])


@pytest.fixture(scope="module")
def trl() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's own, about its future
        from trl.experimental.cpo import CPOTrainer
    return CPOTrainer


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.898123, 2.237822, 1.600413]),
        ({"label_smoothing": 0.1}, [0.860623, 2.025322, 1.462913]),
        ({"loss_type": "hinge"}, [1.375, 3.125, 2.375]),
    ],
)
def test_losses_are_those_of_the_original_code(settings: dict[str, Any], expected: list[float]) -> None:
    losses = Objective(beta=2.5, gamma_beta_ratio=0.55, **settings).losses(CHOSEN, REJECTED)
    np.testing.assert_allclose(losses, expected, atol=5e-7)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_losses_are_trls(trl: Any, smoothing: float) -> None:
    rng = torch.Generator().manual_seed(0)
    chosen, rejected = (-5 * torch.rand(50, generator=rng) for _ in range(2))
    trainer = SimpleNamespace(
        alpha=0.0,
        accelerator=SimpleNamespace(device="cpu"),
        loss_type="simpo",
        beta=2.5,
        simpo_gamma=2.5 * 0.55,
        label_smoothing=smoothing,
    )
    oracle, _, _ = trl.cpo_loss(trainer, chosen, rejected)
    ours = Objective(2.5, 0.55, label_smoothing=smoothing).losses(chosen, rejected)
    torch.testing.assert_close(ours, oracle, atol=1e-6, rtol=1e-6)


def test_mean_log_probs_are_trls(trl: Any) -> None:
    rng = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 9, 20, generator=rng)
    labels = torch.randint(0, 20, (4, 9), generator=rng)
    labels[torch.rand(4, 9, generator=rng) < 0.3] = -100
    labels[:, 1] = 3
    oracle = trl.get_batch_logps(logits, labels, average_log_prob=True)
    line, at = torch.nonzero(labels[:, 1:] != -100, as_tuple=True)
    logps = logits[line, at].log_softmax(-1).gather(-1, labels[line, at + 1][:, None])[:, 0]
    ours = response_sums(logps, line, 4) / torch.bincount(line, minlength=4)
    torch.testing.assert_close(ours, oracle, atol=1e-6, rtol=1e-6)


def test_parts_of_a_step_add_up_to_the_step() -> None:
    objective = Objective(2.5, 0.55, sft_weight=0.3)
    sums = torch.tensor([[-3.0, -8.0], [-9.0, -2.0], [-4.0, -4.5]])
    lengths = torch.tensor([[2, 5], [6, 2], [3, 3]])

    def part(lines: list[int]) -> Any:
        return step_part(
            objective,
            chosen_sum=sums[lines, 0],
            rejected_sum=sums[lines, 1],
            chosen_length=lengths[lines, 0],
            rejected_length=lengths[lines, 1],
            step_pairs=3,
            step_chosen_tokens=11,
        )

    whole, parts = part([0, 1, 2]), [part([0]), part([1, 2]), part([])]
    torch.testing.assert_close(sum(p.metrics for p in parts), whole.metrics)
    named = dict(zip(objective.metrics, whole.metrics.tolist(), strict=True))
    chosen, rejected = (sums / lengths).unbind(1)
    assert named["rewards/margins"] == pytest.approx(2.5 * float((chosen - rejected).mean()))  # without gamma
    assert named["sft_loss"] == pytest.approx(16 / 11)  # per token of all chosen responses
    assert named["loss"] == pytest.approx(float(objective.losses(chosen, rejected).mean()) + 0.3 * 16 / 11)


def test_no_pairs_give_zero_with_a_graph() -> None:
    sums = torch.zeros(0, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    part = step_part(
        Objective(2.5, 0.55, sft_weight=1.0),
        chosen_sum=sums,
        rejected_sum=sums,
        chosen_length=none,
        rejected_length=none,
        step_pairs=4,
        step_chosen_tokens=7,
    )
    assert part.loss.requires_grad and not part.metrics.any()
