"""Greedy samples are those of transformers, on any mesh."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from jax_simpo import hf
from jax_simpo.models.generate import generate
from jax_simpo.models.policy import Forward
from jax_simpo.models.transformer import Model
from jax_simpo.sharding import make_mesh

NEW = 24  # tokens of an answer


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaForCausalLM, Path]:
    """Makes a random Llama with weights so large that its answers do not repeat one token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return model, folder


def prompts_of_different_lengths() -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(1, 64, length).tolist() for length in (1, 7, 30, 90, 13)]


def answers_of_transformers(model: LlamaForCausalLM, prompts: list[list[int]], eos: int | None) -> list[list[int]]:
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        ids_and_answer = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=eos
        )
        answers.append(ids_and_answer[0, len(prompt) :].tolist())
    return answers


def ours(
    folder: Path, prompts: list[list[int]], eos: int, attention: str = "blockwise", **mesh: int
) -> list[list[int]]:
    config, _ = hf.load_model_config(folder)
    model = Model(config, "float32")
    devices = make_mesh(**mesh) if mesh else make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(devices):
        params = hf.load_params(folder, model, devices)
        return generate(Forward(model, attention, 128), params, devices, prompts, NEW, eos)


@pytest.mark.parametrize("mesh", [{}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=["one device", "2 x 2 x 2"])
def test_greedy_answers_are_those_of_transformers(llama: tuple[LlamaForCausalLM, Path], mesh: dict[str, int]) -> None:
    model, folder = llama
    prompts = prompts_of_different_lengths()
    expected = answers_of_transformers(model, prompts, eos=None)
    assert len({token for answer in expected for token in answer}) > 10, "the random model says too little to compare"
    assert ours(folder, prompts, eos=10_000, **mesh) == expected


def test_an_answer_ends_before_eos(llama: tuple[LlamaForCausalLM, Path]) -> None:
    model, folder = llama
    prompts = prompts_of_different_lengths()
    eos = answers_of_transformers(model, prompts, eos=None)[1][4]
    expected = [
        answer[: answer.index(eos)] if eos in answer else answer
        for answer in answers_of_transformers(model, prompts, eos=eos)
    ]
    assert min(map(len, expected)) < NEW
    assert ours(folder, prompts, eos) == expected


def test_answers_do_not_depend_on_the_attention_implementation(llama: tuple[LlamaForCausalLM, Path]) -> None:
    prompts = prompts_of_different_lengths()
    assert ours(llama[1], prompts, 10_000, "dense") == ours(llama[1], prompts, 10_000)


def test_an_empty_prompt_is_refused(llama: tuple[LlamaForCausalLM, Path]) -> None:
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        ours(llama[1], [[1], []], 0)


def test_no_prompts_and_no_new_tokens_give_no_answers(llama: tuple[LlamaForCausalLM, Path]) -> None:
    assert ours(llama[1], [], 0) == []
