"""Optimizers, clipping and weight decay against PyTorch, transformers, and optax on weights that are not stacked."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_simpo.training.optim import decay_mask, make_optimizer, state_shardings

MATRICES = {"q": (3, 6, 4), "down": (3, 8, 6)}  # matrices of three stacked layers


def test_updates_are_torchs_adamw_with_clipping_and_no_decay_of_norms_and_biases() -> None:
    torch = pytest.importorskip("torch")

    rng = np.random.default_rng(0)
    shapes = {"kernel": (4, 3), "scale": (3,), "bias": (4,), "embedding": (5, 2)}
    start = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    weights = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    decayed = [weights["kernel"], weights["embedding"]]
    oracle = torch.optim.AdamW(
        [{"params": decayed}, {"params": [weights["scale"], weights["bias"]], "weight_decay": 0.0}],
        lr=1e-2,
        weight_decay=0.1,
        betas=(0.9, 0.95),
    )
    ours = make_optimizer(lambda _: 1e-2, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, max_grad_norm=1.0)
    params = {"layer": {name: jnp.asarray(value) for name, value in start.items()}}
    state = ours.init(params)
    for _ in range(10):
        gradients = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        for name, weight in weights.items():
            weight.grad = torch.tensor(gradients[name])
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        oracle.step()
        updates, state = ours.update({"layer": {k: jnp.asarray(g) for k, g in gradients.items()}}, state, params)
        params = optax.apply_updates(params, updates)
    for name, weight in weights.items():
        np.testing.assert_allclose(params["layer"][name], weight.detach().numpy(), atol=2e-6)


@pytest.mark.parametrize("b2", [0.999, 0.98])
def test_updates_are_those_of_float64_from_the_first_step_on(b2: float) -> None:
    rng = np.random.default_rng(1)
    ours = make_optimizer(lambda _: 1.0, b1=0.9, b2=b2, eps=1e-8, weight_decay=0.0, max_grad_norm=0.0)
    params = {"kernel": jnp.zeros(64)}
    state = ours.init(params)
    m, v = np.zeros(64), np.zeros(64)
    for t in range(1, 30):
        gradient = rng.normal(size=64).astype(np.float32)
        m, v = 0.9 * m + 0.1 * gradient, b2 * v + (1 - b2) * gradient.astype(np.float64) ** 2
        updates, state = ours.update({"kernel": jnp.asarray(gradient)}, state, params)
        exact = -(m / (1 - 0.9**t)) / (np.sqrt(v / (1 - b2**t)) + 1e-8)
        # Relative to the largest, because a mean near zero loses digits. optax's own AdamW is off by 1e-5.
        np.testing.assert_allclose(updates["kernel"], exact, rtol=1e-6, atol=1e-6 * np.abs(exact).max())


def test_the_state_is_laid_out_as_optaxs_adamw_behind_a_clip() -> None:
    params = {"kernel": jnp.zeros((2, 2)), "scale": jnp.ones(2)}
    theirs = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(lambda _: 1e-3, mask=decay_mask))
    ours = make_optimizer(lambda _: 1e-3, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.1, max_grad_norm=1.0)
    assert jax.tree.structure(ours.init(params)) == jax.tree.structure(theirs.init(params))


def stacked_params(rng: np.random.Generator) -> dict[str, Any]:
    """Returns parameters as a model has them: three stacked layers, their norms, and an embedding."""
    layers: dict[str, Any] = {name: {"kernel": rng.normal(size=shape)} for name, shape in MATRICES.items()}
    layers["norm"] = {"scale": rng.normal(size=(3, 6))}
    tree = {"embed": {"embedding": rng.normal(size=(7, 6))}, "layers": layers}
    return dict(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree))


def unstacked(params: dict[str, Any]) -> dict[str, Any]:
    """Returns each weight by a name of its own."""
    weights = {"embedding": params["embed"]["embedding"]}
    for name, leaf in params["layers"].items():
        weights |= {f"{name} {layer}": leaf.get("kernel", leaf.get("scale"))[layer] for layer in range(3)}
    return weights


def steps(optimizer: optax.GradientTransformation, params: dict[str, Any], count: int = 5) -> dict[str, Any]:
    """Returns the parameters after some steps with random gradients, always the same ones."""
    rng, state = np.random.default_rng(3), optimizer.init(params)
    for _ in range(count):
        updates, state = optimizer.update(stacked_params(rng), state, params)
        params = optax.apply_updates(params, updates)
    return params


def settings(**given: Any) -> dict[str, Any]:
    return {"b1": 0.9, "b2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "max_grad_norm": 0.0, **given}


def test_adafactor_is_that_of_transformers_for_each_layer() -> None:
    torch = pytest.importorskip("torch")
    from transformers import Adafactor

    params = stacked_params(np.random.default_rng(2))
    weights = {name: torch.nn.Parameter(torch.tensor(np.array(value))) for name, value in unstacked(params).items()}
    groups = [
        {"params": [w for name, w in weights.items() if "norm" not in name], "weight_decay": 0.1},
        {"params": [w for name, w in weights.items() if "norm" in name], "weight_decay": 0.0},
    ]
    oracle = Adafactor(groups, lr=1e-2, scale_parameter=False, relative_step=False)
    rng = np.random.default_rng(3)
    for _ in range(5):
        for name, gradient in unstacked(stacked_params(rng)).items():
            weights[name].grad = torch.tensor(np.array(gradient))
        oracle.step()
    ours = unstacked(steps(make_optimizer(lambda _: 1e-2, kind="adafactor", **settings()), params))
    for name, weight in weights.items():
        # The Trainer's decays the weight before the update, optax's after it: they differ by decay * rate * update.
        np.testing.assert_allclose(ours[name], weight.detach().numpy(), atol=3e-5, err_msg=name)


def test_lion_moves_by_the_sign_of_its_mean_and_keeps_another_mean() -> None:
    params = stacked_params(np.random.default_rng(2))
    expected = {name: np.array(value) for name, value in unstacked(params).items()}
    means = {name: np.zeros_like(value) for name, value in expected.items()}
    rng = np.random.default_rng(3)
    for _ in range(5):
        for name, gradient in unstacked(stacked_params(rng)).items():
            update = np.sign(0.9 * means[name] + 0.1 * gradient)  # Chen et al. 2302.06675, algorithm 2
            means[name] = 0.99 * means[name] + 0.01 * gradient
            expected[name] -= 1e-2 * (update + (0 if "norm" in name else 0.1) * expected[name])
    ours = unstacked(steps(make_optimizer(lambda _: 1e-2, kind="lion", **settings()), params))
    for name, value in expected.items():
        np.testing.assert_allclose(ours[name], value, atol=1e-6, err_msg=name)


def test_muon_is_optaxs_for_the_matrix_of_each_layer_and_adamw_for_all_else() -> None:
    params = stacked_params(np.random.default_rng(2))
    muon = unstacked(steps(make_optimizer(lambda _: 1e-2, kind="muon", **settings()), params))
    adamw = unstacked(steps(make_optimizer(lambda _: 1e-2, **settings()), params))
    oracle = optax.contrib.muon(1e-2, weight_decay=0.1, consistent_rms=0.2)
    alone = {name: value for name, value in unstacked(params).items() if "norm" not in name and name != "embedding"}
    rng, state = np.random.default_rng(3), oracle.init(alone)
    for _ in range(5):
        gradients = unstacked(stacked_params(rng))
        updates, state = oracle.update({name: gradients[name] for name in alone}, state, alone)
        alone = optax.apply_updates(alone, updates)
    for name, value in {**adamw, **alone}.items():
        np.testing.assert_allclose(muon[name], value, atol=1e-6, err_msg=name)


def test_moments_in_bfloat16_take_half_the_memory_and_nearly_the_same_steps() -> None:
    params = stacked_params(np.random.default_rng(2))
    for kind in ("adamw", "lion", "muon"):
        half = make_optimizer(lambda _: 1e-3, kind=kind, mu_dtype="bfloat16", **settings())
        kinds = {leaf.dtype.name for leaf in jax.tree.leaves(half.init(params)) if leaf.size > 20}
        assert "bfloat16" in kinds, kind
        if kind == "lion":  # signs near zero may flip
            continue
        whole = make_optimizer(lambda _: 1e-3, kind=kind, **settings())
        for ours, exact in zip(*(jax.tree.leaves(steps(o, params)) for o in (half, whole)), strict=True):
            np.testing.assert_allclose(ours, exact, atol=5e-5)


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "lion", "muon"])
def test_moments_lie_where_their_parameters_do_and_all_else_on_every_device(kind: str) -> None:
    params = stacked_params(np.random.default_rng(2))
    shardings = jax.tree.map(lambda p: f"as {p.shape}", params)
    optimizer = make_optimizer(lambda _: 1e-3, kind=kind, **settings())
    placed = state_shardings(optimizer, params, shardings, "everywhere")
    state = jax.eval_shape(optimizer.init, params)
    assert jax.tree.structure(placed) == jax.tree.structure(state)
    moments = 0
    for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True):
        assert place in ("everywhere", f"as {leaf.shape}")
        moments += place != "everywhere"
    of_params = len(jax.tree.leaves(params))
    assert moments == {"adamw": 2 * of_params, "adafactor": 0, "lion": of_params, "muon": 2 + 2 * 2}[kind]


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match="'sgd'"):
        make_optimizer(lambda _: 1.0, kind="sgd", **settings())
