"""In an answer of several turns the assistant's tokens are scored and nobody else's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_simpo.data.chat import built_in_templates, load_tokenizer, render_group
from jax_simpo.data.conversations import read_conversation
from jax_simpo.data.messages import BadRow
from jax_simpo.data.ranking import GroupSettings
from jax_simpo.data.rendering import choose_rendering
from jax_simpo.data.sources import load_eval, load_split
from jax_simpo.data.tokenize import GroupDataset, tokenize_split
from jax_simpo.errors import DataError
from tests.small_tokenizer import save, train

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% for c in m.get('tool_calls', []) %}!{{ c['function']['name'] }}{% endfor %};{% endfor %}"
)
TOKENIZER = train(template=TEMPLATE)
SETTINGS: dict[str, Any] = {"max_length": 400, "max_prompt_length": 200}


def asks(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def tokenized(tmp_path: Path, rows: list[dict[str, Any]], **settings: Any) -> GroupDataset:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {**SETTINGS, "tokenizer": TOKENIZER, "cache_dir": tmp_path / "cache", **settings}
    return tokenize_split(load_split({str(file): 1.0}, "train"), **settings)


def runs(dataset: GroupDataset, place: int, group: int = 0) -> list[str]:
    """Returns the text of each run of scored tokens of a response."""
    response = dataset.group(group).responses[place]
    return [TOKENIZER.decode(response.ids[start:stop]) for start, stop in response.spans]


CONVERSATIONS = {
    "chosen": [asks("q"), says("the cat"), asks("and"), says("a dog")],
    "rejected": [asks("q"), says("the dog"), asks("so"), says("b"), asks("why"), says("aab")],
}


def test_the_last_turn_is_scored_or_every_turn_of_the_assistant_after_the_parting(tmp_path: Path) -> None:
    last = tokenized(tmp_path, [CONVERSATIONS])
    assert runs(last, 0) == ["<assistant>a dog;</s>"]
    assert runs(last, 1) == ["<assistant>aab;</s>"]
    every = tokenized(tmp_path, [CONVERSATIONS], train_on="assistant_turns")
    assert runs(every, 0) == ["<assistant>the cat;", "<assistant>a dog;</s>"]
    assert runs(every, 1) == ["<assistant>the dog;", "<assistant>b;", "<assistant>aab;</s>"]
    for dataset in (last, every):  # the tokens are the same, whatever is scored
        for place, name in enumerate(("chosen", "rejected")):
            text = "".join(f"<{turn['role']}>{turn['content']};" for turn in CONVERSATIONS[name])
            assert TOKENIZER.decode(dataset.group(0).responses[place].ids) == f"<s>{text}</s>"
    lengths = every.lengths
    assert lengths.targets.tolist() == [r.length for r in every.group(0).responses]
    assert lengths.prompts.tolist() == [r.prompt_length for r in every.group(0).responses]


def test_two_turns_of_the_assistant_in_a_row_are_one_run(tmp_path: Path) -> None:
    row = {"prompt": [asks("q")], "chosen": [says("a cat"), says("a dog")], "rejected": [says("b")]}
    assert runs(tokenized(tmp_path, [row], train_on="assistant_turns"), 0) == ["<assistant>a cat;<assistant>a dog;</s>"]


def test_turns_before_the_parting_belong_to_the_prompt(tmp_path: Path) -> None:
    start = [asks("q"), says("the cat"), asks("and")]
    row = {"chosen": [*start, says("a")], "rejected": [*start, says("b")]}
    dataset = tokenized(tmp_path, [row], train_on="assistant_turns")
    assert runs(dataset, 0) == ["<assistant>a;</s>"]


def test_calls_are_scored_and_results_of_tools_are_not(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "look"}}]}
    row = {
        "prompt": [asks("q")],
        "responses": [[call, {"role": "tool", "content": "42"}, says("a cat")], [says("a dog")]],
        "scores": [2, 1],
    }
    dataset = tokenized(tmp_path, [row], train_on="assistant_turns")
    assert runs(dataset, 0) == ["<assistant>!look;", "<assistant>a cat;</s>"]
    assert runs(dataset, 1) == ["<assistant>a dog;</s>"]


@given(st.lists(st.text("ab ;<", min_size=1, max_size=9), min_size=3, max_size=7).filter(lambda x: x[-1].strip()))
def test_scored_tokens_cover_the_assistants_text_and_at_most_the_tokens_that_merge_with_it(texts: list[str]) -> None:
    from jax_simpo.data.tokenize import TokenSettings, _encode, _make_responses, _texts_to_encode

    turns = [
        asks("q"),
        *((says if n % 2 == 0 else asks)(text or "a") for n, text in enumerate(texts[: len(texts) // 2 * 2 - 1])),
    ]
    if not turns[-1]["content"].strip():
        return
    read = read_conversation({"chosen": turns, "rejected": [asks("q"), says("zz")]})
    text = render_group(read, TOKENIZER, True, "assistant_turns")
    settings = TokenSettings(10**6, 10**5, train_on="assistant_turns")
    response = _make_responses(_encode(TOKENIZER, _texts_to_encode(text)), text, TOKENIZER, settings)[0]
    for (start, stop), (first, last) in zip(response.spans, text.scored_of(0), strict=True):
        own = TOKENIZER.decode(response.ids[start:stop]).removesuffix("</s>")
        wanted = text.responses[0][first:last]
        # A token that merged with the end of the turn before begins the run; one merged with the next turn ends it.
        assert own.rstrip("<") in wanted or wanted.rstrip(";") in own


@pytest.mark.parametrize("name", built_in_templates())
def test_the_built_in_templates_write_turns_one_after_the_other(name: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save(tmp_path / "tokenizer"), chat_template=name)
    read = read_conversation(CONVERSATIONS)
    text = render_group(read, tokenizer, True, "assistant_turns")
    scored = [[text.responses[n][a:b] for a, b in text.scored_of(n)] for n in (0, 1)]
    for answer, own in zip(("the cat", "a dog"), scored[0], strict=True):
        assert answer in own and "and" not in own
    assert len(scored[1]) == 3


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    forgets = train(template="{% for m in messages %}{% if loop.last %}{{ m['content'] }}{% endif %}{% endfor %}")
    for way, told in (("original", "does not write turn 0 of an answer"), ("auto", "nobody knows where the answer")):
        rendering = choose_rendering(forgets, way, True)
        with pytest.raises(BadRow, match=told):
            render_group(read_conversation(CONVERSATIONS), forgets, True, "assistant_turns", rendering)


def test_an_answer_whose_scored_turns_are_all_cut_off_is_a_bad_row(tmp_path: Path) -> None:
    long = [asks("q"), says("a"), asks("x" * 500), says("b")]
    row = {"chosen": long, "rejected": [asks("q"), says("b")]}
    with pytest.raises(DataError, match="nothing left after truncation"):
        tokenized(tmp_path, [row])
    kept = tokenized(tmp_path, [row], train_on="assistant_turns")
    assert runs(kept, 0) == ["<assistant>a;"]


def test_a_bad_group_is_named_by_file_and_row(tmp_path: Path) -> None:
    rows = [
        {"prompt": "q", "responses": ["a", "b"], "scores": [1, 2]},
        {"prompt": "q", "responses": ["a", "b"], "scores": [1, "x"]},
    ]
    with pytest.raises(DataError, match=r"rows\.jsonl, row 1 \(line 2\): wrong scores: number 1 of `scores` is 'x'"):
        tokenized(tmp_path, rows)


def test_rows_of_one_prompt_are_gathered_on_demand(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n % 3}", "response": f"answer {n}", "score": n} for n in range(9)]
    with pytest.raises(DataError, match="one answer: the row has 1 answer"):
        tokenized(tmp_path, rows)
    dataset = tokenized(tmp_path, rows, group_by="prompt")
    assert len(dataset) == 3
    assert dataset.lengths.sizes.tolist() == [3, 3, 3]
    assert [row for _, row in dataset.origins] == [0, 1, 2]
    assert runs(dataset, 0) == ["<assistant>answer 6;</s>"]
    assert dataset.scores.tolist() == [6, 3, 0, 7, 4, 1, 8, 5, 2]


def test_what_is_left_out_is_counted_and_reported(tmp_path: Path) -> None:
    row = {"prompt": "q", "responses": ["a", "b", "c", "b"], "scores": [3, 2, 1, 2]}
    dataset = tokenized(tmp_path, [row] * 2, groups=GroupSettings(max_responses=2))
    assert dataset.left_out_summary() == (
        "4 responses left out of their groups: 2 equal to a better one, 2 beyond `max_responses`"
    )
    again = tokenized(tmp_path, [row] * 2, groups=GroupSettings(max_responses=2))
    assert again.cache_hit and again.notes.left_out == dataset.notes.left_out


def test_messages_with_the_text_of_a_special_token_are_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "chosen": f"a{n}", "rejected": "b"} for n in range(4)]
    assert tokenized(tmp_path, rows).special_summary() == ""
    rows[1] |= {"prompt": "what is </s>?", "rejected": "<s> and </s>"}
    rows[3]["chosen"] = "</s>"
    for mode, told in (("tokens", "it becomes that token"), ("text", "it is read as ordinary text")):
        dataset = tokenized(tmp_path, rows, special_tokens_in_messages=mode)
        assert re.match(
            rf"3 messages hold the text of a special token, such as </s> in .*, row 1.*; {told} \(`special_tokens_in_",
            dataset.special_summary(),
        )
    again = tokenized(tmp_path, rows)
    assert again.cache_hit and again.notes.special_text == dataset.notes.special_text


def test_a_tokenizer_that_splits_special_tokens_makes_none_of_text(tmp_path: Path) -> None:
    tokenizer = train(template=TEMPLATE)
    tokenizer.split_special_tokens = True
    rows = [{"prompt": "</s>", "chosen": "a", "rejected": "b"}]
    assert tokenized(tmp_path, rows, tokenizer=tokenizer).special_summary() == ""


def test_responses_that_truncation_makes_equal_count_once(tmp_path: Path) -> None:
    row = {"prompt": "q", "responses": ["x" * 300 + "a", "x" * 300 + "b", "c"], "scores": [3, 2, 1]}
    dataset = tokenized(tmp_path, [row], max_length=60, max_prompt_length=30)
    assert dataset.lengths.sizes.tolist() == [2]
    assert dataset.group(0).ranks == (0, 1)
    assert dataset.notes.left_out == {"with the same tokens as a better one": 1}
    assert len(dataset.texts(0).responses) == 2


def test_scores_that_some_rows_lack_are_asked_for_by_row(tmp_path: Path) -> None:
    rows = [
        {"prompt": "q", "responses": ["a", "b"], "scores": [1, 2]},
        {"prompt": "q", "responses": ["a", "b"], "ranks": [1, 2]},
    ]
    dataset = tokenized(tmp_path, rows)
    with pytest.raises(DataError, match=r"rows\.jsonl, row 1: has no scores"):
        _ = dataset.scores
    assert isinstance(tokenized(tmp_path, rows[:1]).scores, np.ndarray)


def test_the_columns_of_ultrafeedback_and_nectar_are_read_as_they_are(tmp_path: Path) -> None:
    ultrafeedback = {
        "instruction": "q",
        "models": ["m"],
        "completions": [{"response": "b", "overall_score": 2.0}, {"response": "a", "overall_score": 7.5}],
    }
    nectar = {
        "prompt": "\n\nHuman: q\n\nAssistant: ",
        "answers": [{"answer": "b", "rank": 2.0}, {"answer": "a", "rank": 1.0}],
        "turns": 1,
    }
    for row in (ultrafeedback, nectar):
        dataset = tokenized(tmp_path, [row])
        assert [runs(dataset, place) for place in (0, 1)] == [["<assistant>a;</s>"], ["<assistant>b;</s>"]]


def test_beside_a_pair_columns_with_other_names_are_ignored(tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "answers": ["x"], "completions": 3}
    assert runs(tokenized(tmp_path, [row]), 0) == ["<assistant>a;</s>"]


def test_stored_groups_have_their_scores(tmp_path: Path) -> None:
    scored = {"prompt": "q", "responses": ["a", "b", "c"], "scores": [1, 3, 2]}
    dataset = tokenized(tmp_path, [scored, {"prompt": "q", "chosen": "a", "rejected": "b"}])
    assert [group.scores for group in dataset.groups([0, 1])] == [(3.0, 2.0, 1.0), None]


def test_rows_of_one_prompt_in_two_splits_stay_two_groups(tmp_path: Path) -> None:
    for split in ("a", "b"):
        rows = [{"prompt": "q", "response": f"answer {n}", "score": n} for n in range(2)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = load_eval({str(tmp_path): 1.0}, ["a", "b"])
    dataset = tokenize_split(raw, TOKENIZER, **SETTINGS, group_by="prompt", cache_dir=tmp_path / "cache")
    assert {name: own.tolist() for name, own in dataset.splits.items()} == {"a": [0], "b": [1]}
