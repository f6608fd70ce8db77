"""The tree of some sequences: every sequence is on its path, nothing is laid out twice, and subtrees have no gap."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jax_simpo.data import groups as groups_module
from jax_simpo.data.groups import Group, GroupLengths, Response
from jax_simpo.data.tree import common_prefix_length, lay_out
from tests.pairs import pairs

# Three different tokens: equal sequences, and sequences that others begin with, come up by themselves.
SEQUENCES = st.lists(st.lists(st.integers(0, 2), max_size=9), min_size=1, max_size=12)


def arrays(sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
    return [np.array(sequence, np.int32) for sequence in sequences]


@given(SEQUENCES)
def test_every_sequence_is_on_its_path(sequences: list[list[int]]) -> None:
    made = arrays(sequences)
    tree = lay_out(made)
    laid = np.full(tree.length, -1)
    for node in tree.nodes:
        own = slice(node.start, node.start + node.stop - node.first)
        assert (laid[own] == -1).all() and node.first < node.stop
        laid[own] = made[node.sequence][node.first : node.stop]
    for number, sequence in enumerate(made):
        indices = tree.indices(number)
        assert laid[indices].tolist() == sequence.tolist()
        assert (np.diff(indices) > 0).all()


@given(SEQUENCES)
def test_no_common_prefix_is_laid_out_twice(sequences: list[list[int]]) -> None:
    prefixes = {tuple(sequence[: n + 1]) for sequence in sequences for n in range(len(sequence))}
    assert lay_out(arrays(sequences)).length == len(prefixes)


@given(SEQUENCES)
@example([[1, 2], [1, 2, 3], [1, 2]])
def test_a_token_is_visible_to_its_own_subtree_alone(sequences: list[list[int]]) -> None:
    """`end` is what a mask needs: key k is visible to query q if `k <= q < end`."""
    tree = lay_out(arrays(sequences))
    end = np.concatenate([np.zeros(0, int), *(np.full(n.stop - n.first, n.end) for n in tree.nodes)])
    for number in range(len(sequences)):
        indices = tree.indices(number).tolist()
        for depth, query in enumerate(indices):
            assert [key for key in range(query + 1) if query < end[key]] == indices[: depth + 1]


@given(SEQUENCES)
def test_of_two_branches_that_of_the_earlier_sequence_comes_first(sequences: list[list[int]]) -> None:
    made, tree = arrays(sequences), lay_out(arrays(sequences))
    for i, j in combinations(range(len(made)), 2):
        depth = common_prefix_length(made[i], made[j])
        if depth == min(len(made[i]), len(made[j])):
            continue
        earliest = [
            next(n for n, other in enumerate(sequences) if other[: depth + 1] == sequences[own][: depth + 1])
            for own in (i, j)
        ]
        first, second = (tree.indices(own)[depth] for own in (i, j))
        assert (first < second) == (earliest[0] < earliest[1])


@given(SEQUENCES)
def test_separate_sequences_stand_one_after_the_other(sequences: list[list[int]]) -> None:
    tree = lay_out(arrays(sequences), share=False)
    assert tree.length == sum(map(len, sequences))
    assert [n for number in range(len(sequences)) for n in tree.indices(number)] == list(range(tree.length))


@given(SEQUENCES)
def test_what_the_levels_save_adds_up_to_what_the_tree_saves(sequences: list[list[int]]) -> None:
    tree = lay_out(arrays(sequences))
    assert sum(tree.savings()) == sum(map(len, sequences)) - tree.length


def test_a_tree_is_never_longer_than_sharing_the_one_common_prefix() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        made = [rng.integers(0, 2, rng.integers(1, 12)) for _ in range(rng.integers(2, 9))]
        shared = min(common_prefix_length(made[0], other) for other in made[1:])
        separate = sum(map(len, made))
        assert lay_out(made).length <= separate - shared * (len(made) - 1)
        assert lay_out(made[:2]).length == len(made[0]) + len(made[1]) - common_prefix_length(*made[:2])


def test_the_lengths_of_a_tree_are_those_of_its_mask() -> None:
    ids = [[1, 2, 3, 4, 9], [1, 2, 3, 5, 9], [1, 2, 6, 9]]
    responses = (Response.after(2, np.array(x, np.int32)) for x in ids)
    lengths = GroupLengths.of([Group(tuple(responses))])
    assert lengths.tree_tokens.tolist() == [6]  # 1 2 3 4 | 5 | 6
    assert lengths.tree_visible.tolist() == [1 + 2 + 3 + 4 + 4 + 3]
    assert lengths.tree_predictors.tolist() == [5]  # all inputs but the first
    assert lengths.row_tokens(False).tolist() == [4 + 4 + 3]
    assert lengths.row_targets().tolist() == [3 + 3 + 2]


@given(pairs())
def test_the_short_cut_of_pairs_counts_what_their_tree_has(pair: Group) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups_module, "_measure_pair", lambda a, b: groups_module._measure_tree(Group((a, b, a))))
        # A third response that repeats the first adds nothing to the tree.
        expected = GroupLengths.of([pair])
    found = GroupLengths.of([pair])
    for name in ("tree_tokens", "tree_visible", "tree_predictors"):
        assert getattr(found, name) == getattr(expected, name)
