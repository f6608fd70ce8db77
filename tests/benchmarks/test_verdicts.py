"""Contenders that do not make the same step are wrong, and parity is judged in the dtype that a run is about."""

from __future__ import annotations

import math
from typing import Any

import pytest

from benchmarks import peers, throughput
from benchmarks.losses import TOLERANCE, disagreement
from benchmarks.parity_gpu import judged, verdict


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("shift", "is_wrong"), [(0.9, False), (-0.9, False), (1.1, True), (-1.1, True), (math.nan, True)]
)
def test_first_losses_may_be_as_far_apart_as_rounding_puts_them(dtype: str, shift: float, is_wrong: bool) -> None:
    told = disagreement({"a": 1.5, "b": 1.5 + shift * TOLERANCE[dtype]}, dtype)
    assert (told is not None) == is_wrong
    assert told is None or "a 1.5, b " in told


def test_peers_in_float32_are_held_to_float32_and_all_together_to_bfloat16() -> None:
    def wrong(**losses: float) -> list[str]:
        return peers._disagreements({name.replace("_", ", "): [{"loss": loss}] for name, loss in losses.items()})

    assert not wrong(TRL_float32=1.5, ours_float32=1.50001, ours_bfloat16=1.504)
    assert len(wrong(TRL_float32=1.5, ours_float32=1.5003, ours_bfloat16=1.504)) == 1
    assert len(wrong(TRL_float32=1.5, ours_bfloat16=1.506)) == 1
    assert len(wrong(TRL_bfloat16=1.5, ours_bfloat16=1.506)) == 1


def test_layouts_of_the_same_pairs_must_have_the_same_first_loss() -> None:
    def variants(**losses: float) -> dict[str, Any]:
        return {"some": {name.replace("_", "+"): {"first_loss": loss} for name, loss in losses.items()}}

    right = {"separate": 1.0, "shared": 1.0, "separate_packed": 2.0, "shared_packed": 2.0}
    assert not throughput._disagreements(variants(**right), "float32")
    assert not throughput._disagreements(variants(separate_packed=2.0, shared_packed=2.0), "float32")
    for name in right:
        assert len(throughput._disagreements(variants(**right | {name: right[name] + 1e-3}), "float32")) == 1


def report(caught: bool = True, **holds: bool) -> dict[str, Any]:
    def cell(dtype: str, held: bool, **others: Any) -> dict[str, Any]:
        figure = {"name": "gradients", "value": 2e-5, "bound": 1e-5, "holds": held}
        return {"backend": "jax, 1 device", "layout": "shared", "dtype": dtype, "figures": [figure], **others}

    cells = [cell(dtype, held, facts={"attention": "pallas"}) for dtype, held in holds.items()]
    cells += [cell(dtype, True) for dtype in holds]  # of all layouts together, which states no facts
    return {"cells": cells, "wrong variants": {"mask lost": {"caught": caught}}}


def test_parity_is_judged_by_the_figures_of_its_dtype() -> None:
    mixed = report(float32=False, bfloat16=True)
    assert judged(mixed, "bfloat16") == {"compared": 2, "attention": ["pallas"], "broken": []}
    assert judged(mixed, "float32")["broken"] == ["jax, 1 device, shared: gradients is 2e-05, at most 1e-05 is allowed"]
    assert verdict(judged(mixed, "float32")).startswith("BROKEN: jax, 1 device")
    assert verdict(judged(mixed, "bfloat16")) == "every bound holds (2 comparisons, attention pallas)"


def test_a_wrong_variant_that_is_not_caught_breaks_parity_in_float32() -> None:
    missed = report(caught=False, float32=True)
    assert judged(missed, "float32")["broken"] == ["the wrong variant 'mask lost' was not caught"]
    with pytest.raises(ValueError, match="nothing in bfloat16"):
        judged(missed, "bfloat16")
