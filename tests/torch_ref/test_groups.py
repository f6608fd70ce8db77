"""Losses and figures of ranked groups: against loops written from the definitions, and against pairs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from jax_simpo.data.groups import GroupLengths
from jax_simpo.data.loader import Known
from jax_simpo.data.packing import make_step_plan
from jax_simpo.errors import ConfigError, DataError
from jax_simpo.run.metrics import read_metrics
from tests.objectives.oracles import CASES, random_numbers
from tests.torch_ref.start import config_file, make_start
from tests.torch_ref.support import (
    CPU,
    LAYOUTS,
    RANKS,
    Groups,
    gradients,
    lengths_of,
    make_policy,
    objective_of,
    oracle_sums,
    part_of,
    responses_of,
    settings,
    some_groups,
    step_of,
)
from torch_ref.__main__ import app
from torch_ref.comparisons import CompareWeights, GroupLoss, Ranking, compared_places, list_comparisons
from torch_ref.distributed import Ranks
from torch_ref.evaluate import evaluation_metrics, group_records, score_groups, split_metrics
from torch_ref.losses import group_figures, group_losses, step_part
from torch_ref.objectives import LOSSES, MARGINS, Objective, Responses, Settings

GROUP_LOSSES, COMPARE_WEIGHTS = get_args(GroupLoss), get_args(CompareWeights)
SETTINGS = {name: values for name, values, _ in reversed(CASES)}  # the first of each
SIMPO = replace(objective_of("simpo", beta=2.5, gamma_beta_ratio=0.55), sft_weight=0.3)
ALONE = Ranks(0, 1, CPU, launched=False)
MORE_RANKS: tuple[Ranking, ...] = (*RANKS, (0, 0, 0), (0,), (0, 1, 1, 2, 2), (0, 0, 1, 1))
"""Among them groups in which nothing can be compared."""


def some_responses(rankings: Sequence[Ranking], dtype: torch.dtype = torch.float32) -> tuple[Responses, np.ndarray]:
    """Random responses of groups, and scores that rise from rank to rank by different steps."""
    rng, count = np.random.default_rng(3), sum(map(len, rankings))
    lengths = torch.from_numpy(rng.integers(1, 12, count))
    sums = torch.from_numpy(-rng.gamma(2.0, 1.0, count)).to(dtype) * lengths
    reference = sums + torch.from_numpy(rng.normal(0, 3, count)).to(dtype)
    steps = rng.uniform(0.1, 2.0, 9)
    scores = np.array([-steps[:rank].sum() for ranking in rankings for rank in ranking], np.float32)
    return Responses(sums, lengths, reference), scores


def of_groups(rankings: Sequence[Ranking]) -> Iterator[tuple[Ranking, list[int]]]:
    """Each group's ranking and the numbers of its responses."""
    start = 0
    for ranking in rankings:
        yield ranking, list(range(start, start + len(ranking)))
        start += len(ranking)


def wanted_pairs(ranking: Ranking, group_loss: str) -> list[tuple[int, int]]:
    """The compared places of a group, written from the definitions."""
    best, worst = 0, max(ranking)
    places = range(len(ranking))
    if group_loss == "tpo_l":
        preferred = 0 if len(ranking) == 1 or ranking[1] == worst else 1
        return [(preferred, j) for j in places if ranking[j] == worst and ranking[preferred] < worst]
    pairs = [(i, j) for i in places for j in places if ranking[i] < ranking[j]]
    if group_loss in ("best_vs_rest", "best_vs_worst"):
        pairs = [(i, j) for i, j in pairs if ranking[i] == best]
    if group_loss == "best_vs_worst":
        pairs = [(i, j) for i, j in pairs if ranking[j] == worst]
    return pairs


# --- which responses are compared


@pytest.mark.parametrize(
    ("group_loss", "expected"),
    [
        ("all_pairs", [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]),
        ("plackett_luce", [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]),
        ("best_vs_rest", [(0, 1), (0, 2), (0, 3)]),
        ("best_vs_worst", [(0, 3)]),
        ("tpo_l", [(1, 3)]),
    ],
)
def test_the_comparisons_of_a_group_with_a_tie(group_loss: GroupLoss, expected: list[tuple[int, int]]) -> None:
    assert list(compared_places((0, 1, 1, 2), group_loss)) == expected


@pytest.mark.parametrize("group_loss", GROUP_LOSSES)
def test_the_comparisons_are_those_of_the_definition(group_loss: GroupLoss) -> None:
    for ranking in MORE_RANKS:
        assert list(compared_places(ranking, group_loss)) == wanted_pairs(ranking, group_loss)


def test_the_shares_of_a_group_are_its_weights_over_their_sum() -> None:
    scores = np.array([9.0, 5.0, 5.0, 4.0, 1.0, 0.0], np.float32)
    by_score = list_comparisons([(0, 1, 1, 2), (0, 1)], "all_pairs", "score_gap", scores)
    np.testing.assert_allclose(by_score.share, [4 / 15, 4 / 15, 5 / 15, 1 / 15, 1 / 15, 1], rtol=1e-6)
    by_rank = list_comparisons([(0, 1, 1, 2)], "best_vs_rest", "rank")
    second, third = 1 - 1 / math.log2(3), 1 - 1 / math.log2(4)
    np.testing.assert_allclose(by_rank.share, np.array([second, second, third]) / (2 * second + third), rtol=1e-6)
    with pytest.raises(ValueError, match="the responses have none"):
        list_comparisons([(0, 1)], "all_pairs", "score_gap")


# --- the loss of a group


def loop_losses(objective: Objective, responses: Responses, rankings: Sequence[Ranking], scores: np.ndarray) -> Tensor:
    """The loss of each group, one comparison at a time."""

    def one(number: int) -> Responses:
        return responses.at(torch.tensor([number]))

    losses = []
    for ranking, own in of_groups(rankings):
        pairs = wanted_pairs(ranking, objective.group_loss)
        loss, weights = torch.zeros(1, dtype=responses.sum.dtype), 0.0
        if objective.group_loss == "plackett_luce":
            for i in range(len(ranking)):
                odds = [torch.exp(-objective.margins(one(own[i]), one(own[j]))) for k, j in pairs if k == i]
                loss = loss + torch.log1p(sum(odds, torch.zeros_like(loss)))
            losses.append(loss)
            continue
        for i, j in pairs:
            weight = {
                "equal": 1.0,
                "score_gap": float(scores[own[i]]) - float(scores[own[j]]),
                "rank": 1 / math.log2(2 + ranking[i]) - 1 / math.log2(2 + ranking[j]),
            }[objective.compare_weights]
            loss = loss + weight * objective.losses(one(own[i]), one(own[j]))
            weights += weight
        losses.append(loss / weights if pairs else loss)
    return torch.cat(losses)


@pytest.mark.parametrize("compare_weights", COMPARE_WEIGHTS)
@pytest.mark.parametrize("group_loss", GROUP_LOSSES)
@pytest.mark.parametrize("name", ["simpo", "dpo", "bco_pair"])
def test_the_loss_of_a_group_and_its_gradient_are_those_of_a_loop(
    name: str, group_loss: GroupLoss, compare_weights: CompareWeights
) -> None:
    if group_loss == "plackett_luce" and name not in MARGINS:
        return
    objective = replace(objective_of(name, **SETTINGS[name]), group_loss=group_loss, compare_weights=compare_weights)
    responses, scores = some_responses(MORE_RANKS)

    def differentiated(losses: Callable[[Responses], Tensor], dtype: torch.dtype) -> list[Tensor]:
        assert responses.reference_sum is not None
        sums = responses.sum.to(dtype).requires_grad_()
        of_groups = losses(replace(responses, sum=sums, reference_sum=responses.reference_sum.to(dtype)))
        factors = torch.linspace(-1, 2, len(MORE_RANKS), dtype=dtype)  # every group counts differently
        (gradient,) = torch.autograd.grad((factors * of_groups).sum(), sums)
        return [of_groups.detach().double(), gradient.double()]

    compared = objective.comparisons(MORE_RANKS, scores)
    found = differentiated(lambda r: group_losses(objective, r, compared), torch.float32)
    expected = differentiated(lambda r: loop_losses(objective, r, MORE_RANKS, scores), torch.float64)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-6)
    assert found[0][0] > 0 and not found[0][len(RANKS) : len(RANKS) + 2].any()  # the groups without comparisons


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("group_loss", GROUP_LOSSES)
def test_of_a_pair_every_group_loss_is_that_of_the_pair(name: str, group_loss: GroupLoss) -> None:
    if group_loss == "plackett_luce" and name not in MARGINS:
        return
    objective, n = objective_of(name, **SETTINGS[name]), random_numbers(40)
    chosen, rejected = responses_of(n)
    both = zip(vars(chosen).values(), vars(rejected).values(), strict=True)
    responses = Responses(*(torch.stack(sides, dim=1).flatten() for sides in both))
    scores = np.tile(np.array([3.0, 1.0], np.float32), 40)
    for compare_weights in COMPARE_WEIGHTS:
        grouped = replace(objective, group_loss=group_loss, compare_weights=compare_weights)
        compared = grouped.comparisons([(0, 1)] * 40, scores)
        assert torch.equal(group_losses(grouped, responses, compared), objective.losses(chosen, rejected))
    figures = group_figures(objective, responses, compared)
    margins = objective.beta * (objective.score(chosen).double() - objective.score(rejected).double())
    assert torch.equal(figures["rewards/margins"], margins)
    assert torch.equal(figures["logps/rejected"], objective.logps(rejected).double())


# --- Plackett-Luce


@pytest.mark.parametrize("name", MARGINS)
def test_the_plackett_luce_probabilities_of_all_rankings_add_up_to_1(name: str) -> None:
    values = {**SETTINGS[name], "gamma_beta_ratio": 0.0}
    objective = replace(objective_of(name, **values), group_loss="plackett_luce")
    responses, _ = some_responses([(0, 1, 2, 3)], torch.float64)
    compared = objective.comparisons([(0, 1, 2, 3)])
    losses = [group_losses(objective, responses.at(torch.tensor(order)), compared) for order in permutations(range(4))]
    assert float(torch.exp(-torch.cat(losses)).sum()) == pytest.approx(1, abs=1e-12)


def test_plackett_luce_is_finite_whatever_the_margins() -> None:
    objective = replace(objective_of("simpo", beta=10.0), group_loss="plackett_luce")
    sums = torch.tensor([-1e3, 0.0, -2e3, -1e3, 0.0, -5.0, 0.0, 0.0, 0.0], requires_grad=True)
    compared = objective.comparisons([(0, 1, 2), (0, 0, 1), (0, 1, 2)])
    losses = group_losses(objective, Responses(sums, torch.ones(9, dtype=torch.long)), compared)
    (gradient,) = torch.autograd.grad(losses.sum(), sums)
    # 10 * 1000 against the second response; of the tied ones the first loses by far; equal rewards choose by lot.
    torch.testing.assert_close(losses, torch.tensor([1e4, 9950.0, math.log(6)]))
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - MARGINS.keys()))
def test_plackett_luce_is_refused_where_the_objective_is_no_logistic_loss(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"plackett_luce.*which {name} is not.*one of simpo, alphapo, cpo"):
        Objective({name: 1.0}, Settings(**SETTINGS[name]), group_loss="plackett_luce")


def test_plackett_luce_is_refused_of_sums_and_of_changed_logistic_losses() -> None:
    with pytest.raises(ConfigError, match=r"which simpo \+ dpo is not"):
        Objective({"simpo": 1.0, "dpo": 1.0}, group_loss="plackett_luce")
    for values in ({"label_smoothing": 0.1}, {"loss_type": "hinge"}):
        with pytest.raises(ConfigError, match="which cpo with label smoothing or the hinge loss is not"):
            Objective({"cpo": 1.0}, Settings(**values), group_loss="plackett_luce")


# --- steps


@pytest.mark.parametrize("mean_over", ["groups", "pairs"])
def test_the_means_of_a_step_are_over_groups_or_over_all_comparisons(mean_over: Any) -> None:
    objective = replace(SIMPO, mean_over=mean_over, sft_weight=0.0)
    rankings = [(0, 1, 1, 2), (0, 1), (0, 0, 1)]
    responses, scores = some_responses(rankings)
    compared = objective.comparisons(rankings, scores)
    part = step_part(objective, responses, compared, denominator=objective.denominator(rankings), step_chosen_tokens=1)
    named = dict(zip(objective.metrics, part.metrics.tolist(), strict=True))
    pairs = [[(own[i], own[j]) for i, j in wanted_pairs(ranking, "all_pairs")] for ranking, own in of_groups(rankings)]
    assert [len(p) for p in pairs] == [5, 1, 2]
    mean, loss = responses.mean.tolist(), lambda i, j: float(objective.losses(*map(responses.at, ([i], [j]))))
    expected = {
        "loss": loss,
        "rewards/chosen": lambda i, j: 2.5 * mean[i],
        "rewards/rejected": lambda i, j: 2.5 * mean[j],
        "rewards/accuracies": lambda i, j: float(mean[i] > mean[j]),
        "rewards/margins": lambda i, j: 2.5 * (mean[i] - mean[j]),
        "logps/chosen": lambda i, j: mean[i],
        "logps/rejected": lambda i, j: mean[j],
    }
    for name, of_pair in expected.items():
        values = [[of_pair(*pair) for pair in of_group] for of_group in pairs]
        per_group = values if mean_over == "groups" else [[x for of_group in values for x in of_group]]
        wanted = np.mean([np.mean(of_group) for of_group in per_group])
        assert named[name] == pytest.approx(wanted, rel=1e-5), name


@pytest.mark.parametrize("mean_over", ["groups", "pairs"])
@pytest.mark.parametrize("group_loss", GROUP_LOSSES)
def test_a_step_does_not_depend_on_how_it_is_split(group_loss: GroupLoss, mean_over: Any) -> None:
    objective = replace(SIMPO, group_loss=group_loss, mean_over=mean_over)
    responses, scores = some_responses(MORE_RANKS)
    weights = torch.linspace(0, 2, len(MORE_RANKS))
    numbers = [own for _, own in of_groups(MORE_RANKS)]

    def part(groups: list[int]) -> Any:
        own = torch.tensor([r for group in groups for r in numbers[group]], dtype=torch.long)
        rankings = [MORE_RANKS[group] for group in groups]
        return step_part(
            objective,
            responses.at(own),
            objective.comparisons(rankings, scores[own]),
            weights=weights[groups],
            denominator=objective.denominator(MORE_RANKS),
            step_chosen_tokens=60,
        )

    whole = part(list(range(len(MORE_RANKS))))
    parts = [part(groups) for groups in ([3, 0], [], [5, 6], [8, 1, 7], [4, 2])]
    torch.testing.assert_close(sum(p.loss for p in parts), whole.loss)
    torch.testing.assert_close(sum(p.metrics for p in parts), whole.metrics)


def test_groups_in_which_nothing_is_compared_give_zeros_with_a_graph() -> None:
    for group_loss in GROUP_LOSSES:
        objective = replace(SIMPO, group_loss=group_loss, sft_weight=0.0, mean_over="pairs")
        sums = torch.full((4,), -1.0, requires_grad=True)
        compared = objective.comparisons([(0, 0, 0), (0,)])
        responses = Responses(sums, torch.ones(4, dtype=torch.long))
        denominator = objective.denominator([(0, 0, 0), (0,)])
        part = step_part(objective, responses, compared, denominator=denominator, step_chosen_tokens=1)
        (gradient,) = torch.autograd.grad(part.loss, sums)
        assert not part.metrics.any() and not gradient.any()


def expected_loss(policy: Any, groups: Groups, objective: Objective, weights: np.ndarray) -> Tensor:
    """The loss of a step from the log-probs of each sequence alone."""
    responses = Responses(oracle_sums(policy, groups), lengths_of(groups))
    rankings = [group.ranks for group in groups.all]
    scores = np.array([score for group in groups.all for score in group.scores or ()], np.float32)
    losses = loop_losses(objective, responses, rankings, scores)
    counts = torch.tensor([len(wanted_pairs(ranking, objective.group_loss)) for ranking in rankings])
    if objective.mean_over == "pairs":
        losses = losses * counts * len(rankings) / counts.sum()
    first = [own[0] for _, own in of_groups(rankings)]
    tokens = int(responses.length[first].sum())
    cross_entropy = -(torch.from_numpy(weights) * responses.sum[first]).sum() / tokens
    return (torch.from_numpy(weights) * losses).mean() + objective.sft_weight * cross_entropy


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("group_loss", "compare_weights", "mean_over"),
    [
        ("all_pairs", "score_gap", "groups"),
        ("best_vs_rest", "rank", "pairs"),
        ("best_vs_worst", "equal", "pairs"),
        ("plackett_luce", "equal", "groups"),
        ("tpo_l", "equal", "groups"),
    ],
)
def test_a_step_of_two_ranks_is_that_of_separate_sequences_in_every_layout(
    layout: str, group_loss: GroupLoss, compare_weights: CompareWeights, mean_over: Any
) -> None:
    objective = replace(SIMPO, group_loss=group_loss, compare_weights=compare_weights, mean_over=mean_over)
    groups, policy = some_groups(), make_policy("llama", layout)
    weights = np.array([0.5, 1.0, 2.0, 0.0, 1.5], np.float32)
    scores = np.array([score for group in groups.all for score in group.scores or ()], np.float32)
    known = Known(scores=scores, weights=weights)
    shares = [step_of(groups, layout, rank=rank, world=2, rows=1, known=known) for rank in range(2)]
    loss = torch.stack([part_of(SimpleNamespace(logps=policy), objective, share)[0] for share in shares]).sum()
    found = gradients(policy, loss)
    oracle = expected_loss(policy, groups, objective, weights)
    torch.testing.assert_close(loss, oracle, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients(policy, oracle).items():
        distance = torch.linalg.norm(found[name] - gradient) / torch.linalg.norm(gradient)
        assert distance < 1e-5, name


# --- evaluation


def scores_of(policy: Any, groups: Groups, reference: np.ndarray | None = None) -> Any:
    plan = make_step_plan(
        GroupLengths.of(groups.all), global_batch_size=2, rows_per_micro_batch=1, row_length=256, max_row_length=256
    )
    scores = np.array([score for group in groups.all for score in group.scores or ()], np.float32)
    with torch.no_grad():
        return score_groups(policy, plan, groups, ALONE, Known(reference, scores))


@pytest.mark.parametrize("mean_over", ["groups", "pairs"])
@pytest.mark.parametrize(("group_loss", "compare_weights"), [("all_pairs", "score_gap"), ("tpo_l", "equal")])
def test_an_evaluation_has_the_metrics_of_a_step_with_all_groups(
    group_loss: GroupLoss, compare_weights: CompareWeights, mean_over: Any
) -> None:
    objective = replace(SIMPO, group_loss=group_loss, compare_weights=compare_weights, mean_over=mean_over)
    groups, layout = some_groups(), "shared and packed"
    policy = make_policy("llama", layout)
    scores = scores_of(policy, groups)
    step = step_of(groups, layout, known=Known(scores=scores.scores))
    with torch.no_grad():
        _, metrics = part_of(SimpleNamespace(logps=policy), objective, step)
    expected = dict(zip(objective.metrics, metrics.tolist(), strict=True))
    assert evaluation_metrics(scores, objective) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_the_figures_of_a_split_are_those_of_its_groups_alone() -> None:
    groups, policy = some_groups(), make_policy("llama", "shared and packed")
    objective = replace(SIMPO, compare_weights="score_gap")
    both = split_metrics(scores_of(policy, groups), objective, {"a": np.array([0, 1, 4]), "b": np.array([2, 3])})
    for split, numbers in {"a": [0, 1, 4], "b": [2, 3]}.items():
        alone = evaluation_metrics(scores_of(policy, Groups([groups.all[n] for n in numbers])), objective)
        assert {name: both[f"eval_{split}_{name}"] for name in alone} == pytest.approx(alone, abs=1e-5)
        assert both[f"eval_{split}_pairs"] == len(numbers)


def test_a_record_of_a_pair_names_its_sides_and_that_of_a_larger_group_does_not() -> None:
    groups, policy = some_groups(), make_policy("llama", "shared and packed")
    objective = objective_of("dpo", beta=0.1)
    reference = np.linspace(-60, -10, len(lengths_of(groups)), dtype=np.float32)
    scores = scores_of(policy, groups, reference)
    records = list(group_records(scores, objective))
    of_response = {"logp_sum", "length", "logp", "reference_logp_sum", "reward", "rank"}
    sides = {f"{side}_{key}" for side in ("chosen", "rejected") for key in of_response - {"reward", "rank"}}
    common = {"margin", "loss", "responses"}
    for group, record in zip(groups.all, records, strict=True):
        is_pair = len(group.responses) == 2
        assert record.keys() == common | (sides | {"reward_chosen", "reward_rejected"} if is_pair else set())
        assert [r["rank"] for r in record["responses"]] == list(group.ranks)
        assert all(r.keys() == of_response for r in record["responses"])
    rewards = 0.1 * (scores.responses.sum - torch.from_numpy(reference)).double()
    found = [r["reward"] for record in records for r in record["responses"]]
    np.testing.assert_allclose(found, rewards, rtol=1e-6)
    pair = records[1]
    assert pair["margin"] == pair["reward_chosen"] - pair["reward_rejected"]
    assert pair["rejected_logp"] == pytest.approx(pair["rejected_logp_sum"] / pair["rejected_length"])
    first = [r["reward"] for r in records[0]["responses"]]  # ranks 0, 1, 1, 2
    margins = [first[i] - first[j] for i, j in wanted_pairs((0, 1, 1, 2), "all_pairs")]
    assert records[0]["margin"] == pytest.approx(np.mean(margins), rel=1e-6)
    assert records[0]["loss"] == pytest.approx(np.mean(np.logaddexp(0, -np.array(margins))), rel=1e-5)


def test_a_config_gives_the_loss_of_groups_and_has_defaults() -> None:
    defaults = {"group_loss": "all_pairs", "compare_weights": "equal", "mean_over": "groups"}
    other = {"group_loss": "tpo_l", "compare_weights": "rank", "mean_over": "pairs"}
    for expected, keys in ((defaults, {}), (other, other)):
        objective = Objective.of(settings(**keys))
        assert {name: getattr(objective, name) for name in defaults} == expected


# --- a run


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of `make_start`, beside files of groups of two to four answers, some of which are tied."""
    folder = tmp_path_factory.mktemp("start")
    model = make_start(folder)
    for split in ("train", "test"):
        pairs = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        rows = []
        for number, pair in enumerate(pairs):
            others = [pairs[(number + k) % len(pairs)]["chosen"] for k in range(1, 1 + number % 3)]
            answers = [turns[-1:] for turns in (pair["chosen"], pair["rejected"], *others)]
            scores = [3.0, 1.0, 2.0, 1.0][: len(answers)]
            rows.append({"prompt": pair["chosen"][:-1], "responses": answers, "scores": scores})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return model


def run(start: Path, folder: Path, *overrides: str) -> list[dict[str, Any]]:
    file = config_file(start, folder, steps=3, do_eval=True, save_strategy="no")
    keys = ["--compare_weights=score_gap", "--mean_over=pairs", "--row_length=auto", *overrides]
    app(["train", str(file), *keys], standalone_mode=False)
    return read_metrics(folder / "run")


def test_a_run_on_groups_has_the_same_curve_in_every_layout_and_its_scores_agree(start: Path, tmp_path: Path) -> None:
    records = run(start, tmp_path / "a")
    stacked = run(start, tmp_path / "b", "--prefix_sharing=false", "--packing=false")
    for name in ("loss", "grad_norm", "rewards/margins", "sft_loss"):
        curves = [[r[name] for r in of_run if "step" in r] for of_run in (records, stacked)]
        assert curves[0] == pytest.approx(curves[1], abs=1e-4), name
    assert records[-1]["eval_loss"] < records[0]["eval_loss"]
    file = tmp_path / "scores.jsonl"
    options = ["--split", "test", "--output", str(file), "--model", str(tmp_path / "a/run/model")]
    app(["score", str(tmp_path / "a/config.yaml"), *options, "--mean_over=pairs"], standalone_mode=False)
    scored = [json.loads(line) for line in file.read_text().splitlines()]
    assert [len(s["responses"]) for s in scored] == [2 + n % 3 for n in range(len(scored))]
    assert [r["rank"] for r in scored[2]["responses"]] == [0, 1, 2, 2]
    counts = [len(wanted_pairs(tuple(r["rank"] for r in s["responses"]), "all_pairs")) for s in scored]
    mean = np.average([s["margin"] for s in scored], weights=counts)
    assert records[-1]["eval_rewards/margins"] == pytest.approx(mean, abs=1e-5)


def test_responses_without_scores_cannot_be_weighed_by_them(start: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "test"):
        text = (start.parent / f"{split}.jsonl").read_text()
        (folder / f"{split}.jsonl").write_text(text.replace('"scores": [3.0, 1.0]', '"ranks": [0, 1]'))
    with pytest.raises(DataError, match="row 0: has no scores"):
        run(start, tmp_path, f"--dataset_mixer={{{folder}: 1.0}}")
