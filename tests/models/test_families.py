"""Each family gives the log-probs and gradients of transformers, whatever the rows: windows and soft caps included.

The oracle is transformers on every sequence alone, without padding, sharing or packing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from jax.sharding import Mesh
from safetensors.numpy import load_file
from transformers import PreTrainedModel

from jax_simpo import hf
from jax_simpo.data.groups import Group, Response
from jax_simpo.data.rows import RowBatch, RowShape, build_rows
from jax_simpo.hf.config import read_model_config
from jax_simpo.models.config import ModelConfig
from jax_simpo.models.policy import Forward
from jax_simpo.models.transformer import Model
from jax_simpo.ops.attention import prepare_mask
from jax_simpo.ops.logprobs import target_logps
from jax_simpo.sharding import make_mesh
from tests.pairs import random_pairs
from tests.training.support import edited

FAMILIES = ("mistral", "gemma2", "qwen2", "qwen2_windows", "qwen3")
IMPLEMENTATIONS = ("dense", "blockwise")
LAYOUTS = {"separate": (False, 1), "shared": (True, 1), "shared + packed": (True, 2)}  # sharing, pairs a row
PAIRS, SHAPE = 8, RowShape(length=256, targets=160, responses=4)


def make_rows(pairs: list[Group], layout: str) -> RowBatch:
    """Lays out the pairs in eight rows; with packing, the last rows are empty."""
    sharing, per_row = LAYOUTS[layout]
    numbered = list(enumerate(pairs))
    rows = [numbered[i : i + per_row] for i in range(0, len(numbered), per_row)]
    return build_rows(rows + [[]] * (PAIRS - len(rows)), SHAPE, prefix_sharing=sharing)


@partial(jax.jit, static_argnums=(0, 1))
def row_logps(model: Model, attention: str, params: Any, rows: dict[str, Any]) -> jax.Array:
    mask = prepare_mask(rows["key_end"], rows["positions"], model.config.windows, attention)
    hidden = model.hidden_states(params, rows["tokens"], rows["positions"], mask)
    softcap = model.config.logit_softcap
    return target_logps(hidden, model.head(params), rows["target_index"], rows["target_token"], softcap=softcap)


def by_response(values: np.ndarray, rows: RowBatch) -> dict[tuple[int, int], np.ndarray]:
    """Maps each (pair, rank) to the values of its targets."""
    by_pair_and_rank = {}
    for row, slot in zip(*np.nonzero(rows.response_group >= 0), strict=True):
        key = rows.response_group[row, slot], rows.response_rank[row, slot]
        by_pair_and_rank[key] = values[row][rows.target_response[row] == slot]
    return by_pair_and_rank


@dataclass
class Sides:
    """A random model in transformers and in JAX, and the pairs that both score."""

    theirs: PreTrainedModel
    model: Model
    folder: Path
    pairs: list[Group]

    @cached_property
    def params(self) -> Any:
        return jax.device_get(hf.load_params(self.folder, self.model, make_mesh(devices=jax.devices()[:1])))

    def their_logps(self, response: Response) -> torch.Tensor:
        """Computes the log-prob of each response token from the logits of its sequence alone."""
        ids = torch.from_numpy(response.ids.astype(np.int64))
        logits = self.theirs(input_ids=ids[None, :-1], use_cache=False).logits[0, response.prompt_length - 1 :]
        return logits.log_softmax(-1).gather(-1, ids[response.prompt_length :, None])[:, 0]

    @cached_property
    def expected(self) -> dict[tuple[int, int], np.ndarray]:
        with torch.no_grad():
            return {
                (number, rank): self.their_logps(response).numpy()
                for number, pair in enumerate(self.pairs)
                for rank, response in enumerate(pair.responses)
            }

    def logps(self, attention: str, rows: RowBatch, model: Model | None = None) -> dict[tuple[int, int], np.ndarray]:
        return by_response(np.asarray(row_logps(model or self.model, attention, self.params, rows.arrays())), rows)

    @cached_property
    def gradients(self) -> Any:
        """The result of `weighted_gradients` without a mesh."""
        return weighted_gradients(self, None)


@pytest.fixture(scope="module")
def sides_of(make_hf: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Sides]:
    @cache
    def make(family: str) -> Sides:
        theirs, folder = make_hf(family, seed=5), tmp_path_factory.mktemp(family)
        theirs.save_pretrained(folder)
        pairs = random_pairs(np.random.default_rng(6), PAIRS, 96, prompt=(5, 40), response=(3, 30))
        return Sides(theirs, Model(hf.load_model_config(folder)[0], "float32"), folder, pairs)

    return make


@pytest.fixture(params=FAMILIES)
def sides(request: pytest.FixtureRequest, sides_of: Callable[[str], Sides]) -> Sides:
    return sides_of(request.param)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_token_log_probs_are_those_of_transformers_on_plain_sequences(
    attention: str, layout: str, sides: Sides
) -> None:
    actual = sides.logps(attention, make_rows(sides.pairs, layout))
    assert actual.keys() == sides.expected.keys()
    for key, logps in actual.items():
        np.testing.assert_allclose(logps, sides.expected[key], rtol=0, atol=2e-5)


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_rejected_logps_do_not_move_when_chosen_changes(attention: str, sides: Sides) -> None:
    rng = np.random.default_rng(7)
    others = [edited(pair, 0, rng) for pair in sides.pairs]
    before, after = (sides.logps(attention, make_rows(pairs, "shared + packed")) for pairs in (sides.pairs, others))
    for number in range(PAIRS):
        np.testing.assert_array_equal(before[number, 1], after[number, 1])
    assert max(np.abs(before[number, 0] - after[number, 0]).max() for number in range(PAIRS)) > 0.1


def weighted_gradients(
    sides: Sides, mesh: Mesh | None, *, attention: str = "blockwise", remat: Any = "full"
) -> tuple[Any, Any]:
    """Computes the sum of all log-probs, each with its own weight, in shared and packed rows, and its gradients."""
    model, rows = replace(sides.model, remat=remat), make_rows(sides.pairs, "shared + packed")
    weights = np.zeros(rows.target_token.shape, np.float32)
    for row, slot in zip(*np.nonzero(rows.response_group >= 0), strict=True):
        of_slot = rows.target_response[row] == slot
        pair, rank = rows.response_group[row, slot], rows.response_rank[row, slot]
        weights[row, of_slot] = token_weights(pair, rank, of_slot.sum())

    def total(params: Any, arrays: dict[str, Any], weights: Any) -> jax.Array:
        return (weights * row_logps(model, attention, params, arrays)).sum()

    params = jax.device_put(sides.params, model.shardings(mesh)) if mesh else sides.params
    with jax.set_mesh(mesh) if mesh else nullcontext():
        return jax.jit(jax.value_and_grad(total))(params, rows.arrays(), weights)


def token_weights(pair: int, rank: int, count: int) -> np.ndarray:
    return np.random.default_rng([pair, rank]).normal(size=count).astype(np.float32)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "qwen2", "qwen3"])
def test_gradients_are_those_of_transformers(family: str, sides_of: Callable[[str], Sides], tmp_path: Path) -> None:
    sides = sides_of(family)
    sides.theirs.zero_grad()
    for number, pair in enumerate(sides.pairs):
        for rank, response in enumerate(pair.responses):
            weights = token_weights(number, rank, len(response.targets))
            (sides.their_logps(response) * torch.from_numpy(weights)).sum().backward()
    theirs = {name: parameter.grad.numpy() for name, parameter in sides.theirs.named_parameters()}

    hf.save_model(sides.gradients[1], sides.model, tmp_path / "gradients", "float32")
    ours = load_file(tmp_path / "gradients" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    distances = {name: np.linalg.norm(ours[name] - g) / np.linalg.norm(g) for name, g in theirs.items()}
    assert max(distances.values()) < 1e-5, max(distances.items(), key=lambda item: item[1])


@pytest.mark.parametrize("family", ["gemma2", *(pytest.param(f, marks=pytest.mark.slow) for f in ("qwen2", "qwen3"))])
def test_values_and_gradients_are_the_same_on_a_mesh(family: str, sides_of: Callable[[str], Sides]) -> None:
    sides = sides_of(family)
    value, gradients = weighted_gradients(sides, make_mesh(fsdp=4, tensor=2), attention="dense")  # compiles faster
    expected, expected_gradients = sides.gradients
    np.testing.assert_allclose(value, expected, rtol=2e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=5e-6 * np.abs(b).max()),
        gradients,
        expected_gradients,
    )


# --- the models of these tests depend on what is special to their family ---------------------------------------------

MISTAKES: dict[str, tuple[str, Callable[[ModelConfig], ModelConfig]]] = {
    "no window": ("mistral", lambda c: replace(c, layer_windows=(None,) * c.num_layers)),
    "the other layers windowed": ("gemma2", lambda c: replace(c, layer_windows=c.layer_windows[::-1])),
    "no soft cap of attention": ("gemma2", lambda c: replace(c, attention_softcap=None)),
    "no soft cap of logits": ("gemma2", lambda c: replace(c, logit_softcap=None)),
    "norms multiply by w": ("gemma2", lambda c: replace(c, norm_offset=False)),
    "scores divided by the root of the head size": ("gemma2", lambda c: replace(c, query_pre_attn_scalar=c.head_dim)),
    "SiLU for GeLU": ("gemma2", lambda c: replace(c, activation="silu")),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_these_models_depend_on_what_is_special_to_their_family(mistake: str, sides_of: Callable[[str], Sides]) -> None:
    """A mistake would go unnoticed if the random models did not depend on it."""
    family, wrong = MISTAKES[mistake]
    sides = sides_of(family)
    model = replace(sides.model, config=wrong(sides.model.config))
    actual = sides.logps("dense", make_rows(sides.pairs, "shared"), model)
    assert max(np.abs(actual[key] - sides.expected[key]).max() for key in actual) > 1e-2


def test_the_training_step_caps_the_logits(sides_of: Callable[[str], Sides]) -> None:
    sides = sides_of("gemma2")
    rows = make_rows(sides.pairs, "shared + packed")
    responses = jax.jit(Forward(sides.model, "dense", 64).response_logps)(sides.params, rows.arrays())
    for row, slot in zip(*np.nonzero(rows.response_group >= 0), strict=True):
        expected = sides.expected[rows.response_group[row, slot], rows.response_rank[row, slot]]
        np.testing.assert_allclose(
            responses.sum[row, slot] / responses.length[row, slot], expected.mean(), rtol=0, atol=2e-5
        )


def test_rematerialisation_changes_no_gradient_where_layers_differ(sides_of: Callable[[str], Sides]) -> None:
    sides = sides_of("gemma2")
    _, gradients = weighted_gradients(sides, None, remat="dots")
    _, full = sides.gradients
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max()), gradients, full)


# --- layers that differ ----------------------------------------------------------------------------------------------


def test_a_pattern_of_windows_keeps_no_copy_of_the_parameters() -> None:
    """The parameters of a period are kept for the backward pass where they are, whatever the number of layers."""
    fields = {
        "model_type": "gemma2",
        "vocab_size": 64,
        "hidden_size": 128,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": 8,
    }
    ints = jax.ShapeDtypeStruct((1, 16), np.int32)

    def temporaries(windows: tuple[int | None, ...]) -> int:
        model = Model(replace(read_model_config(fields), layer_windows=windows), "float32", "none")

        def loss(params: Any, tokens: jax.Array, positions: jax.Array, key_end: jax.Array) -> jax.Array:
            mask = prepare_mask(key_end, positions, model.config.windows, "dense")
            return model.hidden_states(params, tokens, positions, mask).sum()

        lowered = jax.jit(jax.grad(loss)).lower(model.abstract, ints, ints, ints)
        return int(lowered.compile().memory_analysis().temp_size_in_bytes)

    layer = 4 * 3 * 128 * 1024  # bytes, nearly all of it the feed-forward part
    assert temporaries((8, None) * 8) < temporaries((8,) * 16) + 8 * layer
