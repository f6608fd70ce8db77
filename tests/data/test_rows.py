"""Each target in a row is predicted from the past of its own response, and from nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_simpo.data.groups import Group, GroupLengths
from jax_simpo.data.rows import RowBatch, RowShape, build_rows
from tests.pairs import make_pair, pairs

PROMPT = -1  # stands for the rank of a chosen response's prompt


def context(batch: RowBatch, row: int, query: int) -> list[tuple[int, int]]:
    """Lists (position, token) of every key that a query sees, by brute force from the definition of `key_end`."""
    keys = [k for k in range(query + 1) if query < batch.key_end[row, k]]
    return sorted((int(batch.positions[row, k]), int(batch.tokens[row, k])) for k in keys)


def predictions(batch: RowBatch, slots: int) -> dict[tuple[int, int], list[tuple[list[int], int]]]:
    """Maps each (pair, rank) to the context and target of its predictions, in order. `PROMPT` is a rank too."""
    predicted: dict[tuple[int, int], list[tuple[list[int], int]]] = {}
    for row in range(len(batch.tokens)):
        for t in range(batch.target_token.shape[1]):
            slot = batch.target_response[row, t]
            if slot == slots:
                continue
            seen = context(batch, row, batch.target_index[row, t])
            assert [position for position, _ in seen] == list(range(len(seen)))
            of_prompt, slot = slot > slots, slot % (slots + 1)
            rank = PROMPT if of_prompt else int(batch.response_rank[row, slot])
            owner = (int(batch.response_group[row, slot]), rank)
            predicted.setdefault(owner, []).append(([token for _, token in seen], int(batch.target_token[row, t])))
    return predicted


def expected(rows: list[list[Group]]) -> dict[tuple[int, int], list[tuple[list[int], int]]]:
    """Computes `predictions` from the definition of a language model: it predicts a token from all tokens before it."""
    numbered = enumerate(pair for row in rows for pair in row)
    return {
        (number, rank): [
            (response.ids[:j].tolist(), int(response.ids[j])) for j in range(response.prompt_length, len(response.ids))
        ]
        for number, pair in numbered
        for rank, response in enumerate(pair.responses)
    }


def expected_in_prompts(rows: list[list[Group]]) -> dict[tuple[int, int], list[tuple[list[int], int]]]:
    """Computes the predictions within the prompts of chosen responses. The first token is not predicted."""
    chosen = [pair.best for row in rows for pair in row]
    return {
        (number, PROMPT): [(r.ids[:j].tolist(), int(r.ids[j])) for j in range(1, r.prompt_length)]
        for number, r in enumerate(chosen)
        if r.prompt_length > 1
    }


def lay_out(rows: list[list[Group]], prefix_sharing: bool, prompt_targets: bool = False) -> tuple[RowBatch, RowShape]:
    numbers = iter(range(10**6))
    numbered = [[(next(numbers), pair) for pair in row] for row in rows]
    most = max(sum(len(r.ids) for pair in row for r in pair.responses) for row in rows)
    slots = max(sum(len(pair.responses) for pair in row) for row in rows)
    shape = RowShape(most + 3, most + 2, slots + 1)
    return build_rows(numbered, shape, prefix_sharing=prefix_sharing, prompt_targets=prompt_targets), shape


@given(st.lists(st.lists(pairs(), max_size=3), min_size=1, max_size=3), st.booleans())
def test_every_target_is_predicted_from_its_own_past_alone(rows: list[list[Group]], sharing: bool) -> None:
    batch, shape = lay_out(rows, sharing)
    assert predictions(batch, shape.responses) == expected(rows)


@given(st.lists(st.lists(pairs(), max_size=3), min_size=1, max_size=3), st.booleans())
def test_the_tokens_of_a_prompt_are_targets_once_if_asked(rows: list[list[Group]], sharing: bool) -> None:
    batch, shape = lay_out(rows, sharing, prompt_targets=True)
    assert predictions(batch, shape.responses) == {**expected(rows), **expected_in_prompts(rows)}
    counts = GroupLengths.of([pair for row in rows for pair in row]).row_targets(prompt=True)
    assert (batch.target_response != shape.responses).sum() == counts.sum()


@given(st.lists(pairs(responses=4), min_size=1, max_size=2), st.booleans())
def test_more_than_two_responses_share_a_prompt(row: list[Group], sharing: bool) -> None:
    batch, shape = lay_out([row], sharing)
    assert predictions(batch, shape.responses) == expected([row])


@given(st.lists(pairs(), min_size=1, max_size=3))
def test_a_shared_row_holds_each_pairs_common_prefix_once(row: list[Group]) -> None:
    lengths = GroupLengths.of(row)
    for sharing in (True, False):
        assert lay_out([row], sharing)[0].input_tokens == lengths.row_tokens(sharing).sum()


@given(st.lists(pairs(), max_size=2))
def test_padding_sees_no_key_and_no_query_sees_padding(row: list[Group]) -> None:
    batch, _ = lay_out([row, []], True)
    for b, used in ((0, batch.input_tokens), (1, 0)):
        assert (batch.key_end[b, used:] == 0).all() and (batch.key_end[b, :used] > 0).all()
        for query in range(used, batch.tokens.shape[1]):
            assert context(batch, b, query) == []


def test_sharing_ends_before_the_prompt_does_where_its_last_token_merged() -> None:
    from jax_simpo.data.groups import Response

    pair = Group(tuple(Response.after(3, np.array(ids, np.int32)) for ids in ([1, 2, 9, 5], [1, 2, 8, 6])))
    batch, shape = lay_out([[pair]], True)
    assert batch.tokens[0, :4].tolist() == [1, 2, 9, 8]
    assert batch.positions[0, :4].tolist() == [0, 1, 2, 2]
    assert predictions(batch, shape.responses) == expected([[pair]])


def test_a_response_that_is_the_whole_shared_part_has_an_empty_branch() -> None:
    pair = make_pair([1, 2], [3, 4], [3, 4, 5])
    batch, shape = lay_out([[pair]], True)
    assert batch.input_tokens == 4
    assert predictions(batch, shape.responses) == expected([[pair]])


def test_pairs_that_do_not_fit_a_row_are_refused() -> None:
    with pytest.raises(ValueError, match="the row has RowShape"):
        build_rows([[(0, make_pair([1] * 9, [2], [3]))]], RowShape(8, 8, 2), prefix_sharing=True)


def test_a_response_without_a_prompt_or_without_tokens_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="at least one prompt token"):
        make_pair([], [1, 2], [3])
    with pytest.raises(ValueError, match="one token of its own"):
        make_pair([1, 2], [], [3])
