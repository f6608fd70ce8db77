"""Rows with several answers: their forms, their ranking, and the rows that cannot be ranked."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_simpo.data.conversations import Conversation, make_conversation, read_conversation, read_row
from jax_simpo.data.messages import BadRow
from jax_simpo.data.ranking import GroupSettings, rank_answers

ASK = {"role": "user", "content": "q"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
RESULT = {"role": "tool", "content": "42"}


def says(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def contents(read: Conversation) -> list[list[str]]:
    return [[turn["content"] for turn in answer] for answer in read.answers]


FORMS = {
    "texts with scores": {"prompt": "q", "responses": ["b", "a", "c"], "scores": [2, 3.5, -1]},
    "texts with ranks": {"prompt": "q", "responses": ["c", "b", "a"], "ranks": [3, 2, 1]},
    "ranks from 0, as floats": {"prompt": "q", "responses": ["c", "b", "a"], "ranks": [2.0, 1.0, 0.0]},
    "turns": {"prompt": [ASK], "responses": [[says("a")], [says("b")], [says("c")]], "scores": [3, 2, 1]},
    "dialogues": {"responses": [[ASK, says("a")], [ASK, says("c")], [ASK, says("b")]], "scores": [3, 1, 2]},
    "HH's text": {
        "responses": [f"\n\nHuman: q\n\nAssistant: {answer}" for answer in "bac"],
        "ranks": [2, 1, 3],
    },
    "UltraFeedback's objects": {
        "prompt": "q",
        "responses": [
            {"response": x, "overall_score": s, "model": "m"} for x, s in (("a", 9.0), ("c", 1.5), ("b", 7.0))
        ],
    },
    "Nectar's objects": {
        "prompt": "\n\nHuman: q\n\nAssistant: ",
        "responses": [{"answer": x, "rank": r, "model": "m"} for x, r in (("b", 2.0), ("a", 1.0), ("c", 3.0))],
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_answers_are_read_best_first_from_any_form(form: str) -> None:
    read = read_conversation(FORMS[form])
    assert read.prompt == [ASK]
    assert contents(read) == [["a"], ["b"], ["c"]]
    assert read.ranks == (0, 1, 2)


def test_lists_of_chosen_and_rejected_answers_are_two_ties() -> None:
    read = read_conversation({"prompt": "q", "chosen": ["a", "b"], "rejected": ["c", "d", "e"]})
    assert contents(read) == [["a"], ["b"], ["c"], ["d"], ["e"]]
    assert read.ranks == (0, 0, 1, 1, 1)
    turns = read_conversation({"prompt": [ASK], "chosen": [[says("a")], [says("b")]], "rejected": [[says("c")]]})
    assert contents(turns) == [["a"], ["b"], ["c"]]


def test_conversations_part_at_any_turn() -> None:
    better = [ASK, says("x"), {"role": "user", "content": "more"}, says("a")]
    worse = [ASK, says("y"), {"role": "user", "content": "less"}, says("b")]
    read = read_conversation({"chosen": better, "rejected": worse})
    assert read.prompt == [ASK]
    assert contents(read) == [["x", "more", "a"], ["y", "less", "b"]]
    later = read_conversation({"responses": [better, [*better[:3], says("c")], worse], "scores": [3, 2, 1]})
    assert later.prompt == [ASK]
    users_part = read_conversation({"chosen": better, "rejected": [*better[:2], *worse[2:]]})
    assert users_part.prompt == better[:2]
    assert contents(users_part) == [["more", "a"], ["less", "b"]]


def test_a_conversation_that_ends_where_another_goes_on_keeps_its_last_turn() -> None:
    read = read_conversation({"chosen": [ASK, says("a"), ASK, says("b")], "rejected": [ASK, says("a")]})
    assert read.prompt == [ASK]
    assert contents(read) == [["a", "q", "b"], ["a"]]


def test_calls_and_results_of_tools_are_kept_and_the_nulls_of_arrow_dropped() -> None:
    call = {
        **CALL,
        "tool_calls": [{"type": "function", "id": None, "function": {"name": "f", "arguments": {"x": None}}}],
    }
    row = {
        "prompt": [{**ASK, "tool_calls": None}],
        "chosen": [call, {**RESULT, "name": "f"}, says("a")],
        "rejected": [says("b")],
        "tools": '[{"type": "function", "function": {"name": "f"}}]',
    }
    read = read_conversation(row)
    assert read.prompt == [ASK]
    assert read.answers[0] == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
        },
        {"role": "tool", "content": "42", "name": "f"},
        says("a"),
    ]
    assert read.tools == [{"type": "function", "function": {"name": "f"}}]


def test_content_in_parts_of_text_is_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    read = read_conversation({"prompt": [{"role": "user", "content": parts}], "chosen": "x", "rejected": "y"})
    assert read.prompt == [{"role": "user", "content": "ab"}]


BAD_ROWS = {
    "wrong scores": [
        {"prompt": "q", "responses": ["a", "b"], "scores": [1, "2"]},
        {"prompt": "q", "responses": ["a", "b"], "scores": [1, float("nan")]},
        {"prompt": "q", "responses": ["a", "b"], "scores": [1, 10**400]},  # a float cannot hold it
        {"prompt": "q", "responses": ["a", "b"], "scores": [1, 1e300]},  # and neither can a float32
        {"prompt": "q", "responses": ["a", "b"], "scores": [1, True]},
        {"prompt": "q", "responses": ["a", "b"], "scores": [1, None]},
        {"prompt": "q", "responses": ["a", "b"], "scores": 3},
        {"prompt": "q", "responses": ["a", "b"], "scores": [1]},
    ],
    "wrong ranks": [{"prompt": "q", "responses": ["a", "b"], "ranks": [1, 2, 3]}],
    "one answer": [
        {"prompt": "q", "responses": ["a"], "scores": [1]},
        {"responses": [], "scores": []},
        {"prompt": "q", "response": "a", "score": 1},
        {"prompt": "q", "responses": ["a", "a"], "scores": [1, 2]},
    ],
    "all tied": [{"prompt": "q", "responses": ["a", "b", "c"], "scores": [2, 2, 2.0]}],
    "no scores": [{"prompt": "q", "responses": ["a", "b"]}],
    "two forms": [
        {"prompt": "q", "responses": ["a", "b"], "scores": [1, 2], "ranks": [1, 2]},
        {"prompt": "q", "responses": ["a", "b"], "scores": [1, 2], "chosen": "a", "rejected": "b"},
    ],
    "not a list": [{"prompt": "q", "responses": "ab", "scores": [1, 2]}],
    "missing value": [{"prompt": "q", "responses": ["a", None], "scores": [1, 2]}],
    "empty response": [{"prompt": "q", "responses": ["a", " "], "scores": [1, 2]}],
    "tool turn without a call": [
        {"prompt": [ASK], "chosen": [says("a"), RESULT, says("b")], "rejected": [says("c")]},
        {"prompt": [ASK], "chosen": [CALL, RESULT, ASK, RESULT, says("b")], "rejected": [says("c")]},
    ],
    "not text": [
        {"prompt": [{"role": "user", "content": [{"type": "image", "image": "x"}]}], "chosen": "a", "rejected": "b"},
    ],
    "wrong tools": [{"prompt": "q", "chosen": "a", "rejected": "b", "tools": "{"}],
}


@pytest.mark.parametrize(("kind", "row"), [(kind, row) for kind, rows in BAD_ROWS.items() for row in rows])
def test_rows_that_cannot_be_ranked_are_refused_with_the_reason(kind: str, row: dict[str, Any]) -> None:
    with pytest.raises(BadRow) as caught:
        read_conversation(row)
    assert caught.value.kind == kind


@given(st.lists(st.integers(0, 4), min_size=2, max_size=9).filter(lambda scores: len(set(scores)) > 1))
def test_ranks_are_dense_and_follow_the_scores(scores: list[int]) -> None:
    ranked = rank_answers(range(len(scores)), scores, None, GroupSettings())
    assert ranked.scores is not None
    assert sorted(ranked.answers) == list(range(len(scores)))
    assert list(ranked.scores) == sorted(scores, reverse=True)
    levels = sorted(set(scores), reverse=True)
    assert ranked.ranks == tuple(levels.index(score) for score in ranked.scores)
    for a, b in zip(ranked.answers, ranked.answers[1:], strict=False):
        assert (-scores[a], a) < (-scores[b], b)  # ties in the order of the row


def test_what_is_left_out_of_a_group_is_counted() -> None:
    answers, scores = list("abcdefgg"), [9, 8.9, 7, 7, 4, 3, 1, 1]
    everything = rank_answers(answers, scores, None, GroupSettings())
    assert everything.left_out == {"equal to a better one": 1}
    dropped = rank_answers(answers, scores, None, GroupSettings(ties="drop"))
    assert [answers[n] for n in dropped.answers] == list("abcefg")
    assert dropped.left_out == {"equal to a better one": 1, "tied with an earlier one": 1}
    apart = rank_answers(answers, scores, None, GroupSettings(min_score_gap=2))
    assert [answers[n] for n in apart.answers] == list("aceg")
    few = rank_answers(answers, scores, None, GroupSettings(max_responses=3))
    assert [answers[n] for n in few.answers] == ["a", "d", "g"]  # the best, one between, the worst
    assert few.left_out == {"equal to a better one": 1, "beyond `max_responses`": 4}
    assert few.ranks == (0, 1, 2)


def test_nothing_to_compare_after_leaving_out_is_a_bad_row() -> None:
    with pytest.raises(BadRow, match=r"of 2 answers were left out 1 closer than `min_score_gap`"):
        rank_answers("ab", [1, 1.5], None, GroupSettings(min_score_gap=1))
    with pytest.raises(BadRow, match="no scores: `min_score_gap` is set"):
        rank_answers("ab", None, [0, 1], GroupSettings(min_score_gap=1))


def test_rows_of_one_prompt_make_one_group() -> None:
    singles = [{"prompt": "q", "response": answer, "score": score} for answer, score in (("b", 1), ("a", 2), ("c", 0))]
    read = make_conversation([read_row(row) for row in singles], GroupSettings())
    assert contents(read) == [["a"], ["b"], ["c"]]
    pairs = [{"prompt": "q", "chosen": "a", "rejected": "c"}, {"prompt": "q", "chosen": "b", "rejected": "c"}]
    read = make_conversation([read_row(row) for row in pairs], GroupSettings())
    assert (contents(read), read.ranks) == ([["a"], ["b"], ["c"]], (0, 0, 1))
    assert read.left_out == {"equal to a better one": 1}


def test_rows_of_one_prompt_that_contradict_each_other_are_refused() -> None:
    pairs = [{"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "b", "rejected": "c"}]
    with pytest.raises(BadRow, match="chosen in one row of the prompt and rejected in another"):
        make_conversation([read_row(row) for row in pairs], GroupSettings())
    mixed = [pairs[0], {"prompt": "q", "responses": ["x", "y"], "scores": [1, 2]}]
    with pytest.raises(BadRow, match="some rows of the prompt have scores and some have none"):
        make_conversation([read_row(row) for row in mixed], GroupSettings())
    ranked = [{"prompt": "q", "responses": ["x", "y", "z"], "ranks": [1, 2, 3]}, pairs[0]]
    with pytest.raises(BadRow, match="have `ranks`, which do not compare them: give `scores`"):
        make_conversation([read_row(row) for row in ranked], GroupSettings())
