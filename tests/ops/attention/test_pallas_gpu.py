"""Compares the `pallas` kernels with `dense`; Mosaic GPU's interpreter runs them step by step on the CPU.

The interpreter fills shared memory and results with NaN at the start, so that a value read before it is written shows.
"""

import dataclasses
import functools
import threading
from collections.abc import Iterator

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax._src import core
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic_gpu.interpret import shared_memory

from jax_simpo.errors import ConfigError
from jax_simpo.ops.attention import attention as any_attention
from jax_simpo.ops.attention import prepare_mask
from jax_simpo.ops.attention.backends import ScoreRule
from jax_simpo.ops.attention.pallas import bounds, kernel, warpgroup
from jax_simpo.ops.attention.pallas.backend import HEAD_SIZES
from jax_simpo.ops.attention.pallas.switches import DEFAULTS, Switches
from jax_simpo.ops.numerics import SAVED_ATTENTION
from jax_simpo.sharding import make_mesh

# Three blocks, the last one padded inside: 44 is no multiple of 16.
BLOCK, LENGTH, HEADS, KV_HEADS, WIDTH = 16, 44, 2, 1, 16
SCALE = 0.3


@pytest.fixture(autouse=True, scope="module")
def _compile_once() -> Iterator[None]:
    """Makes jax 0.10's interpreter compile a kernel once, as later releases do, not once a warpgroup and tile."""
    if not jax.__version__.startswith("0.10."):
        yield
        return

    programs: dict[core.Jaxpr, jax.stages.Compiled] = {}
    lock = threading.Lock()

    def run(jaxpr: core.Jaxpr, consts, *args) -> None:  # type: ignore[no-untyped-def]
        with lock:
            if jaxpr not in programs:
                programs[jaxpr] = jax.jit(functools.partial(core.eval_jaxpr, jaxpr)).lower(consts, *args).compile()
        programs[jaxpr](consts, *args)

    original = thread_map._run_jaxpr
    thread_map._run_jaxpr = run
    yield
    thread_map._run_jaxpr = original


@st.composite
def layouts(draw: st.DrawFn, length: int = LENGTH) -> tuple[np.ndarray, np.ndarray]:
    """Draws `key_end` and positions of one row, maybe empty: prompts with one to three responses, then padding."""
    key_end, positions = np.zeros(length, np.int32), np.zeros(length, np.int32)
    start = 0
    while start < length and draw(st.booleans() if start else st.integers(0, 7).map(bool)):
        room = length - start
        shared = draw(st.integers(0, room))
        branches = draw(st.lists(st.integers(0, room), min_size=1, max_size=3))
        end = start + shared
        for branch in branches:
            branch = min(branch, length - end)
            key_end[end : end + branch] = end + branch
            positions[end : end + branch] = shared + np.arange(branch)
            end += branch
        key_end[start : start + shared] = end
        positions[start : start + shared] = np.arange(shared)
        start = end
    return key_end, positions


def arrays(  # type: ignore[no-untyped-def]
    seed: int, dtype=jnp.float32, rows: int = 1, heads: int = HEADS, kv_heads: int = KV_HEADS, width: int = WIDTH
):
    """Returns random q, k, v and gradient of the output."""
    random = np.random.default_rng(seed)
    shapes = [(rows, LENGTH, h, width) for h in (heads, kv_heads, kv_heads, heads)]
    return [jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes]


@functools.partial(jax.jit, static_argnames=("window", "softcap", "switches"))
def kernels(q, k, v, dout, key_end, positions, window=None, softcap=None, switches=DEFAULTS):  # type: ignore[no-untyped-def]
    """Returns the output and the gradients of q, k and v by the kernels."""
    lists = bounds.find_block_bounds(key_end, positions, window, BLOCK, **switches.of_lists)
    rule = ScoreRule(SCALE, window, softcap)

    def attend(q, k, v):  # type: ignore[no-untyped-def]
        return kernel.attention(
            q, k, v, key_end, positions, lists, rule, switches=switches, block=BLOCK, interpret=True
        )

    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(dout)


@functools.partial(jax.jit, static_argnames=("window", "softcap"))
def oracle(q, k, v, dout, key_end, positions, window=None, softcap=None):  # type: ignore[no-untyped-def]
    mask = prepare_mask(key_end, positions, (window,), "dense")
    attend = functools.partial(any_attention, mask=mask, scale=SCALE, window=window, softcap=softcap)
    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(dout)


# The kernels use 16 bits of float32 inputs: errors are 2**-16 of sums of a few dozen terms of size 1 to 3.
BOUND = 2e-4


def distances(q, k, v, dout, key_end, positions, window=None, softcap=None, switches=DEFAULTS) -> dict[str, float]:  # type: ignore[no-untyped-def]
    """Returns the largest distance from `dense` in the output and in each gradient; NaN if either side has one."""
    results = kernels(q, k, v, dout, key_end, positions, window, softcap, switches)
    expected = oracle(q, k, v, dout, key_end, positions, window, softcap)
    names = ("out", "dq", "dk", "dv")
    return {name: float(jnp.abs(a - b).max()) for name, a, b in zip(names, results, expected, strict=True)}


def beyond(bound: float, distances: dict[str, float]) -> dict[str, float]:
    """Returns the distances that are not within the bound, NaN among them."""
    return {name: distance for name, distance in distances.items() if not distance <= bound}


def one_row(*lengths: int, length: int = LENGTH) -> tuple[jax.Array, jax.Array]:
    """Returns a row of a prompt and two responses of these lengths, then padding."""
    prompt, chosen, rejected = lengths
    ends = np.repeat([sum(lengths), prompt + chosen, sum(lengths)], lengths)
    positions = np.concatenate([np.arange(prompt + chosen), prompt + np.arange(rejected)])
    padding = (0, length - sum(lengths))
    return jnp.asarray(np.pad(ends, padding)[None], jnp.int32), jnp.asarray(np.pad(positions, padding)[None], jnp.int32)


@settings(max_examples=2)
@given(layout=layouts(), seed=st.integers(0, 2**16))
def test_values_and_gradients_equal_dense_on_random_layouts(layout: tuple[np.ndarray, np.ndarray], seed: int) -> None:
    assert not beyond(BOUND, distances(*arrays(seed), *(jnp.asarray(x)[None] for x in layout)))


@settings(max_examples=2)
@given(layout=layouts(), seed=st.integers(0, 2**16))
def test_values_and_gradients_equal_dense_with_window_and_softcap(
    layout: tuple[np.ndarray, np.ndarray], seed: int
) -> None:
    row = (jnp.asarray(x)[None] for x in layout)
    assert not beyond(BOUND, distances(*arrays(seed), *row, window=9, softcap=2.0))


@pytest.mark.slow
@settings(max_examples=10)
@given(
    layout=st.tuples(layouts(), layouts()),
    seed=st.integers(0, 2**16),
    window=st.sampled_from([None, 1, 20]),
    softcap=st.sampled_from([None, 1.0]),
)
def test_values_and_gradients_equal_dense_on_many_layouts(layout, seed, window, softcap) -> None:  # type: ignore[no-untyped-def]
    key_end, positions = (jnp.asarray(np.stack(x)) for x in zip(*layout, strict=True))
    inputs = arrays(seed, rows=2, heads=4, kv_heads=2)
    assert not beyond(BOUND, distances(*inputs, key_end, positions, window, softcap))


@pytest.mark.slow
@pytest.mark.skipif(jax.__version__.startswith("0.10."), reason="jax 0.10 misses a copy that no thread waited for")
@pytest.mark.parametrize("switches", [DEFAULTS, Switches(ping_pong=True, overlap=True)])
def test_no_warpgroup_reads_what_a_copy_may_be_writing(switches: Switches, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter searches for races between copies, warpgroups and barriers, and raises."""
    parameters = dataclasses.replace(warpgroup.interpreter(), detect_races=True)
    monkeypatch.setattr(warpgroup, "interpreter", lambda: parameters)
    results = kernels.__wrapped__(*arrays(10), *one_row(17, 9, 14), window=20, switches=switches)
    assert all(np.all(np.isfinite(x)) for x in results)


# A shared prompt with a tree of three answers, two of which share more than the prompt; a causal sequence; padding. Of
# 48 places none is visible to all, and blocks of all kinds occur.
PACKED_KEY_END = [31] * 12 + [24] * 4 + [20] * 4 + [24] * 4 + [31] * 7 + [42] * 11 + [0] * 2
PACKED_POSITIONS = [*range(20), *range(16, 20), *range(12, 19), *range(11), 0, 0]
VARIANTS = {
    "all at tiles in order": Switches(heavy_first=False, half_lists=False, ping_pong=True, overlap=True),
    "ping-pong": Switches(ping_pong=True),
    "overlap": Switches(overlap=True),
}


@pytest.mark.parametrize("switches", [pytest.param(s, id=name) for name, s in VARIANTS.items()])
def test_every_variant_of_the_forward_kernel_equals_dense_on_trees_and_packed_sequences(switches: Switches) -> None:
    key_end, positions = (jnp.asarray([x], jnp.int32) for x in (PACKED_KEY_END, PACKED_POSITIONS))
    q, k, v, _ = arrays(13)
    lists = bounds.find_block_bounds(key_end, positions, 9, BLOCK, **switches.of_lists)
    rule = ScoreRule(SCALE, 9, 2.0)
    result = jax.jit(
        lambda *a: kernel.attention(*a, key_end, positions, lists, rule, switches=switches, block=BLOCK, interpret=True)
    )(q, k, v)
    mask = prepare_mask(key_end, positions, (9,), "dense")
    expected = any_attention(q, k, v, mask, scale=SCALE, window=9, softcap=2.0)
    np.testing.assert_allclose(result, expected, atol=BOUND, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("switches", [pytest.param(s, id=name) for name, s in VARIANTS.items()])
@settings(max_examples=4)
@given(
    layout=layouts(),
    seed=st.integers(0, 2**16),
    window=st.sampled_from([None, 9]),
    softcap=st.sampled_from([None, 1.0]),
)
def test_values_and_gradients_of_every_variant_equal_dense(  # type: ignore[no-untyped-def]
    switches: Switches, layout, seed, window, softcap
) -> None:
    row = (jnp.asarray(x)[None] for x in layout)
    assert not beyond(BOUND, distances(*arrays(seed), *row, window, softcap, switches))


def test_bfloat16_is_as_near_to_float32_as_dense_in_bfloat16() -> None:
    key_end, positions = one_row(17, 9, 14)
    inputs = arrays(3, jnp.bfloat16)
    exact = oracle(*(x.astype(jnp.float32) for x in inputs), key_end, positions)
    ours, dense = kernels(*inputs, key_end, positions), oracle(*inputs, key_end, positions)
    for a, b, c in zip(exact, dense, ours, strict=True):
        assert c.dtype == jnp.bfloat16
        distance = [float(jnp.linalg.norm(a - x.astype(jnp.float32))) for x in (b, c)]
        assert distance[1] <= 1.5 * distance[0]


@pytest.mark.parametrize(
    ("dtype", "width"),
    [("float32", 128), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("bfloat16", 256), ("float32", 80)))],
)
def test_heads_too_wide_for_both_gradients_at_once_are_as_near_to_float32_as_dense(
    dtype: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps are half a block long, dK and dV get a kernel each, and there are as many stages as fit in the hardware."""
    memory = kernel.SHARED_MEMORY * BLOCK // bounds.BLOCK  # everything in it is in proportion to the block
    monkeypatch.setattr(kernel, "SHARED_MEMORY", memory)
    parts = kernel._part_count(dtype)
    tilings = kernel._tilings(width, parts, BLOCK, True)
    assert [wanted for wanted, _ in tilings.gradients] == [("dk",), ("dv",)]
    assert tilings.dq.stages == ((2, 1) if width * parts == 256 else (2, 2))

    key_end, positions = one_row(17, 9, 14)
    inputs = [x * (WIDTH / width) ** 0.25 for x in arrays(11, width=width)]  # products as large as those of WIDTH
    inputs = [x.astype(dtype) for x in inputs]
    exact = oracle(*(x.astype(jnp.float32) for x in inputs), key_end, positions)
    rounded = oracle(*(x.astype(jnp.bfloat16) for x in inputs), key_end, positions)
    results = kernels(*inputs, key_end, positions)
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), exact, rounded, results, strict=True):
        assert c.dtype == dtype
        dense, distance = (float(jnp.linalg.norm(a - x.astype(jnp.float32))) for x in (b, c))
        # The kernels use 16 bits of a float32, 256 times finer than bfloat16; sums over a row lose a part of that.
        assert distance <= (1.5 * dense if dtype == "bfloat16" else dense / 30), name


def test_on_a_mesh_each_device_computes_its_own_rows_and_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compares with dense without a mesh. The kernels' own block is longer than a row."""
    # At the end of a kernel on one device the interpreter checks that no device has barriers left, although others may
    # still be running. So the check waits for all four.
    check, all_have_ended = shared_memory.GPUSharedMemory.assert_no_barriers_allocated, threading.Barrier(4)

    def check_later(memory: shared_memory.GPUSharedMemory) -> None:
        all_have_ended.wait(timeout=300)
        check(memory)

    monkeypatch.setattr(shared_memory.GPUSharedMemory, "assert_no_barriers_allocated", check_later)
    key_end, positions = (jnp.concatenate(x) for x in zip(one_row(17, 9, 14), one_row(5, 30, 2), strict=True))
    inputs = arrays(12, rows=2, heads=4, kv_heads=2)

    @jax.jit
    def run(q, k, v, dout, key_end, positions):  # type: ignore[no-untyped-def]
        mask = prepare_mask(key_end, positions, (None,), "pallas", interpret=True)
        out, pull = jax.vjp(lambda q, k, v: any_attention(q, k, v, mask, scale=SCALE), q, k, v)
        return out, *pull(dout)

    with jax.set_mesh(make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4])):
        results = run(*inputs, key_end, positions)
    for name, a, b in zip(("out", "dq", "dk", "dv"), results, oracle(*inputs, key_end, positions), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4, rtol=0, err_msg=name)


def a_pair() -> tuple[jax.Array, ...]:
    """A pair of which only the rejected response has a gradient, and padding in the last block."""
    q, k, v, dout = arrays(5)
    return q, k, v, dout.at[:, 17:26].set(0.0), *one_row(17, 9, 14)


def pairs_around_a_dead_block() -> tuple[jax.Array, ...]:
    """A pair fills the first block, padding the second, a pair the third."""
    key_end = jnp.repeat(jnp.array([[BLOCK, 0, LENGTH]]), BLOCK, axis=1).astype(jnp.int32)[:, :LENGTH]
    return *arrays(6), key_end, jnp.tile(jnp.arange(BLOCK), 3)[None].astype(jnp.int32)[:, :LENGTH]


DEAD = slice(BLOCK, 2 * BLOCK)


@pytest.fixture(scope="module")
def of_a_pair(_compile_once: None) -> tuple[jax.Array, ...]:
    return kernels(*a_pair())


@pytest.fixture(scope="module")
def of_pairs_around_a_dead_block(_compile_once: None) -> tuple[jax.Array, ...]:
    return kernels(*pairs_around_a_dead_block())


def test_rejected_does_not_move_to_the_bit_when_chosen_changes(of_a_pair: tuple[jax.Array, ...]) -> None:
    q, k, v, *rest = a_pair()
    other = [x.at[:, 17:26].add(1.0) for x in (q, k, v)]
    for a, b in zip(of_a_pair, kernels(*other, *rest), strict=True):
        np.testing.assert_array_equal(a[:, 26:40], b[:, 26:40])


def test_hidden_blocks_are_not_loaded(of_pairs_around_a_dead_block: tuple[jax.Array, ...]) -> None:
    *inputs, key_end, positions = pairs_around_a_dead_block()
    poisoned = kernels(*(x.at[:, DEAD].set(jnp.nan) for x in inputs), key_end, positions)
    for a, b in zip(of_pairs_around_a_dead_block, poisoned, strict=True):
        np.testing.assert_array_equal(a, b)


def test_queries_that_see_nothing_give_zeros(
    of_a_pair: tuple[jax.Array, ...], of_pairs_around_a_dead_block: tuple[jax.Array, ...]
) -> None:
    for x in (*of_a_pair, *of_pairs_around_a_dead_block):
        assert np.all(np.isfinite(x))
    for in_a_block, whole_block in zip(of_a_pair, of_pairs_around_a_dead_block, strict=True):
        np.testing.assert_array_equal(in_a_block[:, 40:], 0.0)
        np.testing.assert_array_equal(whole_block[:, DEAD], 0.0)


find_block_bounds = jax.jit(
    bounds.find_block_bounds, static_argnums=(2, 3), static_argnames=("heavy_first", "half_lists")
)


@settings(max_examples=30)
@given(
    layout=layouts(length=64),
    window=st.sampled_from([None, 1, 7, 30]),
    switches=st.sampled_from([DEFAULTS, Switches(heavy_first=False, half_lists=False)]),
)
def test_block_lists_are_exact(layout: tuple[np.ndarray, np.ndarray], window: int | None, switches: Switches) -> None:
    key_end, positions = (jnp.asarray(x)[None] for x in layout)
    lists = find_block_bounds(key_end, positions, window, 16, **switches.of_lists)
    mask = np.asarray(prepare_mask(key_end, positions, (window,), "dense").visible(window))[0]
    for visible, (tiles, blocks), count in (
        (mask, lists.queries, 4),
        (mask, lists.queries_halves, 8),
        (mask.T, lists.keys_halves, 8),
    ):
        by_block = visible.reshape(4, 16, count, -1)
        if count == 8 and not switches.half_lists:  # each half counts as its whole block
            by_block = visible.reshape(4, 16, 4, -1).repeat(2, axis=2)
        some, every = by_block.any((1, 3)), by_block.all((1, 3))
        places = [int(place) for place, _, _ in tiles[0]]
        work = [int(live) for _, _, live in tiles[0]]
        assert sorted(places) == [0, 1, 2, 3]
        assert work == sorted(work, reverse=True) if switches.heavy_first else places == [0, 1, 2, 3]
        for listed, (place, full, live) in zip(blocks[0].tolist(), tiles[0].tolist(), strict=True):
            assert sorted(listed[:full]) == [j for j in range(count) if every[place, j]]
            assert sorted(listed[full:live]) == [j for j in range(count) if some[place, j] and not every[place, j]]


def test_a_rematerialisation_policy_that_keeps_attention_does_not_run_the_forward_again() -> None:
    """Only traces the program: jax cannot rematerialise interpreted kernels."""
    integers = jax.ShapeDtypeStruct((1, 256), jnp.int32)
    matrix = jax.ShapeDtypeStruct((1, 256, 1, 64), jnp.bfloat16)

    def forward_kernels(policy) -> int:  # type: ignore[no-untyped-def]
        def loss(q, k, v, key_end, positions):  # type: ignore[no-untyped-def]
            mask = prepare_mask(key_end, positions, backend="pallas")
            return any_attention(q, k, v, mask, scale=SCALE).astype(jnp.float32).sum()

        loss_and_gradients = jax.value_and_grad(jax.checkpoint(loss, policy=policy), (0, 1, 2))
        program = jax.make_jaxpr(loss_and_gradients)(matrix, matrix, matrix, integers, integers)
        return str(program).count("attention_forward")

    keep_attention = jax.checkpoint_policies.save_only_these_names(SAVED_ATTENTION)
    assert 0 < forward_kernels(keep_attention) < forward_kernels(jax.checkpoint_policies.nothing_saveable)


@pytest.mark.parametrize(("dtype", "width"), [(d, w) for d, sizes in HEAD_SIZES.items() for w in sizes])
def test_the_tiles_fit_the_shared_memory_of_hopper(dtype: str, width: int) -> None:
    parts = kernel._part_count(dtype)
    tilings = kernel._tilings(width, parts, 128, False)
    kernels = [(1, 2, tilings.forward), (2, 2, tilings.dq)]
    kernels += [(1 + ("dk" in wanted), 4, tiles) for wanted, tiles in tilings.gradients]
    for resident, vectors, tiles in kernels:
        assert min(tiles.stages) >= 1 and max(tiles.stages) >= 2  # loads overlap with the work on the stage before
        matrices = resident * tiles.tile + sum(tiles.stages) * tiles.step
        assert 2 * width * parts * matrices + 4 * vectors * tiles.stages[0] * tiles.step <= 227 * 1024


def test_what_the_kernels_cannot_do_is_an_error_with_the_way_out() -> None:
    mask = prepare_mask(*one_row(17, 9, 14), backend="pallas")
    q, k, v, _ = arrays(9)
    with pytest.raises(ConfigError, match=r"float32 kernels for head sizes 64, 128, and this model's is 16; choose"):
        any_attention(q, k, v, mask, scale=1.0)
    half = [x.astype(jnp.float16) for x in (q, k, v)]
    with pytest.raises(ConfigError, match="bfloat16 or float32, not float16"):
        any_attention(*half, mask, scale=1.0)
