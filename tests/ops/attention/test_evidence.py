"""The float64 oracle is right, right backends pass its limits, and planted wrong ones do not."""

from __future__ import annotations

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_simpo.ops.attention import Mask, Room, attention, dense, prepare_mask
from jax_simpo.ops.attention.backends import ScoreRule
from jax_simpo.ops.attention.evidence import Shape, examine
from jax_simpo.ops.attention.oracle import Results, exact_attention, full_row, packed_pairs, small_rows
from jax_simpo.sharding import make_mesh
from tests.ops.attention.planted import plant

SHAPE = Shape(
    dtype="float32",
    heads=2,
    kv_heads=1,
    head_dim=16,
    windows=(None, 4096),
    scale=0.25,
    softcap=5.0,
    rows=1,
    row_length=256,
)


def test_the_oracle_agrees_with_dense_in_float64() -> None:
    """Two programs of the same formulas: one written out by hand with its gradients, one differentiated by JAX."""
    rows, rule = small_rows(), ScoreRule(0.3, 70, 4.0)
    chance = np.random.default_rng(1)
    q, k, v, dout = (chance.standard_normal((2, 640, heads, 8)) for heads in (4, 2, 2, 4))
    with jax.enable_x64(True):
        mask = prepare_mask(jnp.asarray(rows.key_end), jnp.asarray(rows.positions), (70,), "dense")

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return attention(q, k, v, mask, scale=rule.scale, window=rule.window, softcap=rule.softcap)

        out, pull = jax.vjp(attend, *map(jnp.asarray, (q, k, v)))
        found = Results(out, *pull(jnp.asarray(dout)))
    for name, a, b in zip(Results._fields, found, exact_attention(q, k, v, dout, rows, rule), strict=True):
        # `dense` asks for float32 sums of its products.
        np.testing.assert_allclose(np.asarray(a), b, atol=2e-5, err_msg=name)


def test_the_rows_have_every_kind_of_block_and_the_live_area_is_counted() -> None:
    rows = small_rows()
    mask = prepare_mask(jnp.asarray(rows.key_end), jnp.asarray(rows.positions), (None,), "dense")
    visible = np.asarray(mask.visible(None))
    assert rows.live_area(None) == visible.sum()
    assert rows.live_area(50) == np.asarray(mask.visible(50)).sum() < visible.sum()
    blocks = visible.reshape(2, 5, 128, 5, 128).swapaxes(2, 3)
    full, live = blocks.all((3, 4)), blocks.any((3, 4))
    windowed = np.asarray(mask.visible(300))
    assert windowed.reshape(2, 5, 128, 5, 128).swapaxes(2, 3).all((3, 4)).any()  # the small window leaves full blocks
    assert windowed.sum() < visible.sum()
    assert full.any() and (live & ~full).any()
    assert (~live & np.tri(5, dtype=bool)).any()  # hidden, though causality would allow it
    assert not visible[:, -20:].any()  # padding


def test_packed_pairs_fill_a_row() -> None:
    rows = packed_pairs(2, 4096)
    assert (rows.key_end > 0).all() and rows.room == (8, 768, 1024)
    assert packed_pairs(1, 256).room == (2, 192, 256)


@given(length=st.integers(128, 5000))
def test_the_last_pair_of_a_full_row_ends_with_it(length: int) -> None:
    rows = full_row(length)
    assert (rows.key_end > 0).all() and rows.key_end.shape == (1, length)
    last = rows.last_group()
    assert last.stop == length and min(length, 1024) <= last.stop - last.start < 2048


@given(
    length=st.integers(1, 64).map(lambda n: 128 * n),
    sequences=st.integers(2, 64),
    longest=st.integers(1, 8192),
    more=st.integers(0, 8192),
)
def test_packed_pairs_keep_the_bounds_of_a_run(length: int, sequences: int, longest: int, more: int) -> None:
    """Beyond them a right backend gives NaN, and would be passed over."""
    room = Room(sequences, max(4, longest), max(4, longest) + more)
    rows = packed_pairs(2, length, room)
    assert all(has <= may for has, may in zip(rows.room, room, strict=True))
    assert (rows.key_end > 0).any(axis=1).all()


@pytest.mark.parametrize("room", [Room(64, 96, 128), Room(2, 900, 1024)], ids=["short groups", "one long group"])
def test_a_right_backend_passes_in_the_room_of_any_run(room: Room) -> None:
    verdict = examine("banded", replace(SHAPE, row_length=1024, room=room), jax.devices()[0])
    assert verdict.problem is None


@pytest.mark.parametrize("backend", ["dense", "blockwise", "banded"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_right_backends_pass(backend: str, dtype: str) -> None:
    verdict = examine(backend, replace(SHAPE, dtype=dtype), jax.devices()[0])
    assert verdict.problem is None
    assert verdict.speed is not None and verdict.speed.seconds > 0 and verdict.speed.forward_seconds > 0
    assert verdict.speed.tflops > 0


@pytest.mark.parametrize(
    ("backend", "dtype", "problem"),
    [
        ("wrong_mask", "float32", "is wrong: its result is off by .* of its size"),
        ("one_key_too_much", "bfloat16", "is wrong: its result is off by .* at one token"),
        ("no_window", "float32", "is wrong: its result"),
        ("no_softcap", "bfloat16", "is wrong: its result"),
        ("nan", "float32", "gives NaN or infinity: its result"),
        ("crash", "float32", r"fails: NotImplementedError: no lowering for this \[type\] of chip"),
        ("no_gradient", "bfloat16", "is wrong: its gradient for the keys"),
    ],
)
def test_wrong_backends_are_found_out(backend: str, dtype: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, backend)
    verdict = examine(backend, replace(SHAPE, dtype=dtype), jax.devices()[0])
    assert verdict.speed is None
    assert verdict.problem is not None
    assert re.search(problem, verdict.problem), verdict.problem


def test_a_fault_in_the_layers_with_one_window_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The token is far off in layers without a window only; those with one have the larger mean distance."""
    plant(monkeypatch, "one_key_too_much")
    shape = replace(SHAPE, dtype="bfloat16", windows=(100, None))
    verdict = examine("one_key_too_much", shape, jax.devices()[0], timed=False)
    assert verdict.problem is not None and "at one token" in verdict.problem


def test_a_fault_that_only_long_rows_show_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "wrong_in_long_rows")
    verdict = examine("wrong_in_long_rows", replace(SHAPE, row_length=1024), jax.devices()[0])
    assert verdict.problem is not None and "in rows of 1024" in verdict.problem


def test_a_fault_in_the_last_block_of_a_row_is_found_where_rows_end_within_one(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "wrong_in_the_last_block")
    found = []
    for remainder in (0, 128):
        shape = replace(SHAPE, row_length=1024, remainder=remainder)
        found.append(examine("wrong_in_the_last_block", shape, jax.devices()[0], timed=remainder == 0).problem)
    assert found[0] is None  # nothing else would have found it
    assert found[1] is not None and re.search("is wrong: .*, in a row of 1152, which ends within a block", found[1])


def test_a_backend_is_tried_on_one_device_whatever_the_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = set()

    def watched(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, rule: ScoreRule) -> jax.Array:
        devices.add(jax.sharding.get_abstract_mesh().size)
        return dense.attend(q, k, v, mask, rule)

    monkeypatch.setattr(dense, "BACKEND", replace(dense.BACKEND, attend=watched))
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        verdict = examine("dense", SHAPE, jax.devices()[3], timed=False)
        assert jax.sharding.get_abstract_mesh().size == 8
    assert verdict.problem is None and devices == {1}
