"""The compiled program sends each parameter over the mesh once per pass, and no activation."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jax_simpo.hf.config import read_model_config
from jax_simpo.models.transformer import Model
from jax_simpo.ops.attention import prepare_mask
from jax_simpo.plan.hlo import collectives
from jax_simpo.sharding import RULES, make_mesh, named

# Every parameter has a shape of its own, and none that an activation could have.
SIZES = {
    "model_type": "llama",
    "vocab_size": 640,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 10,
    "tie_word_embeddings": True,
}
ROWS, LENGTH, LAYERS = 8, 256, 5
MESHES = {"fsdp=8": {"fsdp": 8}, "fsdp=4 tensor=2": {"fsdp": 4, "tensor": 2}}


def lowered_gradient(mesh_name: str, remat: Any, layers: int) -> Any:
    mesh = make_mesh(**MESHES[mesh_name])
    model = Model(read_model_config({**SIZES, "num_hidden_layers": layers}), "float32", remat)

    def loss(params: Any, tokens: jax.Array, positions: jax.Array, key_end: jax.Array) -> jax.Array:
        hidden = model.hidden_states(params, tokens, positions, prepare_mask(key_end, positions))
        return jnp.sum(hidden**2)

    shardings = model.shardings(mesh)
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        model.abstract,
        shardings,
    )
    ints = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32, sharding=named(mesh, "batch", None))
    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(loss), out_shardings=shardings).lower(params, ints, ints, ints)


@cache
def compiled_gradient(mesh_name: str, remat: Any = "full") -> str:
    return lowered_gradient(mesh_name, remat, LAYERS).compile().as_text()


def gathered(program: str) -> Counter[tuple[tuple[int, ...], int]]:
    """Counts the arrays that a program all-gathers, by sorted shape and by how often the instruction runs."""
    gathers = [c for c in collectives(program) if c.kind == "all-gather"]
    return Counter((tuple(sorted(shape)), c.times) for c in gathers for shape in c.shapes)


def layer_parameters(mesh_name: str) -> Counter[tuple[int, ...]]:
    """Counts the sorted shapes of one layer's parameters in the form a device computes with: whole along fsdp."""
    sizes = {"fsdp": 1, "tensor": MESHES[mesh_name].get("tensor", 1)}
    model = Model(read_model_config({**SIZES, "num_hidden_layers": 1}))
    is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
    axes = jax.tree.leaves(model.logical_axes["layers"], is_leaf=is_axes)
    leaves = jax.tree.leaves(model.abstract["layers"])
    return Counter(
        tuple(sorted(n // sizes[str(RULES[name])] for n, name in zip(leaf.shape[1:], names[1:], strict=True)))
        for leaf, names in zip(leaves, axes, strict=True)
    )


@pytest.mark.parametrize(
    ("mesh", "remat"), [("fsdp=8", "full"), ("fsdp=4 tensor=2", "full"), ("fsdp=4 tensor=2", "none")]
)
def test_every_layer_parameter_is_gathered_once_forward_and_once_backward(mesh: str, remat: str) -> None:
    in_layers = Counter({key: n for key, n in gathered(compiled_gradient(mesh, remat)).items() if key[1] > 1})
    # Two instructions for each parameter, one in the forward and one in the backward loop, each run once a layer.
    assert in_layers == Counter({(shape, LAYERS): 2 * n for shape, n in layer_parameters(mesh).items()})


@pytest.mark.parametrize("mesh", MESHES)
def test_outside_the_layers_only_the_final_norm_and_token_ids_are_gathered(mesh: str) -> None:
    outside = {key[0]: n for key, n in gathered(compiled_gradient(mesh)).items() if key[1] == 1}
    assert outside == {(64,): 1, (ROWS, LENGTH): 1}


def test_no_device_keeps_gathered_parameters_of_the_layers_or_the_whole_embedding() -> None:
    mesh = "fsdp=4 tensor=2"
    program = compiled_gradient(mesh, "none")
    shapes = {tuple(sorted(int(n) for n in shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", program)}
    stacks = {tuple(sorted((LAYERS, *shape))) for shape in layer_parameters(mesh) if len(shape) == 2}
    vocabulary = 640 // MESHES[mesh].get("tensor", 1)
    assert not shapes & (stacks | {(64, vocabulary)})


def test_the_program_does_not_grow_with_depth() -> None:
    shallow, deep = (lowered_gradient("fsdp=8", "full", n).as_text().count("\n") for n in (LAYERS, 9))
    assert deep == shallow
