"""Batches are built ahead, in order, and a fault in the thread reaches the caller."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from jax_simpo.data.groups import Group, GroupLengths
from jax_simpo.data.loader import build_step, prefetch, step_batches
from jax_simpo.data.packing import StepPlan, make_step_plan
from tests.pairs import Pairs, random_pairs


def eight_pairs_a_step(pairs: list[Group], rows: int) -> StepPlan:
    return make_step_plan(
        GroupLengths.of(pairs),
        global_batch_size=8,
        rows_per_micro_batch=rows,
        row_length=128,
        max_row_length=128,
        seed=0,
    )


def test_a_steps_micro_batches_hold_all_its_pairs_in_static_shapes() -> None:
    pairs = random_pairs(np.random.default_rng(0), 21, 50, prompt=(3, 30), response=(2, 20))
    plan = eight_pairs_a_step(pairs, rows=3)
    batches = list(step_batches(plan, Pairs(pairs), range(3)))
    assert [b.step for b in batches] == [0, 1, 2]
    assert [len(b.groups) for b in batches] == [8, 8, 5]
    for batch in batches:
        slot_pairs = np.concatenate([rows.response_group.ravel() for rows in batch.micro_batches])
        assert sorted(slot_pairs[slot_pairs >= 0]) == sorted([*range(len(batch.groups))] * 2)
        assert all(rows.tokens.shape == (3, 128) for rows in batch.micro_batches)
        assert batch.chosen_tokens == sum(len(pairs[i].responses[0].targets) for i in batch.groups)
        assert batch.computed_tokens == 3 * 128 * len(batch.micro_batches)
        assert batch.input_tokens == plan.lengths.row_tokens(True)[batch.groups].sum()


def test_a_process_builds_its_rows_as_they_are_in_the_whole_step_and_reads_no_other_pairs() -> None:
    pairs = random_pairs(np.random.default_rng(0), 21, 50, prompt=(3, 30), response=(2, 20))
    plan = eight_pairs_a_step(pairs, rows=4)
    for step in range(plan.steps_per_epoch):
        full_step = build_step(plan, Pairs(pairs), step)
        assert len(full_step.slots) == len(full_step.micro_batches)
        for slots, rows in zip(full_step.slots, full_step.micro_batches, strict=True):
            np.testing.assert_array_equal(slots.group, rows.response_group)
            np.testing.assert_array_equal(slots.place, rows.response_rank)
        read = []
        for own in ([0, 1], [3], [2]):
            source = Pairs(pairs)
            part = build_step(plan, source, step, own)
            read += source.read
            assert (part.chosen_tokens, part.input_tokens, part.computed_tokens, part.epoch) == (
                full_step.chosen_tokens,
                full_step.input_tokens,
                full_step.computed_tokens,
                full_step.epoch,
            )
            for ours, theirs in zip(part.micro_batches, full_step.micro_batches, strict=True):
                for name, array in ours.arrays().items():
                    np.testing.assert_array_equal(array, theirs.arrays()[name][own])
        assert sorted(read) == sorted(full_step.groups)


def test_what_the_thread_raises_is_raised_where_it_happened() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise KeyError("lost")

    ahead = prefetch(items(), 2)
    assert next(ahead) == 1
    with pytest.raises(KeyError, match="lost"):
        next(ahead)


def test_closing_early_ends_the_thread() -> None:
    ahead = prefetch(iter(range(1000)), 2)
    next(ahead)
    ahead.close()
    assert not [t for t in threading.enumerate() if t.name == "row-builder"]
