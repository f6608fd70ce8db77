"""Pairs are laid out as they were when the program knew pairs alone: to the bit, in every layout."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import pytest

from jax_simpo.data.groups import Group, GroupLengths, Response
from jax_simpo.data.loader import build_step
from jax_simpo.data.packing import make_step_plan
from tests.pairs import Pairs

# prefix_sharing, packing, prompt_targets -> the digest of all plans and rows of an epoch, recorded at commit c93e644.
RECORDED = {
    (True, True, False): "1f5f4aa37482101c",
    (True, True, True): "cfad32e762d5b83b",
    (True, False, False): "86c596f57b020f8d",
    (True, False, True): "3feaeff775bd224d",
    (False, True, False): "0d93a1261907d926",
    (False, True, True): "c08165a046ab3fe1",
    (False, False, False): "e51046ab723f6032",
    (False, False, True): "40aa99be066b035f",
}


def random_pair(rng: np.random.Generator) -> Group:
    """Makes a pair; in every fifth response the prompt's last token is merged with the answer's first."""

    def tokens(low: int, high: int) -> list[int]:
        return rng.integers(1, 6, rng.integers(low, high + 1)).tolist()

    prompt, header = tokens(1, 60), tokens(0, 3)
    responses = []
    for _ in range(2):
        own = prompt + (tokens(1, 1) if rng.random() < 0.2 else [])
        responses.append(Response.after(len(own), np.array(own + header + tokens(1, 40), np.int32)))
    return Group(tuple(responses))


def digest(arrays: Iterable[np.ndarray]) -> str:
    """Hashes the shapes and values of arrays."""
    found = hashlib.sha256()
    for array in arrays:
        array = np.ascontiguousarray(array, np.int64)
        found.update(repr(array.shape).encode() + array.tobytes())
    return found.hexdigest()[:16]


@pytest.mark.parametrize(("sharing", "packing", "prompts"), RECORDED)
def test_plans_and_rows_of_pairs_are_the_recorded_ones(sharing: bool, packing: bool, prompts: bool) -> None:
    rng = np.random.default_rng(2026)
    pairs = [random_pair(rng) for _ in range(300)]
    plan = make_step_plan(
        GroupLengths.of(pairs),
        global_batch_size=64,
        rows_per_micro_batch=2,
        row_length=None,
        max_row_length=1024,
        prefix_sharing=sharing,
        packing=packing,
        seed=7,
        prompt_targets=prompts,
    )
    arrays = [np.array([plan.shape.length, plan.shape.targets, plan.shape.responses])]
    for k in range(plan.steps_per_epoch + 1):
        step, built = plan.step(k), build_step(plan, Pairs(pairs), k)
        arrays += [step.groups, *step.rows]
        for rows, slots in zip(built.micro_batches, built.slots, strict=True):
            arrays += [*rows.arrays().values(), slots.group, slots.place]
        arrays.append(np.array([built.chosen_tokens, built.input_tokens, built.computed_tokens]))
    assert digest(arrays) == RECORDED[sharing, packing, prompts]
