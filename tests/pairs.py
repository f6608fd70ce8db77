"""Random tokenised pairs, and hypothesis strategies for them."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from jax_simpo.data.pairs import Response, TokenizedPair


def make_pair(prompt: list[int], *responses: list[int]) -> TokenizedPair:
    return TokenizedPair(tuple(Response(np.array(prompt + r, np.int32), len(prompt)) for r in responses))


def random_pairs(
    rng: np.random.Generator, count: int, vocabulary: int, *, prompt: tuple[int, int], response: tuple[int, int]
) -> list[TokenizedPair]:
    """Pairs with lengths in the given ranges (inclusive); responses often begin alike, as with a template's header."""
    pairs = []
    for _ in range(count):
        tokens = lambda low, high: rng.integers(1, vocabulary, rng.integers(low, high + 1)).tolist()  # noqa: E731
        head = tokens(0, 2)
        pairs.append(make_pair(tokens(*prompt), head + tokens(*response), head + tokens(*response)))
    return pairs


def _ids(low: int, high: int) -> st.SearchStrategy[list[int]]:
    # Four different tokens: common prefixes of every length come up by themselves.
    return st.lists(st.integers(1, 4), min_size=low, max_size=high)


@st.composite
def pairs(draw: st.DrawFn, responses: int = 2) -> TokenizedPair:
    """Any pair: merged last prompt tokens, one response a prefix of the other, nothing in common, one-token answers."""
    start = draw(_ids(0, 6))
    made = []
    for _ in range(responses):
        prompt, response = start + draw(_ids(0 if start else 1, 2)), draw(_ids(1, 6))
        made.append(Response(np.array(prompt + response, np.int32), len(prompt)))
    return TokenizedPair(tuple(made))
