"""Random tokenised pairs, and hypothesis strategies for them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from jax_simpo.data.groups import Group, Response


def make_pair(prompt: list[int], *responses: list[int]) -> Group:
    return Group(tuple(Response.after(len(prompt), np.array(prompt + r, np.int32)) for r in responses))


def random_pairs(
    rng: np.random.Generator, count: int, vocabulary: int, *, prompt: tuple[int, int], response: tuple[int, int]
) -> list[Group]:
    """Pairs with lengths in the given ranges (inclusive); responses often begin alike, as with a template's header."""
    pairs = []
    for _ in range(count):
        tokens = lambda low, high: rng.integers(1, vocabulary, rng.integers(low, high + 1)).tolist()  # noqa: E731
        head = tokens(0, 2)
        pairs.append(make_pair(tokens(*prompt), head + tokens(*response), head + tokens(*response)))
    return pairs


class Pairs:
    """Groups in memory, with the interface of a dataset. `read` lists the groups that were asked for."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._groups = groups
        self.read: list[int] = []

    def groups(self, indices: np.ndarray) -> list[Group]:
        self.read += np.asarray(indices).tolist()
        return [self._groups[i] for i in indices]


def _ids(low: int, high: int) -> st.SearchStrategy[list[int]]:
    # Four different tokens: common prefixes of every length come up by themselves.
    return st.lists(st.integers(1, 4), min_size=low, max_size=high)


@st.composite
def pairs(draw: st.DrawFn, responses: int = 2) -> Group:
    """Any pair: merged last prompt tokens, one response a prefix of the other, nothing in common, one-token answers."""
    start = draw(_ids(0, 6))
    made = []
    for _ in range(responses):
        prompt, response = start + draw(_ids(0 if start else 1, 2)), draw(_ids(1, 6))
        made.append(Response.after(len(prompt), np.array(prompt + response, np.int32)))
    return Group(tuple(made))


def random_group(rng: np.random.Generator, vocabulary: int = 5, most: int = 32, longest: int = 60) -> Group:
    """Makes a group whose inputs form a random tree: up to six levels and `most` leaves.

    Tokens are few, and a branch may be empty. So responses begin with whole others, are equal, or have nothing in
    common. Their prompts end at the same token or, as where a token merges, at one beside it; each has up to three runs
    of scored tokens.
    """

    def branches(depth: int, room: int) -> list[list[int]]:
        own = rng.integers(1, vocabulary, rng.integers(0, 6)).tolist()
        if depth == 6 or room < 2 or (depth and rng.random() < 0.4):
            return [own]
        count = int(rng.integers(2, min(room, 4) + 1))
        below = [leaf for n in range(count) for leaf in branches(depth + 1, (room - n) // count)]
        return [own + leaf for leaf in below]

    start = rng.integers(1, vocabulary, rng.integers(0, 8)).tolist()
    leaves = [start + leaf for leaf in branches(0, int(rng.integers(2, most + 1)))]
    prompt = max(1, len(start))
    responses = []
    for leaf in leaves:
        ids = np.array([*leaf[:longest], *rng.integers(1, vocabulary, 2)], np.int32)
        first = int(np.clip(prompt + rng.integers(-1, 2), 1, len(ids) - 1))
        cuts = np.unique([first, *rng.integers(first, len(ids), 4), len(ids)]).tolist()
        bounds = cuts if len(cuts) % 2 == 0 else cuts[1:]
        responses.append(Response(ids, tuple(zip(bounds[::2], bounds[1::2], strict=True))))
    ranks = np.sort(rng.integers(0, len(leaves), len(leaves)))
    dense = np.unique(ranks, return_inverse=True)[1]
    return Group(tuple(responses), tuple(dense.tolist()))
