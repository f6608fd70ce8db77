"""Losses of ranked groups: which responses of a group are compared, and what their comparisons add up to.

All responses of a row are compared with all others at once, as a square of slots, of which few entries count. A row has
a few dozen slots, so the square is small. A group's numbers are returned at the slot of its first
response, which is its best, and zeros elsewhere.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jax_simpo.objectives.base import CompareWeights, GroupLoss, Objective, Responses, logistic_losses


class Ranking(NamedTuple):
    """The responses in B rows of R slots; those of a group stand side by side, best first.

    Attributes:
        group: the number of the response's group, -1 for an empty slot.
        rank: the rank of the response in its group, from 0 for the best; tied responses have the same.
        score: the score of the response, for `compare_weights: score_gap`.
    """

    group: Int[Array | np.ndarray, "B R"]
    rank: Int[Array | np.ndarray, "B R"]
    score: Float[Array | np.ndarray, "B R"] | None = None

    @property
    def same_group(self) -> Bool[Array | np.ndarray, "B R R"]:
        """True where two slots hold responses of one group."""
        return (self.group[..., :, None] == self.group[..., None, :]) & (self.group >= 0)[..., None]

    @property
    def is_first(self) -> Bool[Array | np.ndarray, "B R"]:
        """True for the first response of each group."""
        return (self.group >= 0) & (self._place == 0)

    @property
    def _place(self) -> Int[Array, "B R"]:
        return (self.same_group & np.tri(self.group.shape[-1], k=-1, dtype=bool)).sum(-1)

    def compared(self, group_loss: GroupLoss) -> Bool[Array | np.ndarray, "B R R"]:
        """Returns True where a loss compares a response (second axis) with a worse one (third axis).

        The arrays may be of numpy: the host counts comparisons with the same function.
        """
        same, rank = self.same_group, self.rank
        pairs = same & (rank[..., :, None] < rank[..., None, :])
        if group_loss in ("all_pairs", "plackett_luce"):
            return pairs
        worst = (same * rank[..., None, :]).max(-1)
        against_worst = pairs & (rank == worst)[..., None, :]
        if group_loss == "best_vs_rest":
            return pairs & (rank == 0)[..., :, None]
        if group_loss == "best_vs_worst":
            return against_worst & (rank == 0)[..., :, None]
        # TPO-L prefers the second response, or the first where the second is among the worst, as in a pair.
        place = self._place
        has_second = (same & ((place == 1) & (rank < worst))[..., None, :]).any(-1)
        return against_worst & (place == has_second)[..., :, None]


class GroupTerms(NamedTuple):
    """Holds what each group adds to a step, float32 [B, R].

    Attributes:
        loss: the loss.
        comparisons: the number of comparisons.
        chosen: the mean score of the better responses of its comparisons.
        rejected: the mean score of the worse ones.
        accuracy: the share of its comparisons whose better response has the higher score.
        margin: the mean difference of the two scores.
        chosen_logps: the mean of the better responses' log-probs that are logged.
        rejected_logps: the same of the worse ones.
    """

    loss: Float[Array, "B R"]
    comparisons: Float[Array, "B R"]
    chosen: Float[Array, "B R"]
    rejected: Float[Array, "B R"]
    accuracy: Float[Array, "B R"]
    margin: Float[Array, "B R"]
    chosen_logps: Float[Array, "B R"]
    rejected_logps: Float[Array, "B R"]


def group_terms(objective: Objective, responses: Responses, ranking: Ranking) -> GroupTerms:
    """Computes the loss of every group, and the figures of its comparisons.

    A comparison is a pair: its loss is that of the objective, and the loss of a group is their mean, weighted as
    `objective.compare_weights` says. Plackett-Luce has one term for every response but the worst: the probability that
    it is chosen among itself and all that are worse.
    """
    compared = ranking.compared(objective.group_loss)

    def of_better(x: Array) -> Array:
        return jnp.where(compared, x[..., :, None], 0.0)

    def of_worse(x: Array) -> Array:
        return jnp.where(compared, x[..., None, :], 0.0)

    chosen, rejected = jax.tree.map(of_better, responses), jax.tree.map(of_worse, responses)
    same, is_first = ranking.same_group, ranking.is_first

    def of_group(of_comparison: Float[Array, "B R R"]) -> Float[Array, "B R"]:
        """Adds up the numbers of a group's comparisons, at the slot of each of its responses."""
        of_response = jnp.where(compared, of_comparison, 0.0).sum(-1)
        return jnp.where(same, of_response[..., None, :], 0.0).sum(-1)

    def total(of_comparison: Float[Array, "B R R"]) -> Float[Array, "B R"]:
        return jnp.where(is_first, of_group(of_comparison), 0.0)

    count = total(jnp.ones(compared.shape))

    def mean(of_comparison: Float[Array, "B R R"]) -> Float[Array, "B R"]:
        return total(of_comparison) / jnp.maximum(count, 1.0)

    if objective.group_loss == "plackett_luce":
        of_response = _plackett_luce(objective.difference(chosen, rejected), jnp.asarray(compared))
        loss = jnp.where(is_first, jnp.where(same, of_response[..., None, :], 0.0).sum(-1), 0.0)
    else:
        weights, alone = _weights(objective.compare_weights, ranking), of_group(jnp.ones(compared.shape)) == 1
        all_weights = of_group(weights)
        shares = weights / jnp.where(all_weights > 0, all_weights, 1.0)[..., None]
        shares = jnp.where(alone[..., None], 1.0, shares)  # x / x may differ from 1 by a rounding
        loss = total(shares * objective.losses(chosen, rejected))
    better, worse = objective.score(chosen), objective.score(rejected)
    return GroupTerms(
        loss=loss,
        comparisons=count,
        chosen=mean(better),
        rejected=mean(worse),
        accuracy=mean((better > worse).astype(jnp.float32)),
        margin=mean(better - worse),
        chosen_logps=mean(objective.logps(chosen)),
        rejected_logps=mean(objective.logps(rejected)),
    )


def _plackett_luce(difference: Float[Array, "B R R"], compared: Bool[Array, "B R R"]) -> Float[Array, "B R"]:
    """Returns each response's term `-log P(it is chosen among itself and those worse than it)`.

    With the differences of rewards `z`, it is `softplus(logsumexp(-z))`, over the worse responses. (Rafailov et al.,
    "Direct Preference Optimization", arXiv 2305.18290, appendix A.3, where tied responses are not compared.)
    """
    # Not `logsumexp`: where nothing is compared its gradient is NaN.
    top = jax.lax.stop_gradient(jnp.where(compared, -difference, -jnp.inf).max(-1))
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    sums = jnp.where(compared, jnp.exp(jnp.where(compared, -difference, 0.0) - top[..., None]), 0.0).sum(-1)
    rivals = top + jnp.log(jnp.where(sums > 0, sums, 1.0))
    return jnp.where(compared.any(-1), logistic_losses(-rivals), 0.0)


def _weights(name: CompareWeights, ranking: Ranking) -> Float[Array, "B R R"]:
    """Returns the weight of every comparison."""
    if name == "score_gap":
        assert ranking.score is not None  # the config is checked against the data
        return jnp.asarray(ranking.score[..., :, None] - ranking.score[..., None, :])
    if name == "rank":  # the gain in nDCG's discount from one rank to the other
        discount = 1 / jnp.log2(2.0 + ranking.rank)
        return discount[..., :, None] - discount[..., None, :]
    return jnp.ones((*ranking.rank.shape, ranking.rank.shape[-1]))
