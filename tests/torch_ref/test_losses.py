"""The objectives against the original's check values, TRL and the papers, and their own bookkeeping."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch

from jax_simpo.config.objectives import OBJECTIVE_KEYS
from jax_simpo.errors import ConfigError
from tests.objectives.oracles import CASES, NAMES, Oracle, extreme_numbers, random_numbers, theirs, trl
from tests.torch_ref.support import losses_and_gradients, objective_of, of_means, settings
from torch_ref.losses import response_sums, step_part
from torch_ref.objectives import LOSSES, Objective, Responses, Settings

CHOSEN, REJECTED = of_means([-0.5, -1.0, -0.8]), of_means([-0.9, -0.7, -0.8])
SETTINGS = {name: settings for name, settings, _ in reversed(CASES)}  # the first of each


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.898123, 2.237822, 1.600413]),
        ({"label_smoothing": 0.1}, [0.860623, 2.025322, 1.462913]),
        ({"loss_type": "hinge"}, [1.375, 3.125, 2.375]),
    ],
)
def test_losses_are_those_of_the_original_code(settings: dict[str, Any], expected: list[float]) -> None:
    losses = objective_of("simpo", beta=2.5, gamma_beta_ratio=0.55, **settings).losses(CHOSEN, REJECTED)
    np.testing.assert_allclose(losses, expected, atol=5e-7)


@pytest.mark.parametrize(("name", "settings", "oracle"), CASES, ids=NAMES)
def test_losses_and_gradients_are_those_of_the_oracle(name: str, settings: dict[str, Any], oracle: Oracle) -> None:
    n = random_numbers()
    losses, gradients = losses_and_gradients(objective_of(name, **settings), n)
    expected, expected_gradients = theirs(oracle, settings, n)
    # Relative where a loss or a gradient is above 1: float32 itself has seven digits.
    np.testing.assert_allclose(losses, expected, rtol=1e-6, atol=1e-6)
    for gradient, its in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, its, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "settings", "oracle"), CASES, ids=NAMES)
def test_extreme_log_ratios_give_finite_losses_and_gradients(name: str, settings: dict, oracle: Oracle) -> None:
    n = extreme_numbers()
    losses, gradients = losses_and_gradients(objective_of(name, **settings), n)
    assert all(np.isfinite(values).all() for values in (losses, *gradients))
    expected, _ = theirs(oracle, settings, n)
    within = np.abs(expected) < 1e30  # beyond, AlphaPO's power has left the range of float32
    np.testing.assert_allclose(losses[within], expected[within], rtol=1e-6, atol=1e-6)


def test_a_probability_of_1_has_finite_odds() -> None:
    certain = replace(of_means([0.0]), sum=torch.zeros(1, requires_grad=True))
    loss = objective_of("orpo", beta=0.1).losses(certain, of_means([-1.0])).sum()
    (gradient,) = torch.autograd.grad(loss, certain.sum)
    assert torch.isfinite(loss) and torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", OBJECTIVE_KEYS)
def test_every_objective_reads_its_keys_and_its_reference_alone(name: str) -> None:
    """Another value of a key, or of a reference, moves the loss if and only if the objective has it."""
    start, n = objective_of(name, **SETTINGS[name]), random_numbers(8)
    loss, _ = losses_and_gradients(start, n)
    changes = {"loss_type": "hinge", **{f.name: 0.37 for f in fields(Settings) if f.name != "loss_type"}}
    moves = {
        key
        for key, value in changes.items()
        if (losses_and_gradients(replace(start, settings=replace(start.settings, **{key: value})), n)[0] != loss).any()
    }
    assert moves == OBJECTIVE_KEYS[name].keys() - {"sft_weight", "sft_over"}
    other, _ = losses_and_gradients(start, n | {"chosen_reference": n["chosen_reference"] + 7})
    assert (other != loss).any() == start.needs_reference


def test_a_missing_reference_is_never_taken_for_zeros() -> None:
    with pytest.raises(ValueError, match="needs the log-probabilities of a reference"):
        objective_of("dpo", beta=0.1).losses(CHOSEN, REJECTED)


REWARDS = {  # of the responses below, over beta, and what is logged of them
    **dict.fromkeys(("simpo", "orpo"), ("mean", "mean")),
    **dict.fromkeys(("cpo", "slic"), ("sum", "sum")),
    "alphapo": ("shaped", "mean"),
    "simper": ("probability", "mean"),
    "sigmoid_norm": ("mean ratio", "sum"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_rewards_and_logged_log_probs_are_those_of_the_objective(name: str) -> None:
    responses = Responses(torch.tensor([-6.0]), torch.tensor([4]), torch.tensor([-8.0]))
    objective = Objective({name: 0.5, "ipo": 1.0}, Settings(beta=0.1, alpha=0.5))  # of a sum, the first counts
    values = {
        "mean": -1.5,
        "sum": -6.0,
        "ratio": 2.0,
        "mean ratio": 0.5,
        "probability": np.exp(-1.5),
        "shaped": (1 - np.exp(-1.5) ** -0.5) / 0.5,
    }
    reward, logged = REWARDS.get(name, ("ratio", "sum"))
    assert float(objective.score(responses)) == pytest.approx(values[reward], rel=1e-6)
    assert float(objective.logps(responses)) == values[logged]


def test_a_weighted_sum_adds_losses() -> None:
    n = random_numbers(8)
    both, _ = losses_and_gradients(Objective({"ipo": 0.5, "apo_zero": 2.0}, Settings(beta=0.2)), n)
    parts = [losses_and_gradients(objective_of(name, beta=0.2), n)[0] for name in ("ipo", "apo_zero")]
    np.testing.assert_allclose(both, 0.5 * parts[0] + 2.0 * parts[1], rtol=1e-6)


def test_an_objective_written_in_jax_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"mine.py:Mine is not one of simpo, .*`jax-simpo train`"):
        Objective.of(settings(objective="mine.py:Mine"))


def test_a_config_gives_the_objective_and_its_settings() -> None:
    config = settings(objective={"dpop": 1.0, "simper": 0.5, "sft": 0.2})
    objective = Objective.of(config)
    assert objective.weights == {"dpop": 1.0, "simper": 0.5} and objective.needs_reference
    assert objective.settings == Settings(beta=0.3, dpop_lambda=50.0)
    assert (objective.sft_weight, objective.metrics[-1]) == (0.2, "sft_loss")


def test_mean_log_probs_are_trls() -> None:
    rng = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 9, 20, generator=rng)
    labels = torch.randint(0, 20, (4, 9), generator=rng)
    labels[torch.rand(4, 9, generator=rng) < 0.3] = -100
    labels[:, 1] = 3
    oracle = trl("cpo").get_batch_logps(logits, labels, average_log_prob=True)
    line, at = torch.nonzero(labels[:, 1:] != -100, as_tuple=True)
    logps = logits[line, at].log_softmax(-1).gather(-1, labels[line, at + 1][:, None])[:, 0]
    ours = response_sums(logps, line, 4) / torch.bincount(line, minlength=4)
    torch.testing.assert_close(ours, oracle, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["simpo", "dpo"])
def test_parts_of_a_step_add_up_to_the_step(name: str) -> None:
    objective = replace(objective_of(name, beta=2.5, gamma_beta_ratio=0.55), sft_weight=0.3)
    responses = Responses(
        torch.tensor([-3.0, -8.0, -9.0, -2.0, -4.0, -4.5]),
        torch.tensor([2, 5, 6, 2, 3, 3]),
        torch.tensor([-4.0, -8.0, -8.0, -2.5, -4.0, -4.0]),
    )
    chosen, rejected = (responses.at(torch.arange(side, 6, 2)) for side in range(2))

    def part(pairs: list[int]) -> Any:
        own = responses.at(torch.tensor([2 * pair + side for pair in pairs for side in range(2)], dtype=torch.long))
        compared = objective.comparisons([(0, 1)] * len(pairs))
        return step_part(objective, own, compared, denominator=3, step_chosen_tokens=11)

    whole, parts = part([0, 1, 2]), [part([0]), part([1, 2]), part([])]
    torch.testing.assert_close(sum(p.metrics for p in parts), whole.metrics)
    named = dict(zip(objective.metrics, whole.metrics.tolist(), strict=True))
    margins = chosen.mean - rejected.mean if name == "simpo" else chosen.ratio - rejected.ratio
    assert named["rewards/margins"] == pytest.approx(2.5 * float(margins.mean()))  # without gamma
    assert named["sft_loss"] == pytest.approx(16 / 11)  # per token of all chosen responses
    assert named["loss"] == pytest.approx(float(objective.losses(chosen, rejected).mean()) + 0.3 * 16 / 11)


@pytest.mark.parametrize("name", LOSSES)
def test_no_pairs_give_zero_with_a_graph(name: str) -> None:
    sums = torch.zeros(0, requires_grad=True)
    nothing = Responses(sums, torch.zeros(0, dtype=torch.long), torch.zeros(0))
    objective = objective_of(name, **SETTINGS[name])
    part = step_part(objective, nothing, objective.comparisons([]), denominator=4, step_chosen_tokens=7)
    assert part.loss.requires_grad and not part.metrics.any()
