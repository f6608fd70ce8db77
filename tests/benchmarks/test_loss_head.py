"""The comparison of loss heads: a way that computes something else gets no time, one that is not here is named."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.loss_head import TOLERANCE, _checked, _table
from benchmarks.loss_head_sides import FULL, Sizes


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("shift", "is_wrong"), [(0.5, False), (2, True), (-2, True), (float("nan"), True)])
def test_a_way_is_wrong_if_its_log_prob_is_not_that_of_full_logits(dtype: str, shift: float, is_wrong: bool) -> None:
    result = {"logp": -11.76 + shift * TOLERANCE[dtype]}
    assert ("wrong" in _checked(result, {FULL: {"logp": -11.76}}, dtype)) == is_wrong


def test_the_table_names_wrong_failed_and_absent_ways_instead_of_their_times() -> None:
    ways: dict[str, Any] = {
        FULL: {"logp": -5.0, "seconds": [0.2, 0.4], "extra_bytes": 2**30, "temporary_bytes": 2**20},
        "tiles": _checked({"logp": -6.0, "extra_bytes": 0}, {FULL: {"logp": -5.0}}, "float32"),
        "tiles, triton": {"failed": "no kernel\nand details"},
        "Liger, SimPO": {"left out": "liger-kernel is not installed"},
    }
    table = _table({100: ways})
    assert [row[1:3] for row in table.rows] == [
        (FULL, pytest.approx(300)),
        ("tiles", "WRONG: a mean log-prob of -6, and full logits give -5"),
        ("tiles, triton", "no kernel"),
    ]
    assert "Not timed here: Liger, SimPO (liger-kernel is not installed)." in table.note


def test_all_ways_get_the_same_numbers() -> None:
    sizes = Sizes(vocabulary=50, width=8, targets=256, dtype="float32")
    for first, second in zip(sizes.arrays(), sizes.arrays(), strict=True):
        assert (first == second).all()
    assert sizes.arrays()[2].max() < 50
