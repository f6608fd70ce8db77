"""Answers are those of transformers, on any mesh; what is drawn depends on nothing but its prompt and its seed."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from jax_simpo import hf
from jax_simpo.errors import ConfigError
from jax_simpo.models.dialogue import Dialogue
from jax_simpo.models.generate import Generation, generate, padded_length
from jax_simpo.models.lora import Lora
from jax_simpo.models.policy import Forward
from jax_simpo.models.sampling import Sampling
from jax_simpo.models.transformer import Model
from jax_simpo.sharding import make_mesh

NEW = 20  # tokens of an answer, more than the windows of the models
FAMILIES = ("llama3.1", "mistral", "gemma2", "qwen2_windows", "qwen3")
MESHES = {"one device": {}, "2 x 2 x 2": {"data": 2, "fsdp": 2, "tensor": 2}}
NEVER = (10_000,)  # a token that no model here has
RANDOM = Sampling(temperature=1.0, top_k=50, top_p=0.95)
PROMPTS = [np.random.default_rng(1).integers(3, 320, length).tolist() for length in (1, 7, 30, 90, 13)]


@dataclass
class Sides:
    """A random model in transformers and here."""

    theirs: PreTrainedModel
    folder: Path

    @cached_property
    def expected(self) -> list[list[int]]:
        """The greedy answers of transformers, one prompt at a time."""
        return [self.their_answer(prompt) for prompt in PROMPTS]

    def their_answer(self, prompt: list[int], end: int | list[int] | None = None) -> list[int]:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            written = self.theirs.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW,
                do_sample=False,
                eos_token_id=end,
                pad_token_id=0,
            )
        return [int(token) for token in written[0, len(prompt) :]]

    @cached_property
    def model(self) -> Model:
        return Model(hf.load_model_config(self.folder)[0], "float32")

    @cache  # noqa: B019 - lives as long as the module
    def loaded(self, mesh: str = "one device") -> tuple[Any, Any]:
        """The mesh, and the parameters on it."""
        sizes = MESHES[mesh]
        devices = make_mesh(**sizes) if sizes else make_mesh(devices=jax.devices()[:1])
        return devices, hf.load_params(self.folder, self.model, devices)

    def answers(
        self, prompts: list[list[int]], asked: Generation, mesh: str = "one device", **options: Any
    ) -> list[list[list[int]]]:
        devices, params = self.loaded(mesh)
        with jax.set_mesh(devices):
            answers = generate(Forward(self.model, "dense"), params, devices, prompts, asked, **options)
        return [[answer.ids for answer in of_prompt] for of_prompt in answers]

    def __hash__(self) -> int:
        return id(self)


@pytest.fixture(scope="module")
def sides_of(make_hf: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Sides]:
    @cache
    def make(family: str) -> Sides:
        # With weights as large as these, and a head of its own, a model does not repeat one token.
        theirs = make_hf(family, initializer_range=0.3, tie_word_embeddings=False)
        folder = tmp_path_factory.mktemp(family)
        theirs.save_pretrained(folder)
        return Sides(theirs, folder)

    return make


@pytest.fixture
def llama(sides_of: Callable[[str], Sides]) -> Sides:
    return sides_of("llama3.1")


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_transformers(family: str, mesh: str, sides_of: Callable[[str], Sides]) -> None:
    """All samples of a prompt are, since nothing is drawn."""
    sides = sides_of(family)
    assert len({token for answer in sides.expected for token in answer}) > 10, "the model says too little to compare"
    answers = sides.answers(PROMPTS, Generation(NEW, NEVER, samples=2), mesh)
    assert answers == [[expected, expected] for expected in sides.expected]


def test_prompts_longer_than_a_block_are_answered_as_by_transformers(llama: Sides) -> None:
    prompt = np.random.default_rng(2).integers(3, 320, 150).tolist()
    answers = llama.answers([PROMPTS[1], prompt], Generation(NEW, NEVER))
    assert answers == [[llama.expected[1]], [llama.their_answer(prompt)]]


def test_answers_in_bfloat16_are_those_of_float32_but_for_rounding(llama: Sides) -> None:
    """No token is further behind the likeliest one than the rounding of transformers in bfloat16 can bring it."""
    rounded = deepcopy(llama.theirs).to(torch.bfloat16)
    model = replace(llama.model, dtype="bfloat16")
    devices, params = llama.loaded()
    with jax.set_mesh(devices):
        answers = generate(Forward(model, "dense"), params, devices, PROMPTS, Generation(NEW, NEVER, samples=2))
        dialogue = Dialogue(Forward(model, "dense"), params, devices, capacity=128)
        spoken = list(dialogue.answer(PROMPTS[3], Generation(NEW, NEVER)))
    assert all(first == second for first, second in answers)
    for prompt, ids in [*zip(PROMPTS, [first.ids for first, _ in answers], strict=True), (PROMPTS[3], spoken)]:
        with torch.no_grad():
            logits, other = (
                side(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].float()
                for side in (llama.theirs, rounded)
            )
        behind = logits.max(-1).values - logits[range(NEW), ids]
        assert behind.max() <= 2 * (logits - other).abs().max()


def test_any_of_the_end_tokens_ends_an_answer(llama: Sides) -> None:
    ends = [llama.expected[1][4], llama.expected[2][9]]
    expected = [llama.their_answer(prompt, ends) for prompt in PROMPTS]
    devices, params = llama.loaded()
    with jax.set_mesh(devices):
        answers = generate(Forward(llama.model, "dense"), params, devices, PROMPTS, Generation(NEW, tuple(ends)))
    for (answer,), ids in zip(answers, expected, strict=True):
        ended = any(token in ends for token in ids)
        assert answer.ended == ended
        # transformers leaves the token that ended the answer in it.
        assert answer.ids == [token for token in ids if token not in ends]
    assert {answer.ended for (answer,) in answers} == {True, False}


def test_adapters_are_part_of_the_model_that_answers(llama: Sides) -> None:
    lora = Lora(rank=4, alpha=8, targets=("attention/q", "attention/v", "mlp/down"))
    model = replace(llama.model, lora=lora)
    devices, base = llama.loaded()
    adapters = jax.tree.map(lambda x: 0.3 * jnp.ones_like(x), model.init_trained(0, devices))
    params = model.join(adapters, base)
    merged = {**base, "layers": jax.tree.map(lambda x: x, base["layers"])}
    for target in lora.targets:
        room, name = target.split("/")
        kernel, adapter = base["layers"][room][name]["kernel"], adapters["layers"][room][name]["adapter"]
        merged["layers"][room][name]["kernel"] = kernel + lora.scale * adapter["a"] @ adapter["b"]
    asked = Generation(NEW, NEVER)
    with jax.set_mesh(devices):
        ours = generate(Forward(model, "dense"), params, devices, PROMPTS, asked)
        expected = generate(Forward(llama.model, "dense"), merged, devices, PROMPTS, asked)
    assert ours == expected and expected[2][0].ids != llama.expected[2]


# --- drawing


def test_an_answer_does_not_depend_on_the_batch_it_is_drawn_in(llama: Sides) -> None:
    asked = Generation(NEW, NEVER, samples=3, sampling=RANDOM, seed=5)
    together = llama.answers(PROMPTS, asked)
    assert llama.answers(PROMPTS, asked, batch_size=1) == together  # every prompt in a batch of its own
    assert llama.answers(PROMPTS, asked, "2 x 2 x 2") == together
    assert llama.answers(PROMPTS[:2] + [PROMPTS[0]] * 2 + PROMPTS[4:], asked)[4] == together[4]
    assert [of_prompt[:2] for of_prompt in llama.answers(PROMPTS, replace(asked, samples=2))] == [
        of_prompt[:2] for of_prompt in together
    ]


def test_seeds_prompts_and_samples_draw_apart(llama: Sides) -> None:
    asked = Generation(NEW, NEVER, samples=2, sampling=Sampling(temperature=1.0), seed=5)
    same = [PROMPTS[2], PROMPTS[2]]
    drawn = [tuple(answer) for of_prompt in llama.answers(same, asked) for answer in of_prompt]
    drawn += [tuple(answer) for of_prompt in llama.answers(same, replace(asked, seed=6)) for answer in of_prompt]
    assert len(set(drawn)) == 8


@pytest.mark.parametrize("sampling", [Sampling(0.7), Sampling(1.3, top_k=7), Sampling(2.0, top_p=0.6), RANDOM])
def test_tokens_are_drawn_from_the_distribution_of_transformers(sampling: Sampling) -> None:
    logits = 3 * np.random.default_rng(0).normal(size=(5, 100)).astype(np.float32)
    expected = TemperatureLogitsWarper(sampling.temperature)(None, torch.from_numpy(logits))
    if sampling.top_k is not None:
        expected = TopKLogitsWarper(sampling.top_k)(None, expected)
    if sampling.top_p is not None:
        expected = TopPLogitsWarper(sampling.top_p)(None, expected)
    np.testing.assert_allclose(sampling.filtered(jnp.asarray(logits)), expected.numpy(), rtol=1e-6)


def test_draws_follow_the_distribution() -> None:
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    draws = 4000
    keys = jax.random.split(jax.random.key(3), draws)
    drawn = Sampling(1.0, top_k=3).choose(jnp.tile(logits, (draws, 1)), keys)
    shares = np.bincount(np.asarray(drawn), minlength=4) / draws
    # Four standard deviations of a share.
    np.testing.assert_allclose(shares, np.array([0.5, 0.3, 0.15, 0.0]) / 0.95, atol=4 * 0.5 / draws**0.5)
    assert shares[3] == 0


# --- a conversation


# The third turn outgrows a room of 128 places.
@pytest.mark.parametrize(
    ("family", "mesh", "capacity"), [("llama3.1", "one device", 128), ("gemma2", "2 x 2 x 2", 512)]
)
def test_a_conversation_goes_on_from_its_stored_keys(
    family: str, mesh: str, capacity: int, sides_of: Callable[[str], Sides]
) -> None:
    """Turns are answered as by transformers from the whole conversation, though only what is new is computed."""
    sides = sides_of(family)
    devices, params = sides.loaded(mesh)
    with jax.set_mesh(devices):
        dialogue = Dialogue(Forward(sides.model, "dense"), params, devices, capacity=capacity)
        ids = PROMPTS[2]
        for turn, computed in ((PROMPTS[1], 30), (PROMPTS[3], 1 + 7)):
            answer = list(dialogue.answer(ids, Generation(NEW, NEVER)))
            assert answer == sides.their_answer(ids)
            # The last token of an answer has not been computed when the answer ends.
            assert dialogue.computed == computed
            ids = [*ids, *answer, *turn]
        assert list(dialogue.answer(ids, Generation(NEW, NEVER))) == sides.their_answer(ids)
        # What differs from the conversation so far is computed again, and nothing of the former one is seen.
        assert list(dialogue.answer(PROMPTS[4], Generation(NEW, NEVER))) == sides.their_answer(PROMPTS[4])


def test_an_answer_that_is_broken_off_is_gone_on_from(llama: Sides) -> None:
    devices, params = llama.loaded()
    with jax.set_mesh(devices):
        dialogue = Dialogue(Forward(llama.model, "dense"), params, devices, capacity=128)
        answer = dialogue.answer(PROMPTS[2], Generation(NEW, NEVER))
        begun = [next(answer) for _ in range(3)]
        answer.close()
        ids = [*PROMPTS[2], *begun, *PROMPTS[1]]
        assert list(dialogue.answer(ids, Generation(NEW, NEVER))) == llama.their_answer(ids)


# --- bounds


def test_an_empty_prompt_is_refused(llama: Sides) -> None:
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        llama.answers([[1], []], Generation(NEW, NEVER))


def test_no_prompts_give_no_answers(llama: Sides) -> None:
    assert llama.answers([], Generation(NEW, NEVER)) == []


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Sampling(temperature=-1.0), "temperature"),
        (lambda: Sampling(temperature=float("nan")), "temperature"),
        (lambda: Sampling(top_k=0), "top_k"),
        (lambda: Sampling(top_p=0.0), "top_p"),
        (lambda: Generation(0, NEVER), "max_new_tokens"),
        (lambda: Generation(NEW, NEVER, samples=0), "samples"),
        (lambda: Generation(NEW, NEVER, seed=2**32), "seed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_numbers_out_of_range_are_refused(make: Callable[[], object], told: str) -> None:
    with pytest.raises(ConfigError, match=f"`{told}` is"):
        make()


def test_few_lengths_serve_all_prompts() -> None:
    lengths = {padded_length(length) for length in range(1, 4097)}
    assert sorted(lengths) == [128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096]
    assert all(padded_length(length) >= length for length in range(1, 5000))
