"""How answers are rendered is chosen once for a run; rows that it does not fit are counted, and so is what is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_simpo.data.chat import built_in_templates, load_tokenizer, resolve_template
from jax_simpo.data.rendering import choose_rendering
from jax_simpo.data.sources import load_split
from jax_simpo.data.tokenize import GroupDataset, tokenize_split
from jax_simpo.run.samples import sample_prompts
from tests.data.public_templates import PUBLIC
from tests.small_tokenizer import train


def tokenized(folder: Path, rows: list[dict[str, Any]], tokenizer: Any, **settings: Any) -> GroupDataset:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = load_split({str(folder / "rows.jsonl"): 1.0}, "train")
    return tokenize_split(raw, tokenizer, max_length=4000, max_prompt_length=2000, cache_dir=folder / "c", **settings)


def pair(prompt: str, chosen: str, rejected: str = "a dog") -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


@pytest.mark.parametrize("insert", [True, False])
@pytest.mark.parametrize("name", built_in_templates())
def test_the_templates_of_the_published_runs_are_rendered_as_in_the_original(name: str, insert: bool) -> None:
    tokenizer = train(template=resolve_template(name))
    auto, original = (choose_rendering(tokenizer, mode, insert) for mode in ("auto", "original"))
    assert (auto.in_context, auto.takes_system) == (False, original.takes_system)
    assert original.reasons == ()
    if name == "zephyr":  # it alone writes a line end after EOS
        (reason,) = auto.reasons
        assert "puts a second '</s>' after that: both are trained" in reason
    else:
        assert auto.reasons == ()


def test_of_the_two_eos_of_zephyr_s_template_in_context_trains_one(tmp_path: Path) -> None:
    tokenizer, rows = train(template=resolve_template("zephyr")), [pair("q", "a cat")]
    auto, in_context = (tokenized(tmp_path, rows, tokenizer, chat_rendering=mode) for mode in ("auto", "in_context"))
    trained = [tokenizer.decode(dataset.group(0).responses[0].targets) for dataset in (auto, in_context)]
    assert trained == ["<|assistant|>\na cat</s>\n</s>", "a cat</s>"]
    assert in_context.remarks() == []
    (note,) = auto.remarks()
    assert note.endswith("`chat_rendering: in_context` trains one")


@pytest.mark.parametrize("name", ["llama3", "bpe4k", "bpe4k-inst"])
def test_real_tokenizers_of_the_published_runs_give_the_same_tokens_either_way(
    shared: Path, name: str, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(shared / "tokenizers" / name)
    lines = (shared / "data" / "hh_harmless.test.jsonl").read_text().splitlines()[:60]
    rows = [json.loads(line) for line in lines]
    auto, original = (tokenized(tmp_path, rows, tokenizer, chat_rendering=mode) for mode in ("auto", "original"))
    assert original.remarks() == []
    twice = "and the original SimPO puts a second '</s>' after that"  # of Zephyr's template, which bpe4k has
    assert [twice in remark for remark in auto.remarks()] == [True] * (name == "bpe4k")
    for number in range(len(rows)):
        for ours, theirs in zip(auto.group(number).responses, original.group(number).responses, strict=True):
            np.testing.assert_array_equal(ours.ids, theirs.ids)
            assert ours.spans == theirs.spans


def test_a_row_that_the_template_writes_otherwise_by_itself_is_written_in_context_and_counted(tmp_path: Path) -> None:
    picky = (
        "{% for m in messages %}{% if loop.first and 'z' in m['content'] %}LEAK{% endif %}<{{ m['role'] }}>"
        "{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer = train(template=picky)
    rows = [pair("q", "a cat"), pair("q", "a zebra"), pair("q", "a bat")]
    for _ in range(2):  # the second time from the cache
        dataset = tokenized(tmp_path, rows, tokenizer)
        assert dataset.rendering_summary().startswith("1 pair is rendered in context, unlike the others, because")
        answers = [tokenizer.decode(dataset.group(n).responses[0].targets) for n in range(3)]
        assert answers == ["<assistant>a cat</s>", "a zebra</s>", "<assistant>a bat</s>"]
    leaky = tokenized(tmp_path, rows, tokenizer, chat_rendering="original")
    assert tokenizer.decode(leaky.group(1).responses[0].targets) == "LEAK<assistant>a zebra</s>"


def test_answers_of_which_a_template_leaves_a_part_out_are_counted(tmp_path: Path) -> None:
    public = PUBLIC["deepseek-r1-distill"]
    tokenizer = train({"bos_token": public.bos or "", "eos_token": public.eos}, public.template)
    thinks = pair("q", "<think>hm</think>a cat", "<think>oh\n\n</think> a dog")
    dataset = tokenized(tmp_path, [thinks, pair("q", "a  cat\n")], tokenizer)
    assert dataset.notes.shortened == 2
    assert "the chat template leaves out a part of 2 answers, such as their thoughts" in dataset.rendering_summary()
    keeps = train({"bos_token": "<s>", "eos_token": "<|im_end|>"}, PUBLIC["qwen-3"].template)
    assert tokenized(tmp_path, [thinks], keeps).notes.shortened == 0


@pytest.mark.parametrize("name", ["smollm2-instruct", "llama-3-8b-instruct", "qwen-3", "zephyr-7b-beta", "mistral-v3"])
def test_samples_ask_the_model_with_what_the_template_asks_with(name: str, tmp_path: Path) -> None:
    public = PUBLIC[name]
    tokenizer = train({"bos_token": public.bos or "<s>", "eos_token": public.eos}, public.template)
    dataset = tokenized(tmp_path, [pair("what is tea?", "a cat")], tokenizer, auto_insert_empty_system_msg=False)
    _, prompts = sample_prompts(dataset, tokenizer, 1)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "what is tea?"}], tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.decode(prompts[0]).removeprefix(tokenizer.bos_token) == asked.removeprefix(tokenizer.bos_token)
