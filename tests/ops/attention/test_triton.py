"""Compares the `triton` kernels with `dense`; Pallas' interpreter runs them on the CPU.

Claims that hold for every backend are in test_attention.py. How the kernels compile for GPUs is read by
benchmarks/gpu_attention.py.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_simpo.errors import ConfigError
from jax_simpo.ops.attention import attention, prepare_mask
from jax_simpo.ops.attention.backends import ScoreRule
from jax_simpo.ops.attention.triton import backend, kernel, sizes
from jax_simpo.ops.attention.triton.bounds import find_block_bounds
from jax_simpo.ops.numerics import SAVED_ATTENTION
from tests.ops.attention.test_attention import inputs, layout, run
from tests.ops.attention.test_choice import A100

BLOCK, LENGTH, ROWS, WIDTH = 16, 76, 2, 16  # 76 is no multiple of a block


@functools.partial(jax.jit, static_argnames=("window", "softcap"))
def kernels(q, k, v, dout, key_end, positions, window=None, softcap=None):  # type: ignore[no-untyped-def]
    """Returns the output and the gradients of q, k and v by the kernels, with short blocks."""
    lists = find_block_bounds(key_end, positions, window, BLOCK)
    rule = ScoreRule(0.3, window, softcap)

    def attend(q, k, v):  # type: ignore[no-untyped-def]
        return kernel.attention(q, k, v, key_end, positions, lists, rule, block=BLOCK, interpret=True)

    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(dout)


def two_heads_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives float32 tiles the heads that bfloat16 tiles have, so that exact numbers can be compared."""
    monkeypatch.setitem(sizes._SIZES, "float32", sizes._SIZES["bfloat16"])


@pytest.mark.parametrize("heads", [(4, 2), (3, 1)])
@settings(max_examples=2)
@given(
    seed=st.integers(0, 10**6),
    rule=st.sampled_from([(None, None), (1, None), (20, 3.0)]),
    sharing=st.booleans(),
)
def test_values_and_gradients_are_those_of_dense(
    heads: tuple[int, int], seed: int, rule: tuple[int | None, float | None], sharing: bool
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        two_heads_a_tile(monkeypatch)
        batch, arrays = layout(seed, ROWS, LENGTH, sharing=sharing), inputs(seed, ROWS, LENGTH, *heads, WIDTH)
        results = kernels(*arrays, jnp.array(batch.key_end), jnp.array(batch.positions), *rule)
    for name, a, b in zip(("out", "dq", "dk", "dv"), run(batch, *arrays, "dense", *rule), results, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "width"), [(d, w) for d, widths in backend.HEAD_SIZES.items() for w in widths])
@pytest.mark.parametrize("heads", [(4, 2), (3, 1)])
def test_of_every_head_size_values_and_gradients_are_as_near_to_float32_as_those_of_dense(
    heads: tuple[int, int], dtype: str, width: int
) -> None:
    batch, arrays = layout(5, 2, 300), inputs(5, 2, 300, *heads, width)
    exact = run(batch, *arrays, "dense", 50, 5.0)
    rounded = run(batch, *(x.astype(jnp.bfloat16) for x in arrays), "dense", 50, 5.0)
    results = run(batch, *(x.astype(dtype) for x in arrays), "triton", 50, 5.0)
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), exact, rounded, results, strict=True):
        assert c.dtype == dtype
        bound, distance = (float(jnp.linalg.norm(a - x.astype(jnp.float32))) for x in (b, c))
        assert distance <= (1.5 * bound if dtype == "bfloat16" else bound / 1000), name


def test_hidden_blocks_are_not_loaded() -> None:
    """A pair fills the first block, padding the second, a pair the third."""
    dead = slice(BLOCK, 2 * BLOCK)
    key_end = jnp.repeat(jnp.array([[BLOCK, 0, 3 * BLOCK]], jnp.int32), BLOCK, axis=1)
    positions = jnp.tile(jnp.arange(BLOCK, dtype=jnp.int32), 3)[None]
    arrays = inputs(6, 1, 3 * BLOCK, 2, 1, WIDTH)
    results = kernels(*arrays, key_end, positions)
    poisoned = kernels(*(x.at[:, dead].set(jnp.nan) for x in arrays), key_end, positions)
    for a, b in zip(results, poisoned, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a[:, dead], 0.0)


@pytest.mark.skipif(jax.__version__.startswith("0.10."), reason="jax 0.10 leaves dead kernels to XLA, which drops them")
def test_a_rematerialisation_policy_that_keeps_attention_does_not_run_the_forward_again() -> None:
    integers = jax.ShapeDtypeStruct((1, 256), jnp.int32)
    matrix = jax.ShapeDtypeStruct((1, 256, 1, 64), jnp.bfloat16)

    def forward_kernels(policy) -> int:  # type: ignore[no-untyped-def]
        def loss(q, k, v, key_end, positions):  # type: ignore[no-untyped-def]
            mask = prepare_mask(key_end, positions, backend="triton", interpret=True)
            return attention(q, k, v, mask, scale=0.3).astype(jnp.float32).sum()

        loss_and_gradients = jax.value_and_grad(jax.checkpoint(loss, policy=policy), (0, 1, 2))
        program = jax.make_jaxpr(loss_and_gradients)(matrix, matrix, matrix, integers, integers)
        return str(program).count("name=attention_forward")

    keep_attention = jax.checkpoint_policies.save_only_these_names(SAVED_ATTENTION)
    assert 0 < forward_kernels(keep_attention) < forward_kernels(jax.checkpoint_policies.nothing_saveable)


@pytest.mark.parametrize("group", [1, 2, 3, 4])
@pytest.mark.parametrize(("dtype", "width"), [(d, w) for d, widths in backend.HEAD_SIZES.items() for w in widths])
def test_sizes_are_powers_of_two_that_divide_the_block_and_the_group(dtype: str, width: int, group: int) -> None:
    for tiles in sizes.tilings(width, dtype, group):
        assert all(size & (size - 1) == 0 for size in tiles)
        assert tiles.block % tiles.step == 0 and group % tiles.heads == 0
        assert tiles.step >= 16  # the tensor cores' smallest


@pytest.mark.parametrize(
    ("changes", "obstacle"),
    [
        ({}, None),
        ({"capability": (12, 0)}, None),
        ({"capability": (7, 5)}, "compute capability 8.0"),
        ({"capability": (0, 0)}, "compute capability 8.0"),  # AMD
        ({"platform": "cpu"}, "needs an NVIDIA GPU, and this is a CPU"),
        ({"head_dim": 96}, "heads of 64, 128, 256 in bfloat16, and this model's have 96"),
        ({"head_dim": 256, "dtype": "float32"}, "heads of 64, 128 in float32"),
    ],
)
def test_it_says_where_it_cannot_run(changes: dict[str, object], obstacle: str | None) -> None:
    found = backend.obstacle(dataclasses.replace(A100, **changes))  # type: ignore[arg-type]
    assert found is None if obstacle is None else found is not None and obstacle in found


def test_what_the_kernels_cannot_do_is_an_error_with_the_way_out() -> None:
    integers = jnp.zeros((1, LENGTH), jnp.int32)
    mask = prepare_mask(integers, integers, backend="triton")
    q, k, v, _ = inputs(9, 1, LENGTH, 2, 1, WIDTH)
    with pytest.raises(ConfigError, match=r"float32 kernels for head sizes 64, 128, and this model's is 16; choose"):
        attention(q, k, v, mask, scale=1.0)
    half = [x.astype(jnp.float16) for x in (q, k, v)]
    with pytest.raises(ConfigError, match="bfloat16 or float32, not float16"):
        attention(*half, mask, scale=1.0)
