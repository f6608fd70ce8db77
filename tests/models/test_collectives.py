"""What the compiled program sends over the mesh: each parameter once per pass, and no activation."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jax_simpo.models.config import ModelConfig
from jax_simpo.models.transformer import Model
from jax_simpo.ops.attention import prepare_mask
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


@cache
def compiled_gradient(mesh_name: str, remat: Any = "full", layers: int = LAYERS) -> str:
    mesh = make_mesh(**MESHES[mesh_name])
    model = Model(ModelConfig.from_hf({**SIZES, "num_hidden_layers": layers}), "float32", remat)

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
        return jax.jit(jax.grad(loss), out_shardings=shardings).lower(params, ints, ints, ints).compile().as_text()


def computations(program: str) -> dict[str, str]:
    """The text of each computation of a compiled program; `ENTRY` is the one that runs first."""
    found = {}
    for block in re.split(r"\n(?=(?:ENTRY )?%?[\w.-]+ \([^\n]*\{\n)", program)[1:]:
        name = "ENTRY" if block.startswith("ENTRY") else re.match(r"%?([\w.-]+)", block)[1]  # type: ignore[index]
        found[name] = block
    return found


def moved(computation: str, collective: str) -> Counter[tuple[str, tuple[int, ...]]]:
    """Dtype and sorted shape of everything that one kind of collective gives in a computation."""
    out: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for result in re.findall(rf"= (.*?) {collective}(?:-start)?\(", computation):
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", result):
            out[dtype, tuple(sorted(int(n) for n in shape.split(",") if n))] += 1
    return out


def layer_parameters(mesh_name: str) -> Counter[tuple[str, tuple[int, ...]]]:
    """Sorted shapes of one layer's parameters as a device computes with them: whole along fsdp."""
    sizes = {"fsdp": 1, "tensor": MESHES[mesh_name].get("tensor", 1)}
    model = Model(ModelConfig.from_hf({**SIZES, "num_hidden_layers": 1}))
    is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
    axes = jax.tree.leaves(model.logical_axes["layers"], is_leaf=is_axes)
    leaves = jax.tree.leaves(model.abstract["layers"])
    return Counter(
        ("f32", tuple(sorted(n // sizes[str(RULES[name])] for n, name in zip(leaf.shape[1:], names[1:], strict=True))))
        for leaf, names in zip(leaves, axes, strict=True)
    )


@pytest.mark.parametrize(
    ("mesh", "remat"), [("fsdp=8", "full"), ("fsdp=4 tensor=2", "full"), ("fsdp=4 tensor=2", "none")]
)
def test_every_layer_parameter_is_gathered_once_forward_and_once_backward(mesh: str, remat: str) -> None:
    parts = computations(compiled_gradient(mesh, remat))
    loops = [gathers for name, text in parts.items() if name != "ENTRY" and (gathers := moved(text, "all-gather"))]
    assert loops == [layer_parameters(mesh), layer_parameters(mesh)]


@pytest.mark.parametrize("mesh", MESHES)
def test_outside_the_layers_only_the_final_norm_and_token_ids_are_gathered(mesh: str) -> None:
    gathers = moved(computations(compiled_gradient(mesh))["ENTRY"], "all-gather")
    assert gathers == {("f32", (64,)): 1, ("s32", (ROWS, LENGTH)): 1}


def test_no_device_keeps_gathered_parameters_of_the_layers_or_the_whole_embedding() -> None:
    mesh = "fsdp=4 tensor=2"
    program = compiled_gradient(mesh, "none")
    shapes = {tuple(sorted(int(n) for n in shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", program)}
    stacks = {tuple(sorted((LAYERS, *shape))) for _, shape in layer_parameters(mesh) if len(shape) == 2}
    vocabulary = 640 // MESHES[mesh].get("tensor", 1)
    assert not shapes & (stacks | {(64, vocabulary)})


def test_the_program_does_not_grow_with_depth() -> None:
    shallow, deep = (compiled_gradient("fsdp=8", "full", layers).count("\n") for layers in (LAYERS, 9))
    assert deep == shallow
