"""Ranks the answers of a row by what the data says of them, and leaves out those that the config does not want."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, Literal

import numpy as np

from jax_simpo.data.messages import BadRow, short


@dataclass(frozen=True)
class GroupSettings:
    """Says which answers of a group stay.

    Attributes:
        max_responses: most responses; None keeps all.
        min_score_gap: smallest difference of the scores of two neighbours.
        ties: keeps responses of equal rank, or drops all of them but the first.
    """

    max_responses: int | None = None
    min_score_gap: float = 0.0
    ties: Literal["keep", "drop"] = "keep"


@dataclass(frozen=True)
class Ranked:
    """The answers that make a group, best first.

    Attributes:
        answers: the places of the answers in the row.
        ranks: the rank of each, from 0, ascending; equal for tied answers.
        scores: the score of each; None if the row has none.
        left_out: how many answers were left out, by reason.
    """

    answers: tuple[int, ...]
    ranks: tuple[int, ...]
    scores: tuple[float, ...] | None = None
    left_out: Counter[str] = field(default_factory=Counter)


_LARGEST = float(np.finfo(np.float32).max)


def is_number(value: Any) -> bool:
    """Returns True for a number that float32, in which scores and weights are kept, can hold."""
    return not isinstance(value, bool) and isinstance(value, int | float) and -_LARGEST <= value <= _LARGEST


def read_scores(values: Any, name: str, count: int) -> list[float]:
    """Reads the scores or ranks of the answers of a row.

    Raises:
        BadRow: they are no numbers, or not as many as there are answers.
    """
    if not isinstance(values, list):
        raise BadRow(f"wrong {name}", f"`{name}` is {short(values)}; expected a list with a number for each answer")
    if len(values) != count:
        raise BadRow(f"wrong {name}", f"`{name}` has {len(values)} numbers for {count} answers")
    for number, value in enumerate(values):
        if not is_number(value):
            wanted = "a finite number, of at most 3.4e38"
            raise BadRow(f"wrong {name}", f"number {number} of `{name}` is {short(value)}; expected {wanted}")
    return [float(np.float32(value)) for value in values]  # as they are kept: scores that are then equal are tied


def rank_answers(
    answers: Sequence[Any], scores: Sequence[float] | None, ranks: Sequence[float] | None, settings: GroupSettings
) -> Ranked:
    """Puts the answers of a row in order, the best first.

    Args:
        answers: the answers, only to find those that are equal.
        scores: their scores, higher is better; None if there are none.
        ranks: their ranks, lower is better; None if there are scores.
        settings: what is left out.

    Raises:
        BadRow: nothing is left to compare.
    """
    if len(answers) < 2:
        raise BadRow("one answer", f"the row has {len(answers)} answer(s); a preference needs two")
    if settings.min_score_gap and scores is None:
        raise BadRow("no scores", "`min_score_gap` is set, but the row has no scores")
    keys = [-score for score in scores] if scores is not None else list(ranks or ())
    order = sorted(range(len(answers)), key=keys.__getitem__)
    if len(set(keys)) == 1:
        raise BadRow("all tied", "all answers have the same score or rank, so there is nothing to prefer")
    left_out: Counter[str] = Counter()

    def keep(places: list[int], reason: str, wanted: Any) -> list[int]:
        kept: list[int] = []
        for place in places:
            if wanted(place, kept):
                kept.append(place)
            else:
                left_out[reason] += 1
        return kept

    order = keep(order, "equal to a better one", lambda n, kept: all(answers[n] != answers[m] for m in kept))
    if settings.ties == "drop":
        order = keep(order, "tied with an earlier one", lambda n, kept: not kept or keys[n] != keys[kept[-1]])
    if gap := settings.min_score_gap:
        order = keep(
            order,
            "closer than `min_score_gap` to a better one",
            lambda n, kept: not kept or keys[n] - keys[kept[-1]] >= gap,
        )
    if settings.max_responses is not None and len(order) > settings.max_responses:
        last, most = len(order) - 1, settings.max_responses
        stay = {order[round(k * last / (most - 1))] for k in range(most)}
        order = keep(order, "beyond `max_responses`", lambda n, _: n in stay)
    if len(order) < 2 or keys[order[0]] == keys[order[-1]]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise BadRow("one answer", f"nothing is left to compare: of {len(answers)} answers were left out {reasons}")
    dense = accumulate((keys[b] != keys[a] for a, b in pairwise(order)), initial=0)
    return Ranked(
        tuple(order), tuple(map(int, dense)), None if scores is None else tuple(scores[n] for n in order), left_out
    )
