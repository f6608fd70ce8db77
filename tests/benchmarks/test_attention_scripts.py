"""The rows, the counts and the verdicts of the benchmarks of attention."""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

from benchmarks import attention_check
from benchmarks.attention_check import MOST, Case, cases, distances, faults, verdict
from benchmarks.attention_speed import QUICK, QUICK_SCALE, _beside_flex, _take_turns
from benchmarks.attention_speed_sides import FLEX, LAYOUTS, PASSES, Shape
from benchmarks.cells import Cells
from benchmarks.flops import attention_layer_ideal, linear_ideal, part_flops
from benchmarks.lengths import PROFILES
from benchmarks.masks import Lengths, fill_row, live_area
from benchmarks.models import model_mapping
from benchmarks.workers import WorkerFailed
from jax_simpo.data.groups import Group, Response
from jax_simpo.data.rows import RowShape, build_rows
from jax_simpo.hf.config import read_model_config
from jax_simpo.ops.attention.oracle import RowMask

PAIRS: list[Lengths] = [(5, 3, 7), (2, 9, 1), (20, 1, 1)]


def group(prompt: int, chosen: int, rejected: int) -> Group:
    """Returns a pair whose inputs have these lengths. The last token of a sequence is no input."""
    ids = [np.array([1] * prompt + [own] * (count + 1), np.int32) for own, count in ((2, chosen), (3, rejected))]
    return Group(tuple(Response.after(prompt, x) for x in ids))


@pytest.mark.parametrize("shared", [True, False])
def test_rows_are_those_of_training(shared: bool) -> None:
    key_end, positions = fill_row(PAIRS, 100, shared=shared)
    groups = list(enumerate(group(*pair) for pair in PAIRS))
    trained = build_rows([groups], RowShape(100, 100, 6), prefix_sharing=shared)
    np.testing.assert_array_equal(key_end, trained.key_end[0])
    np.testing.assert_array_equal(positions[key_end > 0], trained.positions[0][key_end > 0])
    assert RowMask(key_end[None], positions[None]).room.sequences == 2 * len(PAIRS)


def test_a_pair_that_does_not_fit_is_left_out() -> None:
    key_end, _ = fill_row([PAIRS[2], *PAIRS], 50)  # 22, 15 and 12 tokens, and 22 for which there is no room
    assert (key_end > 0).sum() == 22 + 15 + 12


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_live_area_counts_every_query_and_key_that_see_each_other(layout: str) -> None:
    shape = Shape(layout, 64, **QUICK, scale=QUICK_SCALE)
    key_end, _ = shape.masks()
    index = np.arange(shape.length)
    visible = (index <= index[:, None]) & (index[:, None] < key_end[:, None, :])
    assert live_area(key_end) == visible.sum() > 0
    assert shape.flops("both") == PASSES["both"] * 64 * shape.heads * visible.sum()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("profile", PROFILES)
def test_rows_of_the_speed_measurement_are_well_filled(layout: str, profile: str) -> None:
    key_end, _ = Shape(layout, 128, profile=profile).masks()
    assert (key_end > 0).mean() > 0.8


class Side:
    """A side's process: a contender's seconds are its number in each round; it dies of a name."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds, self.asked = seconds, 0

    def ask(self, limit: float, contender: str, turn: bool) -> dict[str, Any]:
        self.asked += 1
        assert turn
        if contender == "dies":
            raise WorkerFailed("did not answer")
        return {"seconds": self.seconds[contender]}


def test_our_backends_are_set_beside_flex_attention_in_turns() -> None:
    shape = Shape("shared", 128, profile="tldr", **QUICK)
    sides: Any = {"jax": Side({"pallas": 1.0, "triton": 2.0}), "torch": Side({FLEX: 1.3})}
    measured = [{"attention": "jax", "contender": "matrix product"}]
    for name in ("pallas", "triton", "dies", "cudnn", FLEX):
        both = {"failed": "no memory"} if name == "cudnn" else {"seconds": [1.0]}
        side = "torch" if name == FLEX else "jax"
        measured.append({"attention": side, "contender": name, "passes": {**dict.fromkeys(PASSES), "both": both}})
    turns = _take_turns(Cells(None), shape, measured, sides)
    assert turns["pallas"] == {"seconds": [1.0] * 5} and turns["dies"]["failed"].endswith("did not answer")
    ours = ["pallas", "triton", "dies", "cudnn"]
    rows = _beside_flex({**asdict(shape), "ours": ours, "turns": turns})
    assert [row[3:] for row in rows] == [
        ("pallas", 1000.0, 1300.0, pytest.approx(1.3), 1.2, "yes"),
        ("triton", 2000.0, 1300.0, pytest.approx(0.65), 1.2, "no"),
        ("dies", "", "", "WorkerFailed: did not answer", 1.2, "not known"),
        ("cudnn", "", "", "did not run `both`", 1.2, "not known"),
    ]
    assert sides["torch"].asked == 5
    without = _beside_flex({**asdict(shape), "ours": ["pallas"], "turns": {"pallas": turns["pallas"]}})
    assert without[0][-3:] == ("FlexAttention did not run `both`", 1.2, "not known")


def test_the_bound_beside_flex_attention_is_higher_on_packed_pairs_that_share() -> None:
    results = {layout: {**asdict(Shape(layout, 64)), "ours": ["pallas"], "turns": {}} for layout in LAYOUTS}
    bounds = {layout: _beside_flex(result)[0][-2] for layout, result in results.items()}
    assert bounds == {**dict.fromkeys(LAYOUTS, 1.0), "shared": 1.2}


def test_flops_of_a_layer_s_parts_give_its_ideals() -> None:
    config = read_model_config(model_mapping("llama-3-8b", 1))
    separate, shared = (part_flops(config, "attention layer", 4000, 300, one) for one in (False, True))
    assert separate / shared == pytest.approx(attention_layer_ideal(config, 4000, 300))
    separate, shared = (part_flops(config, "mlp", 4000, 300, one) for one in (False, True))
    assert separate / shared == pytest.approx(linear_ideal(4000, 300))


def test_blockwise_is_near_to_dense_and_a_worse_result_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_check, "PAIRS", [[(50, 20, 10), (9, 9, 9)], [(70, 20, 30)]])
    monkeypatch.setattr(attention_check, "LENGTH", 120)
    case = Case("bfloat16", 64, window=40)
    result: dict[str, Any] = {"check": "blockwise", **case._asdict(), "distances": distances(case, "blockwise")}
    assert not faults(result) and verdict(result).startswith("ok")
    for worse in (1.6 * result["distances"]["dk"][1], math.nan):
        wrong = result | {"distances": result["distances"] | {"dk": (worse, result["distances"]["dk"][1])}}
        assert len(faults(wrong)) == 1 and verdict(wrong).startswith("FAILED")
    far = {name: (1.1 * MOST, MOST) for name in result["distances"]}  # no worse than dense, but both are far away
    assert len(faults(result | {"distances": far})) == len(far)


def test_the_cases_are_each_in_one_part() -> None:
    first, others = cases(True), cases(False)
    assert first == [Case("bfloat16", 128), Case("bfloat16", 64)]
    assert sorted(map(str, first + others)) == sorted(map(str, cases(None))) and not set(first) & set(others)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("torch") is None, reason="needs torch")
def test_flex_attention_never_runs_uncompiled() -> None:
    import torch
    import torch._dynamo

    from benchmarks.flex import compiled_flex

    def run(flex: Any, length: int) -> None:
        with torch.no_grad():
            flex(*(torch.ones(1, 1, length, 16) for _ in range(3)))

    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit), warnings.catch_warnings():
        flex = compiled_flex(backend="eager", shapes=2)
        run(flex, 16)
        run(flex, 32)
        with pytest.raises(Exception, match="fullgraph"):
            run(flex, 48)
        from torch.nn.attention.flex_attention import flex_attention

        with pytest.raises(UserWarning, match="unfused"):
            run(flex_attention, 16)
    torch._dynamo.reset()
