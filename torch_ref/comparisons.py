"""Lists which responses of ranked groups a loss compares, and how much each comparison counts in its group.

Comparisons are lists of indices, made on the host from the ranks alone: they are the same whatever the model computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import permutations
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from jax_simpo.data.groups import GroupLengths

GroupLoss = Literal["all_pairs", "best_vs_rest", "best_vs_worst", "plackett_luce", "tpo_l"]
CompareWeights = Literal["equal", "score_gap", "rank"]

Ranking = tuple[int, ...]
"""The ranks of a group's responses, best first: 0 for the best, ascending, equal for responses that are tied."""


def rankings_of(lengths: GroupLengths) -> list[Ranking]:
    """Returns the ranking of each group."""
    ranks = lengths.ranks.tolist()
    spans = zip(lengths.starts.tolist(), lengths.sizes.tolist(), strict=True)
    return [tuple(ranks[start : start + size]) for start, size in spans]


@lru_cache(maxsize=4096)
def compared_places(ranking: Ranking, group_loss: GroupLoss) -> tuple[tuple[int, int], ...]:
    """Lists the comparisons of a group: the places of the better and of the worse response, ordered by the better one.

    Whatever the loss, responses of equal rank are not compared.

    - `all_pairs` and `plackett_luce` compare every response with all that are worse.
    - `best_vs_rest` compares the responses of rank 0 with all that are worse.
    - `best_vs_worst` compares the responses of rank 0 with those of the worst rank.
    - `tpo_l` compares the second response with those of the worst rank. (Saeidi et al. 2024, "Triple Preference
      Optimization", arXiv 2405.16681: the first response is for the cross-entropy.) If the second is itself among the
      worst, as in a pair, it is the first response that is compared.
    """
    worst = max(ranking, default=0)
    preferred = 1 if len(ranking) > 1 and ranking[1] < worst else 0
    takes: dict[GroupLoss, Callable[[int, int], bool]] = {
        "all_pairs": lambda i, j: True,
        "plackett_luce": lambda i, j: True,
        "best_vs_rest": lambda i, j: ranking[i] == 0,
        "best_vs_worst": lambda i, j: ranking[i] == 0 and ranking[j] == worst,
        "tpo_l": lambda i, j: i == preferred and ranking[j] == worst,
    }
    pairs = permutations(range(len(ranking)), 2)
    return tuple((i, j) for i, j in pairs if ranking[i] < ranking[j] and takes[group_loss](i, j))


@dataclass(frozen=True)
class Comparisons:
    """C comparisons among the S responses of G groups: group after group, each ordered by the better response.

    Attributes:
        better: the index of each comparison's better response, int64.
        worse: the index of its worse response, int64.
        group: the index of its group, int64.
        share: what it counts in the loss of its group, float32. The shares of a group add up to 1.
        count: the number of comparisons of each group, float32.
        first: the index of the first response of each group, int64.
        rivals: for each response that is better than another one, the number of its comparisons. On the host.
    """

    better: Int[Tensor, " C"]
    worse: Int[Tensor, " C"]
    group: Int[Tensor, " C"]
    share: Float[Tensor, " C"]
    count: Float[Tensor, " G"]
    first: Int[Tensor, " G"]
    rivals: list[int]

    def to(self, device: torch.device) -> Comparisons:
        """Returns the comparisons on a device."""
        moved: Any = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)

    def total(self, values: Float[Tensor, " C"], group: Int[Tensor, " C"] | None = None) -> Float[Tensor, " G"]:
        """Adds up the values of each group. A group without comparisons gets 0.

        Args:
            values: one number per comparison, or per entry of `group`.
            group: the group of each value; None takes that of each comparison.
        """
        return values.new_zeros(len(self.first)).index_add(0, self.group if group is None else group, values)

    def mean(self, values: Float[Tensor, " C"]) -> Float[Tensor, " G"]:
        """Returns the plain mean over the comparisons of each group. A group without comparisons gets 0."""
        return self.total(values) / self.count.clamp(min=1)


def list_comparisons(
    rankings: Sequence[Ranking],
    group_loss: GroupLoss = "all_pairs",
    compare_weights: CompareWeights = "equal",
    scores: Float[np.ndarray, " S"] | None = None,
) -> Comparisons:
    """Lists the comparisons of groups whose responses are numbered group after group, best first.

    Args:
        rankings: the ranking of each group.
        group_loss: which responses are compared, see `compared_places`.
        compare_weights: the weight of a comparison in its group: `equal`; `score_gap`, the difference of the two
            scores; or `rank`, the difference of `1 / log2(2 + rank)`, which is nDCG's discount.
        scores: the score of each response, float32; only read by `score_gap`.

    Raises:
        ValueError: the weights are to be those of the scores, and there are none.
    """
    sizes = [len(ranking) for ranking in rankings]
    first = np.cumsum([0, *sizes])[:-1]
    places = [compared_places(tuple(ranking), group_loss) for ranking in rankings]
    count = np.array([len(of_group) for of_group in places], np.int64)
    group = np.repeat(np.arange(len(rankings)), count)
    flat = np.array([pair for of_group in places for pair in of_group], np.int64).reshape(-1, 2)
    better, worse = (first[group] + flat[:, side] for side in range(2))
    weight = _weights(rankings, compare_weights, scores, better, worse)
    total = np.bincount(group, weight, len(rankings))[group]
    rivals = np.unique(better, return_counts=True)[1]
    return Comparisons(
        better=torch.from_numpy(better),
        worse=torch.from_numpy(worse),
        group=torch.from_numpy(group),
        share=torch.from_numpy((weight / np.where(total > 0, total, 1)).astype(np.float32)),
        count=torch.from_numpy(count.astype(np.float32)),
        first=torch.from_numpy(first),
        rivals=rivals.tolist(),
    )


def _weights(
    rankings: Sequence[Ranking],
    compare_weights: CompareWeights,
    scores: Float[np.ndarray, " S"] | None,
    better: Int[np.ndarray, " C"],
    worse: Int[np.ndarray, " C"],
) -> Float[np.ndarray, " C"]:
    """Returns the weight of each comparison, float64."""
    if compare_weights == "equal":
        return np.ones(len(better))
    if compare_weights == "rank":
        ranks = np.array([rank for ranking in rankings for rank in ranking], np.float64)
        value = 1 / np.log2(2 + ranks)
    elif scores is None:
        raise ValueError("comparisons are to be weighted by scores, and the responses have none")
    else:
        value = scores.astype(np.float64)
    return value[better] - value[worse]
