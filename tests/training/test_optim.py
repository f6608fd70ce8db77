"""Schedules, clipping and weight decay against PyTorch and transformers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_simpo.training.optim import count_warmup_steps, decay_mask, learning_rate_schedule, make_optimizer

TOTAL = 37


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "constant_with_warmup"])
@pytest.mark.parametrize("warmup", [0, 1, 8])
def test_schedules_are_those_of_transformers(kind: str, warmup: int) -> None:
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=3e-4)
    oracle = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=TOTAL)
    ours = learning_rate_schedule(kind, 3e-4, TOTAL, warmup)
    for step in range(TOTAL):
        assert float(ours(step)) == pytest.approx(oracle.get_last_lr()[0], abs=1e-10)
        optimizer.step()
        oracle.step()


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="'polynomial'"):
        learning_rate_schedule("polynomial", 1.0, TOTAL, 0)


def test_warmup_steps_win_over_the_ratio_which_is_rounded_up() -> None:
    assert count_warmup_steps(469, 0, 0.1) == 47
    assert count_warmup_steps(469, 5, 0.1) == 5


def test_updates_are_torchs_adamw_with_clipping_and_no_decay_of_norms_and_biases() -> None:
    import torch

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
