"""Losses of ranked groups against loops over single comparisons, written from their definitions."""

from __future__ import annotations

import math
from itertools import product
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_simpo.config import TrainConfig
from jax_simpo.config.objectives import LOGISTIC
from jax_simpo.errors import ConfigError
from jax_simpo.objectives import DPO, OBJECTIVES, Objective, Responses, SimPO
from jax_simpo.objectives.base import GroupLoss
from jax_simpo.objectives.groups import GroupTerms, Ranking, group_terms
from jax_simpo.ops.responses import sum_responses

GROUP_LOSSES = get_args(GroupLoss)
SLOTS = 12


@st.composite
def ranks(draw: st.DrawFn, most: int = 5) -> list[int]:
    """The ranks of a group, best first, with ties; not all are tied."""
    rises = draw(st.lists(st.booleans(), min_size=1, max_size=most - 1).filter(any))
    return np.cumsum([0, *rises]).tolist()


@st.composite
def rows(draw: st.DrawFn) -> list[list[int]]:
    """The ranks of the groups of a row."""
    groups = draw(st.lists(ranks(), max_size=3))
    while sum(map(len, groups)) > SLOTS:
        groups.pop()
    return groups


def lay_out(groups: list[list[int]], seed: int = 0) -> tuple[Responses, Ranking]:
    """Puts groups into a row of slots, with random log-probs; empty slots hold zeros, as in training."""
    rng = np.random.default_rng(seed)
    used = sum(map(len, groups))
    group, rank = np.full(SLOTS, -1), np.zeros(SLOTS, int)
    group[:used] = np.repeat(np.arange(len(groups)), [len(g) for g in groups])
    rank[:used] = [r for g in groups for r in g]
    sums, reference = (np.where(np.arange(SLOTS) < used, rng.normal(-20, 5, SLOTS), 0) for _ in range(2))
    length = np.where(np.arange(SLOTS) < used, rng.integers(1, 30, SLOTS), 0)
    score = rng.normal(size=SLOTS) - 3 * rank
    columns = (jnp.asarray(x, jnp.float32)[None] for x in (sums, length, reference))
    return Responses(*columns), Ranking(group[None], rank[None], score[None].astype(np.float32))


def comparisons(group_loss: str, group: list[int]) -> list[tuple[int, int]]:
    """Lists the comparisons of a group as places of the better and the worse response."""
    places, worst = range(len(group)), max(group)
    everything = [(i, j) for i, j in product(places, places) if group[i] < group[j]]
    second = 1 if group[1] < worst else 0
    return {
        "all_pairs": everything,
        "plackett_luce": everything,
        "best_vs_rest": [(i, j) for i, j in everything if group[i] == 0],
        "best_vs_worst": [(i, j) for i, j in everything if group[i] == 0 and group[j] == worst],
        "tpo_l": [(i, j) for i, j in everything if i == second and group[j] == worst],
    }[group_loss]


def expected_loss(objective: Objective, group: list[int], own: Responses, score: np.ndarray) -> float:
    """Computes the loss of a group, comparison by comparison."""

    def of(function: Any, i: int, j: int) -> float:
        return float(function(*(Responses(*(x[n] for x in own)) for n in (i, j))))

    compared = comparisons(objective.group_loss, group)
    if objective.group_loss == "plackett_luce":
        terms = []
        for i in range(len(group)):
            rivals = [math.exp(-of(objective.difference, i, j)) for better, j in compared if better == i]
            terms += [math.log1p(sum(rivals))] if rivals else []
        return sum(terms)
    weigh = {
        "equal": lambda i, j: 1.0,
        "score_gap": lambda i, j: float(score[i] - score[j]),
        "rank": lambda i, j: 1 / math.log2(2 + group[i]) - 1 / math.log2(2 + group[j]),
    }[objective.compare_weights]
    weights = [weigh(i, j) for i, j in compared]
    losses = [of(objective.losses, i, j) for i, j in compared]
    return sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)


@given(rows(), st.sampled_from(GROUP_LOSSES), st.sampled_from(["equal", "score_gap", "rank"]), st.booleans())
def test_a_groups_loss_is_that_of_its_comparisons(
    groups: list[list[int]], group_loss: Any, weights: Any, reference: bool
) -> None:
    settings = {"group_loss": group_loss, "compare_weights": weights}
    objective: Objective = DPO(beta=0.1, **settings) if reference else SimPO(beta=2, gamma_beta_ratio=0.3, **settings)
    responses, ranking = lay_out(groups)
    terms = group_terms(objective, responses, ranking)
    start = 0
    for group in groups:
        own = Responses(*(np.asarray(x[0, start : start + len(group)]) for x in responses))
        assert ranking.score is not None
        loss = expected_loss(objective, group, own, np.asarray(ranking.score[0, start : start + len(group)]))
        np.testing.assert_allclose(terms.loss[0, start], loss, rtol=2e-5)
        compared = comparisons(group_loss, group)
        scores = np.asarray(objective.score(own))
        better, worse = np.array(compared).T
        figures = {
            "comparisons": len(compared),
            "chosen": scores[better].mean(),
            "rejected": scores[worse].mean(),
            "accuracy": (scores[better] > scores[worse]).mean(),
            "margin": (scores[better] - scores[worse]).mean(),
        }
        for name, value in figures.items():
            np.testing.assert_allclose(getattr(terms, name)[0, start], value, rtol=2e-5, atol=2e-6, err_msg=name)
        start += len(group)
    firsts = np.cumsum([0, *map(len, groups)])[:-1]
    for figure in terms:
        assert not np.delete(np.asarray(figure[0]), firsts).any()


@pytest.mark.parametrize("group_loss", GROUP_LOSSES)
@pytest.mark.parametrize("kind", [DPO, SimPO])
def test_of_a_pair_every_group_loss_is_the_pairs_own_to_the_bit(kind: type[Objective], group_loss: Any) -> None:
    more = {"gamma_beta_ratio": 0.3} if kind is SimPO else {}
    responses, ranking = lay_out([[0, 1]] * 5)
    for weights in ("equal", "score_gap", "rank"):
        objective = kind(beta=1.7, group_loss=group_loss, compare_weights=weights, **more)

        def grouped(sums: jax.Array, objective: Objective = objective) -> jax.Array:
            return group_terms(objective, responses._replace(sum=sums), ranking).loss[:, 0:10:2]

        def pairwise(sums: jax.Array, objective: Objective = objective) -> jax.Array:
            chosen, rejected = (Responses(*(x[:, n:10:2] for x in responses._replace(sum=sums))) for n in (0, 1))
            return objective.losses(chosen, rejected)

        np.testing.assert_array_equal(grouped(responses.sum), pairwise(responses.sum))
        ours, theirs = (jax.grad(lambda sums, f=f: f(sums).sum())(responses.sum) for f in (grouped, pairwise))
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("group_loss", GROUP_LOSSES)
def test_empty_slots_give_zeros_in_values_and_gradients(group_loss: Any) -> None:
    objective = SimPO(beta=2.0, gamma_beta_ratio=0.5, group_loss=group_loss)
    ranking = Ranking(np.full((2, 2), -1), np.zeros((2, 2), int))

    def total(logps: jax.Array) -> jax.Array:
        responses = sum_responses(logps, jnp.full((2, 4), 2), slots=2)
        slots = Responses(responses.sum, responses.length, jnp.zeros((2, 2)))
        return jnp.stack(group_terms(objective, slots, ranking)).sum() + slots.mean.sum()

    value, gradient = jax.value_and_grad(total)(jnp.full((2, 4), -3.0))
    assert value == 0 and not gradient.any()


@pytest.mark.parametrize("group_loss", GROUP_LOSSES)
def test_extreme_log_probs_give_finite_losses_and_gradients(group_loss: Any) -> None:
    responses, ranking = lay_out([[0, 1, 1, 2], [0, 1]])
    signs = jnp.where(jnp.arange(SLOTS) % 2 == 0, 1e3, -1e3)

    def total(sums: jax.Array) -> jax.Array:
        return group_terms(DPO(beta=1.0, group_loss=group_loss), responses._replace(sum=sums), ranking).loss.sum()

    for direction in (1, -1):
        value, gradient = jax.value_and_grad(total)(direction * signs[None])
        assert np.isfinite(value) and np.isfinite(gradient).all()


def test_the_terms_of_a_group_do_not_depend_on_its_neighbours() -> None:
    alone = group_terms(SimPO(beta=2.0, gamma_beta_ratio=0.3), *lay_out([[0, 0, 1, 2]]))
    responses, ranking = lay_out([[0, 0, 1, 2], [0, 1, 2]])
    beside = group_terms(SimPO(beta=2.0, gamma_beta_ratio=0.3), responses, ranking)
    assert isinstance(beside, GroupTerms)
    for ours, theirs in zip(alone, beside, strict=True):
        np.testing.assert_array_equal(ours[0, 0], theirs[0, 0])


def test_the_objectives_that_may_rank_whole_groups_are_those_with_a_difference() -> None:
    own = {name for name, kind in OBJECTIVES.items() if kind.difference is not Objective.difference}
    assert own == set(LOGISTIC)


@pytest.mark.parametrize("objective", [{"simpo": 2.0}, {"simpo": 1.0, "dpo": 1.0}, "ipo"])
def test_plackett_luce_is_refused_of_sums_and_of_other_losses(objective: Any) -> None:
    with pytest.raises(ConfigError, match="needs one objective alone, with the weight 1"):
        TrainConfig(model_name_or_path="m", objective=objective, group_loss="plackett_luce")
    TrainConfig(model_name_or_path="m", objective={"simpo": 1.0, "sft": 0.3}, group_loss="plackett_luce")
