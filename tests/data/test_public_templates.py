"""No public chat template hurts: what is trained is the answer as the template writes it in context, and nothing else.

The oracle is the text that the template writes for a conversation with its answer, tokenised at once.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any, NamedTuple

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jax_simpo.data.chat import render_group
from jax_simpo.data.conversations import read_conversation
from jax_simpo.data.groups import Group
from jax_simpo.data.rendering import Rendering, choose_rendering
from jax_simpo.data.tokenize import tokenize_group
from tests.data.public_templates import PUBLIC, Public
from tests.small_tokenizer import train

HUGE = {"max_length": 10**6, "max_prompt_length": 10**5, "truncation_mode": "keep_end"}
ANSWERS = ("the cat sat", "a dog ran to it")


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


SYSTEM, ASKS = turn("system", "be brief and kind"), turn("user", "what is the answer?")
EARLIER = [turn("user", "tell me of tea"), turn("assistant", "it is hot")]
DIALOGUES = {"alone": [ASKS], "with a system turn": [SYSTEM, ASKS], "after other turns": [*EARLIER, ASKS]}

FORGETS = ("mistral-v3", "mistral-nemo (v3-tekken)")  # the system prompt, once an answer stands after it

# What a template, or its tokenizer, may do besides.
_DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}{% set messages = [{'role': 'system', 'content': 'You are by default.'}] "
    "+ messages %}{% endif %}"
)
_DEFAULT_TEXT = "{% if messages[0]['role'] != 'system' %}{{ 'You are by default.' }}{% endif %}"
VARIANTS = {
    "as published": "",
    "a default system prompt": _DEFAULT,
    "BOS doubled": "{{ bos_token }}",
    "no BOS in the template": "{% set bos_token = '' %}",
    "no BOS in the tokenizer": "",
    "a line end after EOS": "",
}


@cache
def plain() -> str:
    backend = train(special={}).backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # no token reaches from "[/INST]" on
    return str(backend.to_str())


@cache
def merging(name: str) -> str:
    """A tokenizer that makes one token of the last letter of a template's header and the first of an answer."""
    tokenizer = tokenizer_of(PUBLIC[name], "as published")
    asked = write(tokenizer, [ASKS], add_generation_prompt=True)
    wholes = [write(tokenizer, [ASKS, turn("assistant", answer)]) for answer in ANSWERS]
    backend = json.loads(train(special={}).backend_tokenizer.to_str())
    model: dict[str, Any] = backend["model"]
    pairs: list[list[str]] = []
    for whole in wholes:
        assert asked is not None and whole is not None
        pair = [{" ": "Ġ", "\n": "Ċ"}.get(letter, letter) for letter in whole[len(asked) - 1 :][:2]]
        pairs += [pair] * (pair not in pairs)
        model["vocab"].setdefault("".join(pair), len(model["vocab"]))
    model["merges"] = pairs + [merge for merge in model["merges"] if merge not in pairs]
    return json.dumps(backend)


def tokenizer_of(public: Public, variant: str, backend: str | None = None) -> PreTrainedTokenizerFast:
    template = VARIANTS[variant] + public.template
    if variant == "a line end after EOS":
        template += "{% if not add_generation_prompt %}{{ '\\n' }}{% endif %}"
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(backend or plain()),
        bos_token=None if variant == "no BOS in the tokenizer" else public.bos,
        eos_token=public.eos,
        additional_special_tokens=list(public.special),
        chat_template=template,
    )
    if variant == "a default system prompt" and write(made, [ASKS]) is None:  # it refuses system turns
        made.chat_template = _DEFAULT_TEXT + public.template
    return made


def write(tokenizer: PreTrainedTokenizerFast, turns: list[dict[str, str]], **more: Any) -> str | None:
    extra = {"bos_token": ""} if tokenizer.bos_token is None else {}
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, **extra, **more))
    except Exception:  # the template refuses them
        return None


class Made(NamedTuple):
    """A group as the program makes it, and what the oracle needs."""

    group: Group
    tokenizer: PreTrainedTokenizerFast
    rendering: Rendering
    prompt: list[dict[str, str]]


def make(
    name: str, variant: str, dialogue: str, *, insert: bool, mode: Any = "auto", backend: str | None = None
) -> Made | None:
    tokenizer, prompt = tokenizer_of(PUBLIC[name], variant, backend), DIALOGUES[dialogue]
    if write(tokenizer, prompt) is None:
        return None
    rendering = choose_rendering(tokenizer, mode, insert)
    row = read_conversation({"prompt": prompt, "chosen": ANSWERS[0], "rejected": ANSWERS[1]})
    text = render_group(row, tokenizer, insert, rendering=rendering)
    if insert and rendering.takes_system and prompt[0]["role"] != "system":
        template = tokenizer.chat_template
        prompt = [turn("system", ""), *prompt] if "system" in template or "<|im_start|>" in template else prompt
    return Made(tokenize_group(text, tokenizer, **HUGE), tokenizer, rendering, prompt)


def once(text: str, bos: str | None) -> str:
    while bos and text.startswith(bos * 2):
        text = text.removeprefix(bos)
    return text


def cut_after_eos(text: str, prompt: str, eos: str) -> str:
    head, found, tail = text.rpartition(eos)
    return head + found if found and (not tail.strip() or prompt.rstrip().endswith(tail.strip())) else text


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", PUBLIC)
def test_what_is_trained_is_the_answer_in_context(name: str, variant: str) -> None:
    made = [make(name, variant, dialogue, insert=insert) for dialogue in DIALOGUES for insert in (True, False)]
    assert any(made)
    for group, tokenizer, rendering, prompt in filter(None, made):
        bos, eos = tokenizer.bos_token, tokenizer.eos_token
        asked, alone = write(tokenizer, prompt, add_generation_prompt=True), write(tokenizer, prompt)
        assert asked is not None and alone is not None
        published = name in ("zephyr-7b-beta", "stablelm-zephyr") and not rendering.in_context
        for answer, response in zip(ANSWERS, group.responses, strict=True):
            whole = write(tokenizer, [*prompt, turn("assistant", answer)])
            assert whole is not None
            text = tokenizer.decode(response.ids.tolist())
            trained = tokenizer.decode(response.targets.tolist())
            before = text.removesuffix(trained)
            # Trained is the answer, with its header at the most, and all of it up to its EOS.
            assert answer in trained and not any(t["content"] in trained for t in prompt if t["content"])
            assert "You are" not in trained and "Today Date" not in trained and "[INST]" not in trained
            wanted = cut_after_eos(once(whole, bos), alone, eos)
            wanted += "" if wanted.endswith(eos) else eos
            if published:  # its runs are reproduced: they ended every answer with EOS, a line end, and EOS again
                wanted = once(whole, bos) + eos
            assert wanted.endswith(trained)
            # Before it stands the prompt that the model is asked with, or that prompt without the header.
            starts = [once(start, bos) for start in (asked, alone, alone.removesuffix(eos), alone.rstrip())]
            assert before in starts + [f"{bos}{start}" for start in starts if bos]
            has_system = prompt[0]["role"] == "system" or variant == "a default system prompt"
            if not (name in FORGETS and has_system):
                assert text in (wanted, f"{bos}{wanted}")
            # The tokens are those of the text.
            assert response.ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
            # BOS once, EOS once.
            ids = response.ids.tolist()
            if bos is not None:
                assert ids[0] == tokenizer.bos_token_id and ids[1] != tokenizer.bos_token_id
            assert ids[-1] == tokenizer.eos_token_id and ids[-2] != tokenizer.eos_token_id
            assert response.targets.tolist().count(tokenizer.eos_token_id) == 1 + published


def begun(text: str | None, tokenizer: PreTrainedTokenizerFast) -> str:
    """Returns a text with BOS once before it."""
    assert text is not None
    return tokenizer.bos_token + text.removeprefix(tokenizer.bos_token)


MERGED = ("llama-2-chat", "llama-3-8b-instruct", "mistral-v1", "zephyr-7b-beta", "tulu-2", "deepseek-v2-chat")


@pytest.mark.parametrize("name", MERGED)
def test_a_token_that_reaches_over_the_end_of_the_prompt_is_trained_with_the_answer(name: str) -> None:
    """The tokens are those of the text at once; of the prompt only what its last token held is trained besides."""
    made = [
        make(name, "as published", dialogue, insert=False, mode="in_context", backend=merging(name))
        for dialogue in DIALOGUES
    ]
    assert any(made)
    for group, tokenizer, _, prompt in filter(None, made):
        asked = begun(write(tokenizer, prompt, add_generation_prompt=True), tokenizer)
        own = tokenizer(asked, add_special_tokens=False)["input_ids"]
        for answer, response in zip(ANSWERS, group.responses, strict=True):
            ids, start = response.ids.tolist(), response.prompt_length
            text = begun(write(tokenizer, [*prompt, turn("assistant", answer)]), tokenizer).rstrip()
            assert ids == tokenizer(text, add_special_tokens=False)["input_ids"] and ids[-1] == tokenizer.eos_token_id
            assert ids[: len(own)] != own  # they merge
            trained = tokenizer.decode(response.targets.tolist())
            assert response.targets.tolist() == ids[start:] and trained.endswith(text.removeprefix(asked))
            assert tokenizer.decode(ids[:start]) == tokenizer.decode(own[:-1])


@pytest.mark.parametrize("dialogue", DIALOGUES)
@pytest.mark.parametrize("name", PUBLIC)
def test_in_context_the_assistants_header_is_not_trained_where_the_template_can_ask_for_an_answer(
    name: str, dialogue: str
) -> None:
    made = make(name, "as published", dialogue, insert=False, mode="in_context")
    if made is None:
        return
    asked = write(made.tokenizer, made.prompt, add_generation_prompt=True)
    for answer, response in zip(ANSWERS, made.group.responses, strict=True):
        trained = made.tokenizer.decode(response.targets.tolist())
        before = made.tokenizer.decode(response.ids[: response.prompt_length].tolist())
        if name in ("deepseek-r1-distill", "qwq"):  # what it asks for an answer with opens a thought that none has
            assert not before.endswith("<think>\n") and answer in trained
            continue
        assert before.removeprefix(made.tokenizer.bos_token or "") == asked.removeprefix(made.tokenizer.bos_token or "")


@pytest.mark.parametrize("train_on", ["last_turn", "assistant_turns"])
@pytest.mark.parametrize("name", PUBLIC)
def test_of_answers_of_several_turns_the_assistants_turns_are_trained(name: str, train_on: Any) -> None:
    tokenizer = tokenizer_of(PUBLIC[name], "as published")
    turns = [turn("assistant", "the cat sat"), turn("user", "and then?"), turn("assistant", "it ran to the dog")]
    row = read_conversation({"prompt": [ASKS], "chosen": turns, "rejected": [turn("assistant", "a dog")]})
    rendering = choose_rendering(tokenizer, "in_context", False)
    forgets = name.startswith(("qwen-3", "qwq")) and name != "qwen-3-instruct-2507"  # thoughts of earlier turns
    if train_on == "assistant_turns" and forgets and name != "qwq":
        with pytest.raises(Exception, match="refused by the chat template: it writes the first 2 turns otherwise"):
            render_group(row, tokenizer, False, train_on, rendering)
        return
    group = tokenize_group(render_group(row, tokenizer, False, train_on, rendering), tokenizer, **HUGE)
    response = group.responses[0]
    runs = [tokenizer.decode(response.ids[start:stop].tolist()) for start, stop in response.spans]
    expected = [turns[2]] if train_on == "last_turn" else [turns[0], turns[2]]
    assert len(runs) == len(expected)
    for run, own in zip(runs, expected, strict=True):
        assert own["content"] in run and "and then?" not in run and "answer?" not in run
        assert run.count(tokenizer.eos_token) <= 1
    assert runs[-1].endswith(tokenizer.eos_token)


def test_a_line_says_why_answers_are_rendered_in_context() -> None:
    def reason(name: str, mode: Any = "auto") -> str:
        return "; ".join(choose_rendering(tokenizer_of(PUBLIC[name], "as published"), mode, False).reasons)

    assert reason("llama-3-8b-instruct") == reason("zephyr-7b-beta", "original") == ""
    assert reason("zephyr-7b-beta").startswith("the chat template ends answers with '</s>' and '\\n', and the original")
    assert reason("smollm2-instruct", "original") == reason("smollm2-instruct", "in_context") == ""
    start = "answers are rendered in context, unlike in the original SimPO, because "
    told = {
        "smollm-instruct": "the turn of the assistant begins with the BOS token '<|im_start|>', which",
        "qwen-2.5-instruct": "the chat template writes '<|im_start|>system\\nYou are Qwen, created by",
        "mistral-v1": "the chat template cannot write an answer by itself",
        "chatml": "it would put a second '<|im_end|>' after the '\\n' that ends them",
        "phi-3-mini": "the chat template writes an answer by itself otherwise than after its prompt",
    }
    for name, why in told.items():
        assert reason(name).startswith(start + why), name
    insert = choose_rendering(tokenizer_of(PUBLIC["gemma-2-it"], "as published"), "auto", True)
    assert insert.reasons[0] == "the chat template refuses system messages, so no empty one is put first"


def test_public_templates_are_fifty_of_as_many_kinds() -> None:
    assert len(PUBLIC) >= 50
    assert len({json.dumps([one.template, one.bos, one.eos]) for one in PUBLIC.values()}) >= 50
