"""Compares `dense` with separate sequences computed by hand, and every other backend with `dense`."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_simpo.data.groups import Group, GroupLengths, Response
from jax_simpo.data.rows import RowBatch, RowShape, build_rows
from jax_simpo.ops.attention import Mask, Room, attention, prepare_mask
from jax_simpo.ops.attention.blockwise import BLOCK, find_live_blocks
from jax_simpo.sharding import make_mesh
from tests.pairs import random_group, random_pairs

# Claims about one backend alone are in its own file; `pallas`, too slow without a GPU, is in test_pallas_gpu.py only.
ALL = ["dense", "blockwise", "banded", "triton", "cudnn", *(["splash"] if find_spec("tokamax") else [])]
# The TPU interpreter did not finish on eight fake devices; test_splash.py compiles for a mesh of TPUs instead.
ON_A_MESH = ["dense", "blockwise", "banded", "triton", "cudnn"]


def layout(seed: int, rows: int, length: int, *, sharing: bool = True) -> RowBatch:
    """Makes random rows of pairs and of deeper trees: packed, padded, one of them empty."""
    rng = np.random.default_rng(seed)
    filled, number = [], 0
    for row in range(rows):
        pairs, room = [], 0 if row == rows - 1 else length
        while room > 0:
            (group,) = random_pairs(rng, 1, 9, prompt=(1, length // 3), response=(1, length // 4))
            if rng.random() < 0.5:
                group = random_group(rng, 9, most=8, longest=length // 4)
            room -= int(GroupLengths.of([group]).row_tokens(sharing)[0])
            if room > 0:
                pairs.append((number, group))
                number += 1
        filled.append(pairs)
    return build_rows(filled, RowShape(length, 2 * length, 4 * length), prefix_sharing=sharing)


def inputs(seed: int, rows: int, length: int, heads: int, kv_heads: int, width: int) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = [(rows, length, n, width) for n in (heads, kv_heads, kv_heads, heads)]
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def room_of(batch: RowBatch) -> Room:
    """Returns the room that a batch's sequences need, and not a token more."""
    sequences = (batch.key_end == np.arange(batch.key_end.shape[1]) + 1).sum(1).max()
    span = (batch.key_end - np.arange(batch.key_end.shape[1])).max()
    return Room(max(1, int(sequences)), int(batch.positions.max()) + 1, max(1, int(span)))


def make_mask(batch: RowBatch, windows: tuple[int | None, ...], backend: str) -> Mask:
    """Makes the mask of a batch. Kernels whose hardware is missing are interpreted."""
    key_end, positions = jnp.array(batch.key_end), jnp.array(batch.positions)
    return _make_mask(key_end, positions, windows, backend, room_of(batch))


def _make_mask(key_end, positions, windows, backend: str, room: Room) -> Mask:  # type: ignore[no-untyped-def]
    return prepare_mask(key_end, positions, windows, backend, room=room, interpret=jax.default_backend() == "cpu")


def run(batch: RowBatch, q, k, v, dout, backend: str, window=None, softcap=None):  # type: ignore[no-untyped-def]
    """Returns the output and the gradients of q, k and v."""
    arrays = (jnp.array(batch.key_end), jnp.array(batch.positions), q, k, v, dout)
    return _run(*arrays, backend, None if backend == "dense" else room_of(batch), window, softcap)


@partial(jax.jit, static_argnums=(6, 7, 8, 9))
def _run(key_end, positions, q, k, v, dout, backend, room, window, softcap):  # type: ignore[no-untyped-def]
    def total(q, k, v):  # type: ignore[no-untyped-def]
        mask = _make_mask(key_end, positions, (window,), backend, room)
        out = attention(q, k, v, mask, scale=0.3, window=window, softcap=softcap)
        return (out * dout).astype(jnp.float32).sum(), out

    (_, out), gradients = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(q, k, v)
    return out, *gradients


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (7, None), (None, 2.0)])
def test_dense_gives_each_branch_what_its_own_sequence_gives(window: int | None, softcap: float | None) -> None:
    batch = layout(0, 2, 96)
    q, k, v, dout = inputs(0, 2, 96, 4, 2, 8)
    out = np.asarray(run(batch, q, k, v, dout, "dense", window, softcap)[0])
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    groups = q.shape[2] // k.shape[2]
    for query in range(batch.input_tokens):
        seen = [j for j in range(query + 1) if query < batch.key_end[0, j]]
        # One query by hand, in float64, from the positions of its own sequence.
        seen = [j for j in seen if window is None or batch.positions[0, query] - batch.positions[0, j] < window]
        for head in range(q.shape[2]):
            keys, values = (x[0, seen, head // groups] for x in (k, v))
            scores = 0.3 * keys @ q[0, query, head]
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            weights = np.exp(scores - scores.max())
            np.testing.assert_allclose(out[0, query, head], weights @ values / weights.sum(), atol=2e-6)


@given(
    seed=st.integers(0, 10**6),
    length=st.sampled_from([40, 128, 300]),
    heads=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    window=st.sampled_from([None, 1, 20]),
    softcap=st.sampled_from([None, 3.0]),
    sharing=st.booleans(),
)
@settings(max_examples=12)
def test_blockwise_values_and_gradients_are_those_of_dense(
    seed: int,
    length: int,
    heads: tuple[int, int],
    window: int | None,
    softcap: float | None,
    sharing: bool,
) -> None:
    batch = layout(seed, 3, length, sharing=sharing)
    arrays = inputs(seed, 3, length, *heads, 16)
    oracle = run(batch, *arrays, "dense", window, softcap)
    for a, b in zip(oracle, run(batch, *arrays, "blockwise", window, softcap), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("backend", ALL)
def test_queries_that_see_nothing_give_zeros_in_values_and_gradients(backend: str) -> None:
    batch = layout(1, 2, 200)
    padding = batch.key_end == 0
    assert padding[0].any() and padding[1].all()
    for array in run(batch, *inputs(1, 2, 200, 4, 2, 8), backend):
        assert np.isfinite(array).all()
        assert not np.asarray(array)[padding].any()


@pytest.mark.parametrize("backend", ALL)
def test_rejected_does_not_move_when_chosen_changes(backend: str) -> None:
    (pair,) = random_pairs(np.random.default_rng(2), 1, 9, prompt=(100, 100), response=(60, 60))
    batch = build_rows([[(0, pair)]], RowShape(384, 384, 2), prefix_sharing=True)
    ends = batch.key_end[0]
    chosen = (ends > 0) & (ends < ends.max())
    rejected = (ends == ends.max()) & (np.arange(384) > np.flatnonzero(chosen).max())
    q, k, v, dout = inputs(2, 1, 384, 4, 2, 16)
    before = run(batch, q, k, v, dout, backend)[0]
    moved = [x.at[0, np.flatnonzero(chosen)].add(1.0) for x in (q, k, v)]
    after = run(batch, *moved, dout, backend)[0]
    np.testing.assert_array_equal(before[0, rejected], after[0, rejected])
    assert abs(before[0, chosen] - after[0, chosen]).max() > 0.1


@pytest.mark.parametrize("backend", ON_A_MESH)
def test_on_a_mesh_each_device_computes_its_own_rows_and_heads(backend: str) -> None:
    batch, arrays = layout(3, 4, 160), inputs(3, 4, 160, 4, 2, 8)
    alone = run(batch, *arrays, backend)
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        on_mesh = run(batch, *arrays, backend)
    for a, b in zip(alone, on_mesh, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.parametrize("backend", ON_A_MESH)
def test_one_mask_serves_layers_with_different_windows(backend: str) -> None:
    batch, (q, k, v, _) = layout(5, 4, 160), inputs(5, 4, 160, 4, 2, 8)

    @jax.jit
    def two_layers(q: jax.Array, k: jax.Array, v: jax.Array) -> list[jax.Array]:
        mask = make_mask(batch, (None, 20), backend)
        return [attention(q, k, v, mask, scale=0.3, window=window) for window in (20, None)]

    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        outs = two_layers(q, k, v)
    for window, out in zip((20, None), outs, strict=True):
        np.testing.assert_allclose(out, run(batch, q, k, v, jnp.zeros_like(q), "dense", window)[0], atol=2e-6)


@pytest.mark.parametrize("backend", [name for name in ALL if name != "dense"])
def test_bfloat16_is_as_close_to_float32_as_dense_bfloat16(backend: str) -> None:
    batch = layout(4, 2, 256)
    exact = run(batch, *inputs(4, 2, 256, 4, 2, 32), "dense")
    arrays = [x.astype(jnp.bfloat16) for x in inputs(4, 2, 256, 4, 2, 32)]
    for a, dense, ours in zip(exact, run(batch, *arrays, "dense"), run(batch, *arrays, backend), strict=True):
        assert ours.dtype == jnp.bfloat16
        distance = [float(jnp.linalg.norm(a - x.astype(jnp.float32))) for x in (dense, ours)]
        assert distance[1] <= 1.5 * distance[0]


def test_blockwise_memory_is_linear_in_the_row_length() -> None:
    def temporaries(length: int, backend: str) -> int:
        key_end = jnp.full((1, length), length, jnp.int32)
        positions = jnp.arange(length, dtype=jnp.int32)[None]

        def total(q, k, v):  # type: ignore[no-untyped-def]
            mask = prepare_mask(key_end, positions, backend=backend)
            return attention(q, k, v, mask, scale=1.0).sum()

        shape = jax.ShapeDtypeStruct((1, length, 4, 32), jnp.float32)
        compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(shape, shape, shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(8192, "blockwise") < 2.2 * temporaries(4096, "blockwise")
    assert temporaries(8192, "blockwise") < temporaries(8192, "dense") / 20


def test_hidden_blocks_are_not_on_the_list() -> None:
    # Two pairs of 256 tokens each, then 128 of padding: the second pair never visits the first one's blocks.
    key_end = jnp.repeat(jnp.array([256, 512, 0]), jnp.array([256, 256, 128]), total_repeat_length=640)[None]
    live = find_live_blocks(key_end, jnp.zeros_like(key_end), None)
    blocks = 128 // BLOCK
    for i in range(5 * blocks):
        visited = live.key_blocks[0, i, : live.counts[0, i]].tolist()
        first = {0: 0, 1: 0, 2: 2, 3: 2}.get(i // blocks)
        # The blocks before it in its pair are full and come first; the block on the diagonal needs the mask.
        assert visited == ([] if first is None else list(range(first * blocks, i + 1)))
        assert live.full[0, i] == max(0, len(visited) - 1)


def test_of_a_deep_tree_the_live_blocks_alone_are_listed() -> None:
    rng = np.random.default_rng(8)

    def leaves(depth: int) -> list[np.ndarray]:
        own = rng.integers(1, 99, int(rng.integers(10, 2 * BLOCK)), np.int32)
        below = [np.zeros(1, np.int32)] if not depth else [leaf for _ in range(2) for leaf in leaves(depth - 1)]
        return [np.concatenate([own, leaf]) for leaf in below]

    tree = Group(tuple(Response.after(1, leaf) for leaf in leaves(4)))
    (tokens,) = GroupLengths.of([tree]).tree_tokens
    blocks = -(-int(tokens) // BLOCK) + 1
    batch = build_rows([[(0, tree)]], RowShape(blocks * BLOCK, 16 * int(tokens), 16), prefix_sharing=True)
    mask = prepare_mask(jnp.array(batch.key_end), jnp.array(batch.positions), (None,), "blockwise")
    live = mask.table(None)
    seen = np.asarray(mask.visible(None)).reshape(blocks, BLOCK, blocks, BLOCK).any((1, 3))
    assert seen.sum() < 0.8 * np.tri(blocks).sum()  # many blocks are hidden
    for i in range(blocks):
        listed = live.key_blocks[0, i, : live.counts[0, i]].tolist()
        assert sorted(listed) == np.flatnonzero(seen[i]).tolist()


def test_blocks_listed_as_full_are_visible_to_every_query() -> None:
    batch = layout(6, 2, 8 * BLOCK)
    key_end, positions = jnp.array(batch.key_end), jnp.array(batch.positions)
    mask = prepare_mask(key_end, positions, (None, 100), "blockwise")
    for window in (None, 100):
        live = mask.table(window)
        full = np.asarray(mask.visible(window)).reshape(2, 8, BLOCK, 8, BLOCK).all((2, 4))
        for row, i in np.ndindex(2, 8):
            assert all(full[row, i, j] for j in live.key_blocks[row, i, : live.full[row, i]].tolist())
