"""The step plan: packing never changes which pairs a step consumes, and fills rows well."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_simpo.data.groups import GroupLengths
from jax_simpo.data.packing import (
    MICRO_BATCH_TOKENS,
    ROW_MULTIPLE,
    StepPlan,
    fill_rows,
    first_fit_decreasing,
    grow_micro_batches,
    make_step_plan,
    measure,
    micro_batch_line,
    pack,
)
from jax_simpo.data.rows import RowShape
from jax_simpo.errors import DataError


def log_normal_lengths(count: int, prompt: float, response: float, seed: int = 0) -> GroupLengths:
    """Draws log-normal lengths around the given medians, cut at four times the median."""
    rng = np.random.default_rng(seed)

    def draw(median: float) -> np.ndarray:
        return np.clip(rng.lognormal(np.log(median), 0.5, count), 2, 4 * median).astype(np.int32)

    p, chosen, rejected = draw(prompt), draw(response), draw(response)
    two = lambda a, b: np.stack([a, b], 1).reshape(-1)  # noqa: E731
    tokens = p + chosen + rejected - 2
    ranks = np.tile(np.array([0, 1], np.int32), count)
    inputs = two(p + chosen - 1, p + rejected - 1)
    sizes = np.full(count, 2, np.int32)
    return GroupLengths(sizes, tokens, tokens.astype(np.int64), tokens, ranks, inputs, two(p, p), two(chosen, rejected))


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 40)), min_size=1, max_size=60),
    st.integers(50, 120),
    st.integers(40, 90),
    st.integers(1, 8),
)
def test_first_fit_decreasing_places_each_pair_once_within_all_capacities(
    sizes: list[tuple[int, int]], length: int, targets: int, pairs_per_row: int
) -> None:
    tokens, wanted = np.array(sizes).T
    shape = RowShape(length, targets, 2 * pairs_per_row)
    rows = first_fit_decreasing(tokens, wanted, np.full(len(tokens), 2), shape)
    assert sorted(np.concatenate(rows)) == list(range(len(sizes)))
    for row in rows:
        assert tokens[row].sum() <= length and wanted[row].sum() <= targets and len(row) <= pairs_per_row
    for later in range(1, len(rows)):  # first fit: a row was opened only because no earlier one had room
        opener = rows[later][0]
        for earlier in rows[:later]:
            before = [p for p in earlier if (-tokens[p], p) < (-tokens[opener], opener)]
            full = (
                tokens[before].sum() + tokens[opener] > length
                or wanted[before].sum() + wanted[opener] > targets
                or len(before) == pairs_per_row
            )
            assert full


@given(st.integers(1, 70), st.integers(1, 20), st.integers(0, 3))
def test_every_epoch_visits_every_pair_once(count: int, batch: int, seed: int) -> None:
    plan = StepPlan(log_normal_lengths(count, 40, 20), RowShape(512, 512, 8), batch, 4, seed=seed)
    for epoch in (0, 1):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        visited = np.concatenate([plan.groups(k) for k in steps])
        assert sorted(visited) == list(range(count))
        assert all(len(plan.groups(k)) == batch for k in steps[:-1])
    assert plan.step(2 * plan.steps_per_epoch - 1).epoch == 2.0


def test_a_step_consumes_the_same_pairs_however_its_rows_are_made() -> None:
    lengths = log_normal_lengths(500, 60, 30)
    plan = StepPlan(lengths, RowShape(1024, 512, 16), 64, 1, seed=7)
    variants = [
        replace(plan, prefix_sharing=False),
        replace(plan, packing=False),
        replace(plan, shape=RowShape(2048, 1024, 32), rows_per_micro_batch=8),
    ]
    for variant in variants:
        for k in (0, 3, 9):
            np.testing.assert_array_equal(variant.groups(k), plan.groups(k))


def test_the_order_changes_with_seed_and_epoch_and_without_a_seed_is_file_order() -> None:
    plan = StepPlan(log_normal_lengths(100, 40, 20), RowShape(512, 512, 8), 100, 1, seed=1)
    orders = [tuple(plan.groups(0)), tuple(plan.groups(1)), tuple(replace(plan, seed=2).groups(0))]
    assert len(set(orders)) == 3
    np.testing.assert_array_equal(replace(plan, seed=None).groups(0), np.arange(100))


def test_micro_batches_are_filled_with_empty_rows() -> None:
    plan = StepPlan(log_normal_lengths(10, 100, 50), RowShape(512, 512, 2), 10, 8, packing=False)
    assert plan.step(0).micro_batches == 2


# Medians of prompt and response of the six data sets that prefix sharing was measured on (arXiv 2410.20305).
PROFILES = [(712, 448), (127, 59), (694, 178), (382, 34), (669, 106), (121, 288)]


@pytest.mark.parametrize(("batch", "least"), [(128, 0.95), (512, 0.97)])
@pytest.mark.parametrize(("prompt", "response"), PROFILES)
def test_rows_of_eight_medians_are_filled(prompt: int, response: int, batch: int, least: float) -> None:
    lengths = log_normal_lengths(4096, prompt, response)
    length = 8 * int(np.median(lengths.row_tokens(True))) // ROW_MULTIPLE * ROW_MULTIPLE
    plan = make_step_plan(
        lengths, global_batch_size=batch, rows_per_micro_batch=1, row_length=length, max_row_length=length, seed=0
    )
    fills = [lengths.row_tokens(True)[s.groups].sum() / (len(s.rows) * length) for s in map(plan.step, range(8))]
    assert np.mean(fills) >= least


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(50, 120))
def test_filling_row_by_row_places_each_pair_once_and_leaves_no_room_that_one_more_would_fit(
    sizes: list[int], length: int
) -> None:
    tokens = np.array(sizes)
    rows = fill_rows(tokens, length)
    assert sorted(np.concatenate(rows)) == list(range(len(sizes)))
    for k, row in enumerate(rows):
        assert tokens[row].sum() <= length
        assert all(tokens[row].sum() + tokens[later].min() > length for later in rows[k + 1 :])


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 40)), min_size=1, max_size=60),
    st.integers(50, 120),
    st.integers(40, 90),
    st.integers(1, 8),
)
def test_packing_keeps_to_all_capacities_and_takes_no_more_rows_than_first_fit(
    sizes: list[tuple[int, int]], length: int, targets: int, pairs_per_row: int
) -> None:
    tokens, wanted = np.array(sizes).T
    shape = RowShape(length, targets, 2 * pairs_per_row)
    rows = pack(tokens, wanted, np.full(len(tokens), 2), shape)
    assert sorted(np.concatenate(rows)) == list(range(len(sizes)))
    assert len(rows) <= len(first_fit_decreasing(tokens, wanted, np.full(len(tokens), 2), shape))
    for row in rows:
        assert tokens[row].sum() <= length and wanted[row].sum() <= targets and len(row) <= pairs_per_row


@pytest.mark.parametrize(("batch", "devices"), [(16, 1), (128, 8), (128, 64)])
def test_the_chosen_row_length_is_the_cheapest(batch: int, devices: int) -> None:
    lengths = log_normal_lengths(1024, 200, 100)
    plan = make_step_plan(
        lengths, global_batch_size=batch, rows_per_micro_batch=devices, row_length=None, max_row_length=16384, seed=0
    )
    shortest = -(-int(lengths.row_tokens(True).max()) // ROW_MULTIPLE) * ROW_MULTIPLE

    def cost(length: int) -> float:
        report = measure(replace(plan, shape=RowShape(length, 10**6, 10**6)))
        return report.computed_tokens + MICRO_BATCH_TOKENS * report.rows

    assert plan.shape.length % ROW_MULTIPLE == 0 and plan.shape.length >= shortest
    best = min(cost(length) for length in range(shortest, 8 * shortest, ROW_MULTIPLE))
    # Half a per cent for taking the shorter of nearly equal rows; the rest for trying forty lengths and not all.
    assert cost(plan.shape.length) <= 1.03 * best


def test_the_row_length_keeps_to_the_memory_there_is_but_holds_the_longest_pair() -> None:
    lengths = log_normal_lengths(1024, 200, 100)

    def row_length(most: int) -> int:
        plan = make_step_plan(
            lengths, global_batch_size=128, rows_per_micro_batch=1, row_length=None, max_row_length=most, seed=0
        )
        return plan.shape.length

    assert row_length(most=2048) <= 2048
    assert row_length(most=1) >= 1024


@pytest.mark.parametrize(("median", "spread", "batch"), [(40, 15, 16), (200, 100, 128), (900, 400, 128)])
@pytest.mark.parametrize("packing", [True, False])
def test_long_rows_are_multiples_of_what_is_asked_for_and_short_ones_of_what_adds_little(
    median: int, spread: int, batch: int, packing: bool
) -> None:
    lengths = log_normal_lengths(512, median, spread)

    def plan_with(row_length: int | None, row_multiple: int) -> StepPlan:
        return make_step_plan(
            lengths,
            global_batch_size=batch,
            rows_per_micro_batch=1,
            row_length=row_length,
            max_row_length=16384,
            row_multiple=row_multiple,
            packing=packing,
            seed=0,
        )

    longest, chosen = int(lengths.row_tokens(True).max()), plan_with(None, 1024).shape.length
    assert chosen >= longest
    multiples = {8192: 1024, 4096: 512, 2048: 256, 0: 128}  # from what length on
    assert chosen % next(multiple for least, multiple in multiples.items() if chosen >= least) == 0
    if not packing:
        assert chosen <= max(longest + 127, longest * 9 / 8)
    # A length that is given stays as it is.
    given = -(-longest // ROW_MULTIPLE) * ROW_MULTIPLE
    assert plan_with(given, 1024).shape == plan_with(given, ROW_MULTIPLE).shape


@pytest.mark.parametrize(("batch", "devices"), [(16, 1), (48, 1), (50, 8), (8, 8)])
@pytest.mark.parametrize("most", [1, 3, 1000])
def test_micro_batches_grow_to_the_cheapest_number_of_rows_that_is_allowed(batch: int, devices: int, most: int) -> None:
    lengths = log_normal_lengths(512, 100, 50)
    plan = StepPlan(lengths, RowShape(1024, 1024, 64), batch, devices, seed=0)
    grown = grow_micro_batches(plan, devices, most)

    def cost(rows: int) -> float:  # of rows a device
        report = measure(replace(plan, rows_per_micro_batch=rows * devices))
        return report.computed_tokens + MICRO_BATCH_TOKENS * report.rows / rows

    rows = grown.rows_per_micro_batch // devices
    assert grown == replace(plan, rows_per_micro_batch=rows * devices) and rows <= most
    costs = [cost(n) for n in range(1, min(most, batch) + 1)]  # no row holds less than a pair
    assert cost(rows) <= 1.005 * min(costs)
    assert not any(other <= 1.005 * min(costs) for other in costs[: rows - 1])  # fewer rows take less memory
    if most > batch:
        assert measure(grown).rows / grown.rows_per_micro_batch < 1.5  # most steps are one micro-batch


def test_a_line_says_how_many_rows_a_micro_batch_has_and_why() -> None:
    plan = StepPlan(log_normal_lengths(64, 100, 50), RowShape(1024, 1024, 64), 64, 2, seed=0)
    filled, report = len(plan.step(0).rows), measure(plan)
    given = micro_batch_line(plan, report, 2, None)
    assert given == f"{-(-filled // 2)} micro-batches a step, of 1 row a device (`rows_per_device`)"
    grown = grow_micro_batches(plan, 2, 100)
    line = micro_batch_line(grown, measure(grown), 2, 100)
    assert line.startswith(
        f"1 micro-batch a step, of {-(-filled // 2)} rows a device (`rows_per_device: auto`: a step "
    )
    assert f"fills {filled / 2:.3g}, and by estimate 100 fit" in line


def test_without_packing_a_row_holds_one_pair() -> None:
    lengths = log_normal_lengths(64, 100, 50)
    plan = make_step_plan(
        lengths,
        global_batch_size=16,
        rows_per_micro_batch=4,
        row_length=None,
        max_row_length=16384,
        packing=False,
        seed=0,
    )
    assert plan.shape.responses == 2
    assert [len(row) for row in plan.step(0).rows] == [1] * 16


def test_a_pair_longer_than_a_row_is_an_error_that_says_what_to_change() -> None:
    lengths = log_normal_lengths(64, 300, 150)
    plan = make_step_plan(lengths, global_batch_size=16, rows_per_micro_batch=1, row_length=512, max_row_length=16384)
    first = int(np.flatnonzero(lengths.row_tokens(True) > 512)[0])
    with pytest.raises(DataError) as error:
        plan.check(lambda pair: ("pairs.jsonl", 1000 + pair))
    tokens = lengths.row_tokens(True)[first]
    assert f"pairs.jsonl, row {1000 + first}: its 2 responses take {tokens} tokens, but a row holds 512" in str(
        error.value
    )
    assert "Set `row_length: auto`, raise `row_length`, or lower `max_length`" in str(error.value)
