"""Groups laid out as trees have the log-probs and gradients of their responses alone, whatever the tree."""

from __future__ import annotations

from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_simpo.data.groups import Group
from jax_simpo.data.rows import RowBatch, RowShape, build_rows
from jax_simpo.hf.config import read_model_config
from jax_simpo.models.policy import Forward
from jax_simpo.models.transformer import Model
from tests.pairs import random_group

LENGTH, LEAVES = 64, 32
TREE, ALONE = RowShape(1024, 2048, LEAVES), RowShape(LENGTH, LENGTH, 1)
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "windows": {"model_type": "mistral", "sliding_window": 6},
    "soft caps": {
        "model_type": "gemma2",
        "sliding_window": 6,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 16,
        "hidden_activation": "gelu_pytorch_tanh",
    },
}
SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
}


class Compared:
    """Log-probs and gradients of groups in two layouts, from programs that are compiled once."""

    def __init__(self, config: dict[str, Any], attention: str) -> None:
        model = Model(read_model_config({**SIZES, **config}, source="test"), "float32")
        self.params = _params(model)
        self.forward = Forward(model, attention, 64)
        self.program = jax.jit(jax.value_and_grad(self._total, has_aux=True))

    def _total(self, params: Any, rows: Any, weights: Any) -> Any:
        logps = self.forward.response_logps(params, rows)
        return (logps.sum * weights).sum(), (logps.sum, logps.length)

    def run(self, rows: RowBatch, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, Any]:
        (_, (sums, lengths)), gradients = self.program(self.params, rows.arrays(), weights)
        return np.asarray(sums), np.asarray(lengths), gradients

    def check(self, group: Group, seed: int) -> None:
        """Compares a group as a tree with its responses, each in a row of its own."""
        count = len(group.responses)
        weights = np.random.default_rng(seed).normal(size=LEAVES).astype(np.float32) / count
        weights[count:] = 0
        tree = build_rows([[(0, group)]], TREE, prefix_sharing=True)
        rows = [[(n, Group((response,)))] for n, response in enumerate(group.responses)]
        alone = build_rows([*rows, *[[]] * (LEAVES - count)], ALONE, prefix_sharing=True)
        sums, lengths, gradients = self.run(tree, weights[None])
        expected, expected_lengths, expected_gradients = self.run(alone, weights[:, None])
        np.testing.assert_array_equal(lengths[0], expected_lengths[:, 0])
        means = sums[0, :count] / lengths[0, :count], expected[:count, 0] / lengths[0, :count]
        np.testing.assert_allclose(*means, atol=2e-5)
        for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


def _params(model: Model) -> Any:
    from jax_simpo.sharding import make_mesh

    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        return jax.tree.map(jnp.asarray, jax.device_get(model.init(0, mesh)))


# The others run in the slow tests.
QUICK = {("dense", "soft caps"), ("blockwise", "llama")}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(case, marks=() if case in QUICK else pytest.mark.slow, id=", ".join(case))
        for case in product(("dense", "blockwise"), CONFIGS)
    ],
)
def compared(request: pytest.FixtureRequest) -> Compared:
    attention, family = request.param
    return Compared(CONFIGS[family], attention)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=8)
def test_a_tree_has_the_log_probs_and_gradients_of_its_responses_alone(compared: Compared, seed: int) -> None:
    compared.check(random_group(np.random.default_rng(seed)), seed)


@pytest.mark.slow
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=1000)
def test_a_thousand_trees_have_the_log_probs_and_gradients_of_their_responses_alone(
    compared: Compared, seed: int
) -> None:
    compared.check(random_group(np.random.default_rng(seed)), seed)


def test_no_response_moves_when_another_changes(compared: Compared) -> None:
    for seed in range(4):
        rng = np.random.default_rng(seed)
        group = random_group(rng)
        changed = int(rng.integers(len(group.responses)))
        response = group.responses[changed]
        ids = response.ids.copy()
        ids[-2:] = 31 - ids[-2:]  # tokens that no other response has
        responses = list(group.responses)
        responses[changed] = type(response)(ids, response.spans)
        weights = np.zeros((1, LEAVES), np.float32)
        before, after = (
            compared.run(build_rows([[(0, g)]], TREE, prefix_sharing=True), weights)[0][0]
            for g in (group, Group(tuple(responses), group.ranks))
        )
        others = np.delete(np.arange(len(group.responses)), changed)
        np.testing.assert_allclose(before[others], after[others], atol=2e-5)
        assert abs(before[changed] - after[changed]) > 1e-3
