"""Tests the `pallas` kernels on the hardware, at their own block size; skipped where there is no Hopper GPU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_simpo.ops.attention import Mask, attention, prepare_mask
from jax_simpo.ops.attention.backends import ScoreRule
from jax_simpo.ops.attention.pallas.backend import HEAD_SIZES, make_backend
from jax_simpo.ops.attention.pallas.switches import DEFAULTS, Switches

DEVICE = jax.devices()[0]
pytestmark = pytest.mark.skipif(
    not str(getattr(DEVICE, "compute_capability", "")).startswith("9."), reason="needs a Hopper GPU"
)
LENGTH, HEADS, KV_HEADS = 1000, 8, 2  # no multiple of a block


def packed_rows() -> tuple[jax.Array, jax.Array]:
    """Returns two rows: packed pairs with shared prompts, then padding; and one pair that fills its row."""
    key_end, positions = np.zeros((2, LENGTH), np.int32), np.zeros((2, LENGTH), np.int32)
    for row, pairs in enumerate([[(130, 70, 90), (20, 200, 1), (5, 100, 256)], [(500, 250, 250)]]):
        start = 0
        for prompt, chosen, rejected in pairs:
            ends = start + prompt + np.cumsum([chosen, rejected])
            lengths = (prompt, chosen, rejected)
            tokens = slice(start, start + sum(lengths))
            key_end[row, tokens] = np.repeat([ends[1], ends[0], ends[1]], lengths)
            positions[row, tokens] = np.concatenate(
                [np.arange(prompt), prompt + np.arange(chosen), prompt + np.arange(rejected)]
            )
            start += sum(lengths)
    return jnp.asarray(key_end), jnp.asarray(positions)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(("dtype", "width"), [(d, w) for d, widths in HEAD_SIZES.items() for w in widths])
def test_values_and_gradients_are_as_near_to_float32_as_those_of_dense(
    dtype: str, width: int, window: int | None, softcap: float | None
) -> None:
    key_end, positions = packed_rows()
    keys = jax.random.split(jax.random.key(width), 4)
    q, k, v, dout = (
        jax.random.normal(key, (2, LENGTH, heads, width)).astype(dtype)
        for key, heads in zip(keys, (HEADS, KV_HEADS, KV_HEADS, HEADS), strict=True)
    )

    def run(backend: str, *arrays: jax.Array) -> list[np.ndarray]:
        *inputs, cotangent = arrays
        mask = prepare_mask(key_end, positions, (window,), backend)
        attend = lambda q, k, v: attention(q, k, v, mask, scale=width**-0.5, window=window, softcap=softcap)  # noqa: E731
        out, pull = jax.vjp(jax.jit(attend), *inputs)
        return [np.asarray(a, np.float64) for a in (out, *pull(cotangent))]

    exact = run("dense", *(a.astype(jnp.float32) for a in (q, k, v, dout)))
    rounded = run("dense", *(a.astype(jnp.bfloat16) for a in (q, k, v, dout)))
    for name, ours, dense, oracle in zip(
        ("out", "dq", "dk", "dv"), run("pallas", q, k, v, dout), rounded, exact, strict=True
    ):
        distance, bound = (np.sqrt(np.mean((a - oracle) ** 2)) for a in (ours, dense))
        # The kernels use 16 bits of a float32, 256 times finer than bfloat16; sums over a row lose a part of that.
        assert distance <= (1.5 * bound if dtype == "bfloat16" else bound / 30), name


@pytest.mark.parametrize(
    "switches",
    [
        Switches(heavy_first=False),
        Switches(ping_pong=True),
        Switches(overlap=True),
        Switches(ping_pong=True, overlap=True),
    ],
    ids=str,
)
def test_every_variant_computes_what_the_default_does(switches: Switches) -> None:
    """The products are the same and summed in the same order, so only the rounding of the weights may differ."""
    width, window = 128, 100
    key_end, positions = packed_rows()
    keys = jax.random.split(jax.random.key(width), 4)
    q, k, v, dout = (
        jax.random.normal(key, (2, LENGTH, heads, width)).astype(jnp.bfloat16)
        for key, heads in zip(keys, (HEADS, KV_HEADS, KV_HEADS, HEADS), strict=True)
    )

    @partial(jax.jit, static_argnums=0)
    def run(switches: Switches, q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array) -> tuple[jax.Array, ...]:
        backend = make_backend(switches)
        mask = Mask(key_end, positions, (), (window,), "pallas", None, False)
        mask = replace(mask, tables=(backend.prepare(mask, window),))
        rule = ScoreRule(width**-0.5, window)
        out, pull = jax.vjp(lambda q, k, v: backend.attend(q, k, v, mask, rule), q, k, v)
        return out, *pull(dout)

    for name, a, b in zip(
        ("out", "dq", "dk", "dv"), run(DEFAULTS, q, k, v, dout), run(switches, q, k, v, dout), strict=True
    ):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        distance, size = (np.sqrt(np.mean(x**2)) for x in (a - b, a))
        assert distance <= 2**-8 * size, name
