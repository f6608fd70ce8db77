"""The comparison of loss heads: a way that computes something else gets no time, one that is not here is named."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import loss_head
from benchmarks.loss_head import _table, _turns, checked, groups
from benchmarks.loss_head_sides import (
    CROSS_ENTROPY,
    FULL,
    LIGER_SIMPO,
    SEQUENCE,
    SIMPO,
    TILES,
    Numbers,
    Sizes,
    jax_functions,
    jax_numbers,
)
from benchmarks.workers import WorkerFailed

DTYPES = ("float32", "bfloat16")
TARGETS = 8192  # as many as on a GPU: the more there are, the less one of them moves

Arrays = tuple[Any, Any, np.ndarray]  # hidden states, head, targets


def arrays(dtype: str) -> Arrays:
    hidden, head, targets = Sizes(300, 64, TARGETS, dtype).arrays()
    return jnp.asarray(hidden, dtype)[None], jnp.asarray(8 * head), targets


@cache
def program(way: str, function: str) -> Callable[..., Any]:
    def values_and_gradients(hidden: Any, head: Any, targets: Any) -> Any:
        return jax.value_and_grad(jax_functions(way, targets)[function], argnums=(0, 1), has_aux=True)(hidden, head)

    return jax.jit(values_and_gradients)


def run(way: str, function: str, given: Arrays) -> tuple[Any, Any]:
    """Returns the values and the gradients of a way."""
    (_, values), gradients = program(way, function)(*given)
    return values, gradients


@pytest.fixture(scope="module", params=DTYPES)
def exact(request: pytest.FixtureRequest) -> Iterator[tuple[str, Any, Numbers]]:
    """Gives a dtype, and what full logits compute in it: values and gradients, and these as numbers."""
    values, gradients = run(FULL, SIMPO, arrays(request.param))
    yield request.param, (values, gradients), jax_numbers(values, gradients)


@pytest.mark.parametrize("way", [TILES, "tiles, logits kept"])
def test_the_tiles_compute_what_full_logits_do(way: str, exact: tuple[str, Any, Numbers]) -> None:
    dtype, _, numbers = exact
    assert len(numbers.values) == TARGETS // SEQUENCE
    assert not jax_numbers(*run(way, SIMPO, arrays(dtype))).faults(numbers, dtype)


def test_one_wrong_target_of_8192_is_seen(exact: tuple[str, Any, Numbers]) -> None:
    dtype, _, numbers = exact
    hidden, head, targets = arrays(dtype)
    wrong = targets.copy()
    wrong[1000] = (wrong[1000] + 1) % len(head)
    faults = jax_numbers(*run(TILES, SIMPO, (hidden, head, wrong))).faults(numbers, dtype)
    assert {fault.partition(",")[0] for fault in faults} >= {"dhidden", "dhead"}


def test_responses_that_change_places_are_seen(exact: tuple[str, Any, Numbers]) -> None:
    dtype, _, numbers = exact
    hidden, head, targets = arrays(dtype)
    order = np.arange(TARGETS).reshape(2, -1, SEQUENCE)[::-1].ravel()  # chosen and rejected
    assert jax_numbers(*run(TILES, SIMPO, (hidden[:, order], head, targets[order]))).faults(numbers, dtype)


WRONG_GRADIENTS: dict[str, Callable[[Any, Any], tuple[Any, Any]]] = {
    "the head's is 2 % too large": lambda dhidden, dhead: (dhidden, 1.02 * dhead),
    "the states' is that of another loss": lambda dhidden, dhead: (-dhidden, dhead),
    "a block of the head has none": lambda dhidden, dhead: (dhidden, dhead.at[:30].set(0)),
    "a state has none": lambda dhidden, dhead: (dhidden.at[0, 5].set(0), dhead),
    "one number is NaN": lambda dhidden, dhead: (dhidden, dhead.at[3, 3].set(jnp.nan)),
}


@pytest.mark.parametrize("planted", WRONG_GRADIENTS.values(), ids=WRONG_GRADIENTS)
def test_a_wrong_gradient_is_seen(planted: Callable[..., Any], exact: tuple[str, Any, Numbers]) -> None:
    dtype, (values, gradients), numbers = exact
    assert not jax_numbers(values, gradients).faults(numbers, dtype)
    assert len(jax_numbers(values, planted(*gradients)).faults(numbers, dtype)) == 1


def test_cross_entropy_is_compared_with_that_of_full_logits() -> None:
    given = arrays("float32")
    full, tiles = (jax_numbers(*run(way, CROSS_ENTROPY, given)) for way in (FULL, TILES))
    assert full.values == pytest.approx([-float(jnp.mean(run(FULL, SIMPO, given)[0]))])
    assert not tiles.faults(full, "float32")
    assert Numbers([full.values[0] + 1e-3], full.dhidden, full.dhead).faults(full, "float32")


# --- what the script makes of it


def result(values: list[float], gradient: float = 1.0, **others: Any) -> dict[str, Any]:
    return {"numbers": {SIMPO: asdict(Numbers(values, [[gradient]], [[1.0]]))}, **others}


def test_a_way_is_compared_with_full_logits_and_these_must_be_numbers() -> None:
    full = result([-5.0, -6.0])
    assert checked(full, {}, "float32") == full
    assert "wrong" in checked(result([-5.0, math.nan]), {}, "float32")
    assert checked(result([-5.0, -6.0 + 1e-5]), full, "float32") == result([-5.0, -6.0 + 1e-5])
    assert checked(result([-5.0, -6.1]), full, "bfloat16")["wrong"].startswith("WRONG: a mean log-prob is 0.1 away")
    assert "dhidden" in checked(result([-5.0, -6.0], 1.1), full, "bfloat16")["wrong"]
    assert checked({"left out": "not here"}, full, "float32") == {"left out": "not here"}
    without = checked(full, {"failed": "no memory"}, "float32")
    assert without["failed"] == "cannot be compared: full logits no memory"


def test_ways_take_turns_with_as_many_as_fit_and_each_with_the_tiles() -> None:
    needs = {FULL: 50.0, TILES: 5.0, "kept": 20.0, LIGER_SIMPO: 10.0}
    assert groups(needs, 100) == [[TILES, LIGER_SIMPO, "kept", FULL]]
    assert groups(needs, 60) == [[TILES, LIGER_SIMPO, "kept"], [TILES, FULL]]
    assert groups(needs, 54) == [[TILES, LIGER_SIMPO, "kept"], [FULL]]
    assert groups({FULL: 50.0, "kept": 20.0}, 80) == [[FULL, "kept"]]
    assert groups({TILES: 5.0}, 1) == [[TILES]] and groups({}, 100) == []


class Process:
    """A way's process, which dies in its second turn if it is told to."""

    def __init__(self, way: str, _: Sizes, *, dying: str) -> None:
        self.way, self.dying, self.turns = way, dying, 0

    def ask(self, limit: float, do: str) -> dict[str, Any]:
        assert limit == loss_head.CPU_LIMIT and do == "time"
        self.turns += 1
        if self.way == self.dying and self.turns == 2:
            raise WorkerFailed("did not answer within 120 s\nthe log")
        return {"seconds": 2.0 if self.way == FULL else 1.0}

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_a_way_that_dies_in_its_turn_does_not_take_the_others_along() -> None:
    start: Any = partial(Process, dying=TILES)
    assert _turns(start, [TILES, FULL, "kept"], Sizes(10, 8, 256, "float32"), 3) == {
        TILES: {"failed": "WorkerFailed: did not answer within 120 s"},
        FULL: {"seconds": [2.0] * 3},
        "kept": {"seconds": [1.0] * 3},
    }


def test_the_table_names_wrong_failed_and_absent_ways_instead_of_their_times() -> None:
    ways: dict[str, Any] = {
        FULL: {"seconds": [0.2, 0.4], "times": 2.0, "beside": TILES, "extra_bytes": 2**30, "temporary_bytes": 2**20},
        TILES: {"wrong": "WRONG: dhead"},
        "tiles, triton": {"failed": "no kernel\nand details"},
        LIGER_SIMPO: {"left out": "liger-kernel is not installed"},
    }
    table = _table({100: ways})
    assert [row[1:4] for row in table.rows] == [
        (FULL, pytest.approx(300), "2 of tiles"),
        (TILES, "WRONG: dhead", ""),
        ("tiles, triton", "no kernel", ""),
    ]
    assert "Not timed here: Liger, SimPO (liger-kernel is not installed)." in table.note


def test_all_ways_get_the_same_numbers() -> None:
    sizes = Sizes(vocabulary=50, width=8, targets=256, dtype="float32")
    for first, second in zip(sizes.arrays(), sizes.arrays(), strict=True):
        assert (first == second).all()
    assert sizes.arrays()[2].max() < 50


@pytest.mark.slow
def test_memory_is_measured_by_a_process_that_found_the_program(tmp_path: Path) -> None:
    start = partial(loss_head._start, tmp_path)
    answer = loss_head._alone(start, TILES, Sizes(500, 64, 256, "float32"))
    assert answer["extra_bytes"] >= 0 and "memory unknown" not in answer
