"""A training step with adapters: only they have gradients, and these are right on every mesh."""

from __future__ import annotations

import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_simpo.models import lora
from jax_simpo.models.lora import Lora, choose_targets
from jax_simpo.models.transformer import Model
from jax_simpo.sharding import named
from jax_simpo.train.step import Accumulated, Denominators, Forward, make_train_functions
from tests.hlo import collectives
from tests.train.support import MESHES, OBJECTIVE, History, Pairs, mesh_of, run_steps, some_pairs, tiny_model

SETTINGS = Lora(4, 8, choose_targets(None, "llama"))
STEPS, BATCH = 20, 16


def with_adapters(model: Model, settings: Lora = SETTINGS) -> Model:
    return Model(model.config, model.dtype, model.remat, settings)


def start_of(model: Model, seed: int = 0) -> Any:
    """Parameters whose adapters do something: both matrices are random."""
    params = jax.device_get(model.init(seed, mesh_of((1, 1, 1))))
    adapters, base = model.split(params)
    rng = np.random.default_rng(seed)
    adapters = jax.tree.map(lambda x: (0.2 * rng.standard_normal(x.shape)).astype(np.float32), adapters)
    return model.join(adapters, base)


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return some_pairs(40)


@pytest.fixture(scope="module")
def reference(pairs: Pairs) -> History:
    model = with_adapters(tiny_model())
    return run_steps(pairs, steps=STEPS, batch=BATCH, mesh=mesh_of((1, 1, 1)), model=model, params=start_of(model))


def test_the_adapters_learn_and_the_base_does_not_move_by_a_bit(reference: History) -> None:
    model = with_adapters(tiny_model())
    (before, base), (after, moved_base) = model.split(start_of(model)), model.split(reference.params)
    chex.assert_trees_all_equal(moved_base, base)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, after)
    assert min(jax.tree.leaves(moved)) > 1e-3
    loss = reference.values("loss")
    assert loss[-1] < 0.9 * loss[0]


def test_twenty_steps_give_the_same_losses_on_a_mesh(pairs: Pairs, reference: History) -> None:
    model = with_adapters(tiny_model())
    mesh = mesh_of(MESHES["fsdp=4 x tensor=2"])
    found = run_steps(pairs, steps=STEPS, batch=BATCH, mesh=mesh, model=model, params=start_of(model))
    np.testing.assert_allclose(found.values("loss"), reference.values("loss"), atol=1e-5)
    np.testing.assert_allclose(found.values("grad_norm"), reference.values("grad_norm"), rtol=1e-4)


def test_the_gradients_are_those_of_the_merged_kernels_by_the_chain_rule(pairs: Pairs) -> None:
    """`W + s A B` has the gradients `s dW B^T` for A and `s A^T dW` for B."""
    model = with_adapters(
        tiny_model(), Lora(4, 6, choose_targets(["q_proj", "o_proj", "up_proj", "down_proj"], "llama"))
    )
    plain = Model(model.config, model.dtype, model.remat)
    start = start_of(model)
    adapters, merged = model.split(start)
    for path in model.lora.targets:  # type: ignore[union-attr]
        part, name = path.split("/")
        a, b = (adapters["layers"][part][name][lora.KEY][key] for key in "ab")
        kernel = merged["layers"][part][name]["kernel"]
        merged["layers"][part][name] = {"kernel": kernel + np.float32(1.5) * np.einsum("lir,lro->lio", a, b)}
    # One step of plain gradient descent: the change of the parameters is the gradient.
    settings = {"steps": 1, "batch": BATCH, "optimizer": optax.sgd(1.0), "mesh": mesh_of((1, 1, 1))}
    found = run_steps(pairs, **settings, model=model, params=start).params
    oracle = run_steps(pairs, **settings, model=plain, params=merged).params
    for path in model.lora.targets:  # type: ignore[union-attr]
        part, name = path.split("/")
        a, b = (adapters["layers"][part][name][lora.KEY][key] for key in "ab")
        after = found["layers"][part][name][lora.KEY]
        dw = merged["layers"][part][name]["kernel"] - oracle["layers"][part][name]["kernel"]
        assert np.abs(dw).max() > 1e-3
        np.testing.assert_allclose(a - after["a"], 1.5 * np.einsum("lio,lro->lir", dw, b), atol=5e-6)
        np.testing.assert_allclose(b - after["b"], 1.5 * np.einsum("lir,lio->lro", a, dw), atol=5e-6)


# --- what the step compiles to

# No activation has the shape of a parameter.
CHANGES = {"vocab_size": 8192, "hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 3, "head_dim": 20}
LENGTH, TARGETS = 256, 1024


def compiled_step(sizes: tuple[int, int, int], dtype: str, settings: Lora | None) -> Any:
    mesh = mesh_of(sizes)
    model = Model(tiny_model(**CHANGES).config, dtype, lora=settings)
    functions: Any = make_train_functions(Forward(model, "blockwise", 128), OBJECTIVE, optax.adamw(1e-3), mesh)
    widths = {"tokens": LENGTH, "positions": LENGTH, "key_end": LENGTH, "response_pair": 8, "response_rank": 8}
    widths |= {f"target_{name}": TARGETS for name in ("index", "token", "response")}
    rows = {
        name: jax.ShapeDtypeStruct((sizes[0] * sizes[1], width), jnp.int32, sharding=named(mesh, "batch", None))
        for name, width in widths.items()
    }
    with jax.set_mesh(mesh):
        params = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            model.abstract,
            model.shardings(mesh),
        )
        one = jnp.ones(())
        so_far = Accumulated(model.split(params)[0], dict.fromkeys(OBJECTIVE.metrics, one))
        return functions.accumulate.lower(params, so_far, rows, Denominators(one, one)).compile()


def gradient_products(program: str, tensor: int) -> set[tuple[int, ...]]:
    """Sorted shapes of the matrix products that have the shape of a kernel, or of a block of the head."""
    kernels = [(96, 80), (96, 40), (80, 96), (96, 384), (384, 96)]
    split = {tuple(sorted(n // (tensor if n != 96 else 1) for n in shape)) for shape in kernels}
    products = re.findall(r"= \w+\[([\d,]+)\]\S* (?:dot|custom-call)\(", program)
    shapes = {tuple(sorted(int(n) for n in shape.split(","))) for shape in products}
    return {shape for shape in shapes if shape in split or (96 in shape and max(shape) >= 1024)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_gradient_of_the_base_is_computed_reduced_or_held(dtype: str) -> None:
    sizes = (1, 4, 2)
    frozen, trained = (compiled_step(sizes, dtype, settings) for settings in (SETTINGS, None))
    # The check sees what it looks for: every kernel and the head have a gradient where they are trained.
    assert len(gradient_products(trained.as_text(), 2)) == 5
    assert gradient_products(frozen.as_text(), 2) == set()
    # Sums over the rows are of adapters alone, and the embedding's gradient does not travel back.
    reduced = [s for c in collectives(frozen.as_text()) if c.kind in ("all-reduce", "reduce-scatter") for s in c.shapes]
    assert {len(s) for s in reduced} <= {0, 2, 3} and all(
        4 in s or TARGETS // 128 in s or LENGTH in s for s in reduced if s
    )
    back = [c for c in collectives(frozen.as_text()) if c.kind == "all-to-all"]
    assert sum(c.times for c in back) == 1
    model = Model(tiny_model(**CHANGES).config, dtype, lora=SETTINGS)
    assert frozen.memory_analysis().output_size_in_bytes < 4 * model.trained_count + 4096
