"""Rows of every form become the text of the published runs, and unusable rows and templates are refused."""

from __future__ import annotations

import itertools
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from jax_simpo.config import load_config
from jax_simpo.data.chat import built_in_templates, load_tokenizer, render_group
from jax_simpo.data.conversations import read_conversation
from jax_simpo.data.messages import BadRow, parse_hh
from jax_simpo.errors import DataError
from tests.small_tokenizer import save

PLAIN = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def asks(text: str = "q") -> dict[str, str]:
    return message("user", text)


def says(text: str) -> dict[str, str]:
    return message("assistant", text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("tokenizer"), template=PLAIN)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(folder)


def texts(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, insert: bool = True) -> tuple[str, str, str]:
    text = render_group(read_conversation(row), tokenizer, insert)
    return text.prompt, text.responses[0], text.responses[1]


# --- tokenizer set-up


def test_the_tokenizer_is_set_up_as_in_the_original(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.truncation_side == "left"
    assert tokenizer.pad_token == tokenizer.eos_token
    assert tokenizer.model_max_length == 2048


def test_a_tokenizer_without_template_asks_for_chat_template(tmp_path: Path) -> None:
    save(tmp_path)
    with pytest.raises(DataError, match=r"has no chat template: set `chat_template` to one of gemma, llama-3"):
        load_tokenizer(tmp_path)


def test_a_path_never_chooses_a_template(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save(tmp_path / "mistral-instruct", template=PLAIN))
    assert tokenizer.chat_template == PLAIN


def test_a_missing_tokenizer_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer .*nothing-here: cannot be loaded"):
        load_tokenizer(tmp_path / "nothing-here")


def test_a_tokenizer_without_eos_is_refused(tmp_path: Path) -> None:
    save(tmp_path, special={"unk_token": "<unk>"}, template=PLAIN)
    with pytest.raises(DataError, match="no EOS token"):
        load_tokenizer(tmp_path)


def test_a_template_that_names_a_missing_bos_still_renders(tmp_path: Path) -> None:
    save(tmp_path, special={"eos_token": "</s>"})
    tokenizer = load_tokenizer(tmp_path, chat_template="llama-3")
    prompt, chosen, _ = texts({"prompt": "q", "chosen": "a", "rejected": "b"}, tokenizer)
    assert prompt == "<|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|>"
    assert chosen == "<|start_header_id|>assistant<|end_header_id|>\n\na<|eot_id|>"


def test_a_template_may_be_a_name_a_file_or_text(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(PLAIN)
    assert load_tokenizer(folder, chat_template=str(file)).chat_template == PLAIN
    assert load_tokenizer(folder, chat_template=PLAIN).chat_template == PLAIN
    assert built_in_templates() == ["gemma", "llama-3", "mistral-instruct", "zephyr"]
    for name in built_in_templates():
        assert load_tokenizer(folder, chat_template=name).chat_template


def test_a_misspelt_template_name_gets_the_nearest(folder: Path) -> None:
    with pytest.raises(DataError, match=r"did you mean zephyr\?"):
        load_tokenizer(folder, chat_template="zefyr")


def test_a_broken_template_is_refused_at_once(folder: Path) -> None:
    with pytest.raises(DataError, match=r"chat template of .*, line 2: "):
        load_tokenizer(folder, chat_template="{% for m in messages %}\n{{ m[ }}")


def test_a_template_that_refuses_a_lone_answer_is_refused_by_the_originals_rendering_alone(folder: Path) -> None:
    strict = "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('roles must alternate') }}{% endif %}"
    with pytest.raises(DataError, match=r"roles must alternate.*set `chat_rendering: auto`"):
        load_tokenizer(folder, chat_template=strict + PLAIN, chat_rendering="original")
    assert texts(FORMS["text"], load_tokenizer(folder, chat_template=strict + PLAIN)) == (PROMPT, CHOSEN, REJECTED)


def test_a_default_system_prompt_in_every_answer_is_warned_of(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    chatty = "{% if messages[0]['role'] != 'system' %}<system>You help.{% endif %}" + PLAIN
    with caplog.at_level(logging.WARNING):
        load_tokenizer(folder, chat_template=chatty)
        assert not caplog.text
        load_tokenizer(folder, chat_template=chatty, chat_rendering="original")
    assert "'<system>You help.' before every answer" in caplog.text


def test_that_warning_cannot_steer_the_terminal(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    chatty = "{% if messages[0]['role'] != 'system' %}\x1b[2J{% endif %}" + PLAIN
    folder = shutil.copytree(folder, tmp_path / "a\x1b[2Jb")
    load_tokenizer(folder, chat_template=chatty, chat_rendering="original")
    assert "a\u241b[2Jb puts '\\x1b[2J'" in caplog.text


# --- the built-in templates, on a dialogue with and without a system turn

DIALOGUE = [message("system", " be kind "), asks(" hi "), says("yes"), asks("more")]
EXPECTED = {
    "llama-3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nbe kind<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nyes<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nmore<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\nno<|eot_id|>",
    ),
    "zephyr": (
        "<|system|>\n be kind </s>\n<|user|>\n hi </s>\n<|assistant|>\nyes</s>\n<|user|>\nmore</s>\n",
        "<|assistant|>\nno </s>\n",
    ),
    "mistral-instruct": ("[INST] be kind\n\n hi [/INST] yes </s>[INST] more [/INST]", " no </s>"),
    "gemma": (
        "<s><start_of_turn>user\nbe kind\n\n hi<end_of_turn>\n<start_of_turn>model\nyes<end_of_turn>\n"
        "<start_of_turn>user\nmore<end_of_turn>\n",
        "<start_of_turn>model\nno<end_of_turn>\n",
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_built_in_templates_write_what_the_published_runs_wrote(folder: Path, name: str) -> None:
    row = {"chosen": [*DIALOGUE, says("no ")], "rejected": [*DIALOGUE, says("maybe")]}
    prompt, chosen, _ = texts(row, load_tokenizer(folder, chat_template=name))
    assert (prompt, chosen) == EXPECTED[name]


@pytest.mark.parametrize(
    ("name", "start"), [("llama-3", "<s><|start_header_id|>user"), ("zephyr", "<|system|>\n</s>\n<|user|>\nq</s>\n")]
)
def test_an_empty_system_message_is_put_first_where_the_template_knows_one(folder: Path, name: str, start: str) -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    tokenizer = load_tokenizer(folder, chat_template=name)
    assert texts(row, tokenizer)[0].startswith(start)
    assert "system" not in texts(row, tokenizer, insert=False)[0]


@pytest.mark.parametrize(
    ("name", "own"), [("llama-3", "llama3"), ("zephyr", "bpe4k"), ("mistral-instruct", "bpe4k-inst")]
)
def test_built_in_templates_agree_with_those_of_real_tokenizers(shared: Path, name: str, own: str) -> None:
    original = load_tokenizer(shared / "tokenizers" / own)
    ours = load_tokenizer(shared / "tokenizers" / own, chat_template=name)
    dialogues = [DIALOGUE, DIALOGUE[1:], [says(" alone ")], [asks("  two\n lines ")]]
    for dialogue in dialogues:
        assert ours.apply_chat_template(dialogue, tokenize=False) == original.apply_chat_template(
            dialogue, tokenize=False
        )


def test_the_template_of_the_published_gemma_run_writes_what_the_built_in_one_does(folder: Path) -> None:
    published = load_config(Path(__file__).parents[1] / "fixtures/simpo_configs/gemma-2-9b-it.yaml").chat_template
    theirs, ours = (load_tokenizer(folder, chat_template=template) for template in (published, "gemma"))
    dialogues = [
        DIALOGUE,
        DIALOGUE[1:],
        [message("system", ""), asks(" q ")],
        [says(" alone ")],
        [asks("two\n lines ")],
    ]
    for dialogue, answer_follows in itertools.product(dialogues, (False, True)):
        expected, actual = (
            tokenizer.apply_chat_template(dialogue, tokenize=False, add_generation_prompt=answer_follows)
            for tokenizer in (theirs, ours)
        )
        assert actual == expected


# --- forms of rows

PROMPT, CHOSEN, REJECTED = "<user>q", "<assistant>a", "<assistant>b"
FORMS = {
    "message lists": {"chosen": [asks(), says("a")], "rejected": [asks(), says("b")]},
    "prompt of messages": {"prompt": [asks()], "chosen": [says("a")], "rejected": [says("b")]},
    "prompt of messages, text answers": {"prompt": [asks()], "chosen": "a", "rejected": "b"},
    "text": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "text prompt, answers as messages": {"prompt": "q", "chosen": [says("a")], "rejected": [says("b")]},
    "text prompt beside whole dialogues": {
        "prompt": "anything",
        "chosen": [asks(), says("a")],
        "rejected": [asks(), says("b")],
    },
    "HH-RLHF": {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
    "HH-RLHF with a prompt": {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": "a", "rejected": "b"},
    "columns of a hub sequence": {
        "chosen": {"role": ["user", "assistant"], "content": ["q", "a"]},
        "rejected": {"role": ["user", "assistant"], "content": ["q", "b"]},
    },
    "messages with other keys": {
        "chosen": [{**asks(), "name": None}, says("a")],
        "rejected": [asks(), {**says("b"), "tool_calls": None}],
    },
}


@pytest.mark.parametrize("row", FORMS.values(), ids=FORMS)
def test_every_form_of_a_row_becomes_the_same_text(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    assert texts(row, tokenizer) == (PROMPT, CHOSEN, REJECTED)


def test_hh_text_keeps_its_turns_and_line_ends() -> None:
    assert parse_hh("\n\nHuman: a\n\nb\n\nAssistant: c\n\nHuman: d\n\nAssistant: e") == [
        asks("a\n\nb"),
        says("c"),
        asks("d"),
        says("e"),
    ]
    assert parse_hh("Assistant: c") is None
    assert parse_hh("just text") is None


def test_a_leading_bos_is_taken_off_the_answers_only(folder: Path) -> None:
    tokenizer = load_tokenizer(folder, chat_template="{{ bos_token }}" + PLAIN)
    assert texts(FORMS["text"], tokenizer) == ("<s>" + PROMPT, CHOSEN, REJECTED)


# --- rows that cannot be used

BAD_ROWS = {
    "not a message list": [
        {"chosen": 3, "rejected": "b", "prompt": "q"},
        {"chosen": [{"from": "human", "text": "q"}], "rejected": [asks(), says("b")]},
        {"chosen": [asks(), message("assistant", None)], "rejected": [asks(), says("b")]},
        {"chosen": [asks(), message("assistant", [{"type": "text"}])], "rejected": [asks(), says("b")]},
        {"chosen": {"role": ["user", "assistant"], "content": ["q"]}, "rejected": [asks(), says("b")]},
    ],
    "missing value": [{"prompt": "q", "chosen": "a", "rejected": None}],
    "empty response": [
        {"prompt": "q", "chosen": " \n", "rejected": "b"},
        {"chosen": [asks(), says("a")], "rejected": [asks(), says("")]},
        {"prompt": [asks()], "chosen": [], "rejected": [says("b")]},
    ],
    "chosen = rejected": [{"prompt": "q", "chosen": "a", "rejected": "a"}],
    "prompts differ": [
        {"chosen": [asks("q"), says("a")], "rejected": [asks("Q"), says("b")]},
    ],
    "prompt repeated": [{"prompt": [asks()], "chosen": [asks(), says("a")], "rejected": [asks(), says("b")]}],
    "wrong role": [
        {"chosen": [message("human", "q"), says("a")], "rejected": [message("human", "q"), says("b")]},
        {"chosen": [asks(), message("system", "s"), says("a")], "rejected": [asks(), says("b")]},
        {"prompt": [asks()], "chosen": [asks("x"), says("a")], "rejected": [says("b")]},
    ],
    "last turn not assistant": [
        {"chosen": [says("x"), asks("a")], "rejected": [says("x"), asks("b")]},
        {"chosen": "\n\nHuman: q", "rejected": "\n\nHuman: r"},
    ],
    "no prompt": [
        {"chosen": "a", "rejected": "b"},
        {"chosen": ["a"], "rejected": ["b"]},
        {"prompt": " ", "chosen": "a", "rejected": "b"},
        {"prompt": [], "chosen": "a", "rejected": "b"},
        {"prompt": [], "chosen": [asks(), says("a")], "rejected": [asks(), says("b")]},
        {"chosen": [says("a")], "rejected": [says("b")]},
    ],
    "broken text": [{"prompt": "q\ud800", "chosen": "a", "rejected": "b"}],
}


@pytest.mark.parametrize(("kind", "row"), [(kind, row) for kind, rows in BAD_ROWS.items() for row in rows])
def test_bad_rows_are_refused_with_the_reason(
    kind: str, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(BadRow) as caught:
        render_group(read_conversation(row), tokenizer, True)
    assert caught.value.kind == kind


def test_answers_the_template_makes_equal_are_refused(folder: Path) -> None:
    with pytest.raises(BadRow, match="read the same after the chat template"):
        row = {"prompt": "q", "chosen": "a", "rejected": " a "}
        render_group(read_conversation(row), load_tokenizer(folder, chat_template="llama-3"), True)


def test_what_a_template_refuses_is_a_bad_row(folder: Path) -> None:
    picky = "{% for m in messages %}{% if 'z' in m['content'] %}{{ raise_exception('no z') }}{% endif %}{% endfor %}x"
    with pytest.raises(BadRow, match="refused by the chat template: no z"):
        row = {"prompt": "z", "chosen": "a", "rejected": "b"}
        render_group(read_conversation(row), load_tokenizer(folder, chat_template=picky), True)
