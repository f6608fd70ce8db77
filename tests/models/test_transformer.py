"""The decoder computes what transformers computes, on every mesh."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import Mesh
from transformers import LlamaForCausalLM

from jax_simpo import hf
from jax_simpo.errors import MeshError
from jax_simpo.hf.config import read_model_config
from jax_simpo.models.rope import rope_frequencies
from jax_simpo.models.transformer import Linear, Model, RMSNorm
from jax_simpo.ops.attention import prepare_causal_mask, prepare_mask
from jax_simpo.plan.hlo import loop_states
from jax_simpo.sharding import make_mesh

FAMILIES = ("llama2", "llama3_tied", "llama3.1", "linear_rope", "biases", "wide_heads")
MESHES = {
    "one device": lambda: make_mesh(devices=jax.devices()[:1]),
    "fsdp=8": lambda: make_mesh(fsdp=8),
    "fsdp=4 tensor=2": lambda: make_mesh(fsdp=4, tensor=2),
    "data=2 fsdp=2 tensor=2": lambda: make_mesh(data=2, fsdp=2, tensor=2),
}
ROWS, LENGTH = 8, 64
SMALL = Model(
    read_model_config(
        {
            "model_type": "llama",
            "vocab_size": 320,
            "hidden_size": 64,
            "intermediate_size": 112,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
        }
    ),
    "float32",
)


def random_tokens(vocabulary: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draws tokens, and positions that start anywhere in the first nine thousand."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocabulary, (ROWS, LENGTH), dtype=np.int32)
    return tokens, (np.arange(LENGTH) + rng.integers(0, 9000, (ROWS, 1))).astype(np.int32)


def causal_hidden_states(model: Model, params: Any, tokens: Any, positions: Any, mesh: Mesh | None) -> jax.Array:
    @jax.jit
    def run(params: Any, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        mask = prepare_causal_mask(positions, backend="dense")
        return model.hidden_states(params, tokens, positions, mask)

    with jax.set_mesh(mesh) if mesh else nullcontext():
        return run(params, tokens, positions)


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_hidden_states_and_logits_are_those_of_transformers(
    family: str, make_hf: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    theirs = make_hf(family, seed=1)
    theirs.save_pretrained(tmp_path)
    model = Model(hf.load_model_config(tmp_path)[0], "float32", "none")
    tokens, positions = random_tokens(320)
    with torch.no_grad():
        expected = theirs.model(torch.tensor(tokens).long(), position_ids=torch.tensor(positions).long())[0]
        logits = theirs.lm_head(expected)

    mesh = MESHES["fsdp=4 tensor=2"]()
    params = hf.load_params(tmp_path, model, mesh)
    hidden = causal_hidden_states(model, params, tokens, positions, mesh)
    ours = jnp.einsum("bld,vd->blv", hidden, model.head(params), precision="highest")

    # Measured: at most 9e-6 on values up to 6 (1.5e-6 of the largest), the rounding of float32.
    np.testing.assert_allclose(hidden, expected, rtol=0, atol=1.2e-5)
    np.testing.assert_allclose(ours, logits, rtol=0, atol=1.2e-5)


@pytest.mark.parametrize("family", ["llama2", "llama3_tied", "llama3.1", "linear_rope"])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
def test_rope_frequencies_are_those_of_transformers_to_the_last_bit(
    family: str, head_dim: int, make_hf: Callable[..., LlamaForCausalLM]
) -> None:
    theirs = make_hf(family, head_dim=head_dim, num_hidden_layers=1)
    ours = rope_frequencies(read_model_config(theirs.config.to_dict()).rope, head_dim)
    np.testing.assert_array_equal(ours, theirs.model.rotary_emb.inv_freq.numpy())


@pytest.mark.parametrize("family", ["llama3.1", "gemma2", "qwen3"])
def test_bfloat16_stays_as_close_to_float32_as_transformers_does(
    family: str, make_hf: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    theirs = make_hf(family)
    theirs.save_pretrained(tmp_path)
    model = Model(hf.load_model_config(tmp_path)[0], "bfloat16")
    params = hf.load_params(tmp_path, model, MESHES["one device"]())
    tokens, positions = random_tokens(320)
    args = torch.tensor(tokens).long(), torch.tensor(positions).long()
    with torch.no_grad():
        exact = theirs.model(args[0], position_ids=args[1])[0].numpy()
        rounded = theirs.to(torch.bfloat16).model(args[0], position_ids=args[1])[0].float().numpy()
    hidden = causal_hidden_states(model, params, tokens, positions, MESHES["one device"]())
    assert hidden.dtype == jnp.bfloat16 and model.head(params).dtype == jnp.float32
    ours = np.asarray(hidden, np.float32)
    assert np.abs(ours - exact).mean() <= 1.1 * np.abs(rounded - exact).mean()


@cache
def fresh_params(mesh: str) -> Any:
    return SMALL.init(3, MESHES[mesh]())


@pytest.mark.parametrize("mesh", ["fsdp=8", "data=2 fsdp=2 tensor=2"])
def test_init_gives_the_same_numbers_on_every_mesh(mesh: str) -> None:
    jax.tree.map(np.testing.assert_array_equal, fresh_params(mesh), fresh_params("one device"))
    assert jax.tree.map(lambda x: x.sharding, fresh_params(mesh)) == SMALL.shardings(MESHES[mesh]())


@pytest.mark.parametrize(("family", "scale"), [("llama", 1), ("gemma2", 0)])
def test_init_draws_as_transformers_does(family: str, scale: int, hf_config: dict[str, Any]) -> None:
    config = read_model_config({**hf_config, "model_type": family, "architectures": None, "attention_bias": True})
    params = Model(config).init(0, MESHES["one device"]())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        match path[-1].key:
            case "scale":
                assert (leaf == scale).all()
            case "bias":
                assert (leaf == 0).all()
            case _:
                assert abs(leaf.std() / config.initializer_range - 1) < 0.03
                assert abs(leaf.mean()) < 0.05 * config.initializer_range
    layers = params["layers"]["mlp"]["up"]["kernel"]
    assert not (layers[0] == layers[1]).any()  # each layer has its own draw


@cache
def value_and_gradients(mesh: str, remat: Any = "full") -> Any:
    model = replace(SMALL, remat=remat)
    tokens, positions = random_tokens(320)
    weights = np.random.default_rng(1).normal(size=(ROWS, LENGTH, 64)).astype(np.float32) / ROWS / LENGTH

    def loss(params: Any, tokens: jax.Array, positions: jax.Array, weights: jax.Array) -> jax.Array:
        mask = prepare_causal_mask(positions, backend="dense")
        return jnp.sum(model.hidden_states(params, tokens, positions, mask) * weights)

    params = jax.device_put(fresh_params("one device"), model.shardings(MESHES[mesh]()))
    with jax.set_mesh(MESHES[mesh]()):
        return jax.jit(jax.value_and_grad(loss))(params, tokens, positions, weights)


@pytest.mark.parametrize("mesh", ["fsdp=8", "data=2 fsdp=2 tensor=2"])
def test_values_and_gradients_do_not_depend_on_the_mesh(mesh: str) -> None:
    value, gradients = value_and_gradients(mesh)
    expected, expected_gradients = value_and_gradients("one device")
    np.testing.assert_allclose(value, expected, rtol=0, atol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max()),
        gradients,
        expected_gradients,
    )


@pytest.mark.parametrize("remat", ["none", "dots", "attention"])
def test_rematerialisation_changes_no_gradient(remat: str) -> None:
    _, gradients = value_and_gradients("one device", remat)
    _, full = value_and_gradients("one device")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max()), gradients, full)


def test_gradients_of_norms_and_biases_are_summed_in_float32() -> None:
    """A bfloat16 sum over thousands of tokens would be as coarse as its last term: several per cent off."""
    rng, tokens, width = np.random.default_rng(2), 4096, 64
    x, dy = (jnp.asarray(rng.normal(size=(1, tokens, width)) + 0.5, jnp.bfloat16) for _ in range(2))
    norm = RMSNorm(SMALL.config, width)
    biased = Linear(("embed", "mlp"), (width, width), bias=True, std=0.1, rngs=nnx.Rngs(0))
    exact_x, exact_dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    normed = exact_x / np.sqrt((exact_x**2).mean(-1, keepdims=True) + SMALL.config.rms_norm_eps)
    for module, exact in ((norm, (exact_dy * normed).sum((0, 1))), (biased, exact_dy.sum((0, 1)))):
        gradients = jax.jit(nnx.grad(lambda m: jnp.sum((m(x) * dy).astype(jnp.float32))))(module)
        gradient = np.asarray(gradients["scale" if module is norm else "bias"][...], np.float64)
        assert np.linalg.norm(gradient - exact) < 2**-8 * np.linalg.norm(exact)


def test_the_model_works_without_a_mesh() -> None:
    tokens, positions = random_tokens(320)
    bare = causal_hidden_states(SMALL, fresh_params("one device"), tokens, positions, None)
    meshed = causal_hidden_states(SMALL, fresh_params("one device"), tokens, positions, MESHES["one device"]())
    np.testing.assert_allclose(bare, meshed, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mesh", ["one device", "data=2 fsdp=2 tensor=2"])
def test_a_token_outside_the_vocabulary_gives_nan_in_its_row_alone(mesh: str) -> None:
    tokens, positions = random_tokens(320)
    tokens[2, 5] = 320
    hidden = causal_hidden_states(SMALL, fresh_params(mesh), tokens, positions, MESHES[mesh]())
    assert np.isnan(hidden[2, 5]).all()
    assert np.isfinite(np.delete(hidden, 2, axis=0)).all()


def test_parameters_are_named_so_that_weight_decay_can_tell_them_apart(hf_config: dict[str, Any]) -> None:
    model = Model(read_model_config({**hf_config, "attention_bias": True, "mlp_bias": True}))
    assert set(model.abstract) == {"embed", "layers", "final_norm", "lm_head"}
    ranks = {"kernel": 2, "embedding": 2, "bias": 1, "scale": 1}
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.abstract):
        assert leaf.ndim == ranks[path[-1].key] + (path[0].key == "layers")
        assert leaf.dtype == jnp.float32
    is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
    assert jax.tree.map(len, model.logical_axes, is_leaf=is_axes) == jax.tree.map(lambda x: x.ndim, model.abstract)
    assert model.logical_axes["layers"]["attention"]["o"]["kernel"] == ("layers", "heads", "embed")


def test_a_tied_head_is_the_embedding_and_counts_once(hf_config: dict[str, Any]) -> None:
    untied, tied = (Model(read_model_config({**hf_config, "tie_word_embeddings": tie})) for tie in (False, True))
    params = tied.init(0, MESHES["one device"]())
    assert tied.head(params) is params["embed"]["embedding"]
    assert untied.parameter_count - tied.parameter_count == 320 * 64


def test_models_of_the_same_configuration_are_one_static_argument(hf_config: dict[str, Any]) -> None:
    a, b = (Model(read_model_config(hf_config), dtype) for dtype in ("bfloat16", jnp.bfloat16))
    assert a == b and hash(a) == hash(b)
    assert a != replace(a, remat="none")


@pytest.mark.parametrize(
    ("fields", "axes", "message"),
    [
        ({"hidden_size": 60, "head_dim": 8}, {"fsdp": 8}, "`fsdp` has 8 .* hidden_size=60 .* such as 1, 2, 3, 4, 5, 6"),
        ({"num_attention_heads": 4, "num_key_value_heads": 4}, {"tensor": 8}, "`tensor` .* num_attention_heads=4"),
        (
            {"num_key_value_heads": 2},
            {"fsdp": 2, "tensor": 4},
            "`tensor` has 4 .* num_key_value_heads=2 .*such as 1, 2",
        ),
        ({"intermediate_size": 113}, {"tensor": 2}, "intermediate_size=113"),
        ({"vocab_size": 321}, {"tensor": 2}, "vocab_size=321 .*embed and the LM head"),
    ],
)
def test_a_mesh_that_does_not_divide_the_model_is_an_error(
    fields: dict[str, Any], axes: dict[str, int], message: str, hf_config: dict[str, Any]
) -> None:
    model = Model(read_model_config({**hf_config, **fields}))
    with pytest.raises(MeshError, match=message):
        model.init(0, make_mesh(**{"fsdp": -1, **axes}) if "fsdp" not in axes else make_mesh(**{"data": -1, **axes}))


@pytest.mark.parametrize(
    ("remat", "recomputed"), [("full", True), ("attention", False), ("dots", False), ("none", False)]
)
def test_attention_runs_again_in_the_backward_pass_only_under_full_rematerialisation(
    remat: Any, recomputed: bool, hf_config: dict[str, Any]
) -> None:
    model, loss, ints, program = compiled_layers(remat, hf_config)
    # Loops over key blocks: one in the forward, one in the backward pass, and one more where the forward runs again.
    loops = len(set(re.findall(r"body=(%?[\w.-]+)", program)))
    loops_without_remat = len(set(re.findall(r"body=(%?[\w.-]+)", _without_remat(loss, model, ints))))
    assert (loops > loops_without_remat) == recomputed


@pytest.mark.parametrize(("remat", "beside_input"), [("full", []), ("attention", [(8, 12)])])
def test_a_layer_keeps_of_every_token_what_its_policy_names_and_no_more(
    remat: Any, beside_input: list[tuple[int, ...]], hf_config: dict[str, Any]
) -> None:
    *_, program = compiled_layers(remat, {**hf_config, "num_attention_heads": 8, "head_dim": 12})
    layers = hf_config["num_hidden_layers"]
    # What is kept passes from the forward loop over the layers to the backward one in stacks of all layers.
    for times, arrays in loop_states(program):
        kept = [shape[3:] for _, shape in arrays if shape[:3] == (layers, 1, 256)]
        assert times == layers and sorted(kept) == sorted([(64,), *beside_input])


def compiled_layers(remat: Any, hf_config: dict[str, Any]) -> tuple[Model, Any, jax.ShapeDtypeStruct, str]:
    """Returns a model, a loss of its hidden states, its integer arguments' shape and its compiled gradient."""
    model = Model(read_model_config(hf_config), "float32", remat)
    ints = jax.ShapeDtypeStruct((1, 256), jnp.int32)

    def loss(params: Any, tokens: jax.Array, positions: jax.Array, key_end: jax.Array) -> jax.Array:
        return model.hidden_states(params, tokens, positions, prepare_mask(key_end, positions)).sum()

    return model, loss, ints, jax.jit(jax.grad(loss)).lower(model.abstract, ints, ints, ints).compile().as_text()


def _without_remat(loss: Any, model: Model, ints: jax.ShapeDtypeStruct) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "checkpoint", lambda f, **_: f)
        return jax.jit(jax.grad(loss)).lower(model.abstract, ints, ints, ints).compile().as_text()
