"""Checks the numbers that benchmarks count and draw: lengths, floating-point operations, ideals."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.dpo import dpo_table
from benchmarks.flops import attention_ideal, attention_layer_ideal, linear_ideal
from benchmarks.lengths import CUT, PROFILES, Profile, draw_lengths, profile_pairs
from benchmarks.models import MODELS, model_mapping
from benchmarks.timing import in_turns, speed_up, total_speed_up
from jax_simpo.data.groups import Group, GroupLengths, Response
from jax_simpo.data.rows import RowShape, build_rows
from jax_simpo.hf.config import read_model_config
from jax_simpo.plan.flops import layer_parameters, useful_flops, work_of


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_a_profile_has_the_stated_medians_and_cuts(profile: Profile) -> None:
    lengths = draw_lengths(profile, 20_000)
    medians = np.array([profile.prompt, profile.response, profile.response])
    assert profile.prompt + profile.response == pytest.approx(profile.length)
    assert profile.prompt / profile.response == pytest.approx(profile.ratio)
    np.testing.assert_allclose(np.median(lengths, axis=0), medians, rtol=0.02)
    assert (lengths.max(0) == np.round(CUT * medians)).all()
    assert lengths.min() >= 1
    spread = np.log(lengths).std(0)
    np.testing.assert_allclose(spread[medians > 50], 0.5, rtol=0.03)  # rounding blurs the shortest


def test_the_same_seed_draws_the_same_pairs() -> None:
    first, second = (profile_pairs(PROFILES["hh-rlhf"], 20, 100) for _ in range(2))
    for a, b in zip(first.all, second.all, strict=True):
        assert all((x.ids == y.ids).all() for x, y in zip(a.responses, b.responses, strict=True))


def test_pairs_of_a_profile_share_exactly_their_prompt() -> None:
    profile = PROFILES["tldr"]
    lengths = profile_pairs(profile, 200, vocabulary=7).lengths
    prompt, chosen, rejected = draw_lengths(profile, 200).T
    # The only token of a one-token response is no input, so the shorter sequence ends with the prompt.
    np.testing.assert_array_equal(lengths.row_tokens(False) - lengths.row_tokens(True), prompt)
    np.testing.assert_array_equal(lengths.targets.reshape(-1, 2), np.stack([chosen, rejected], axis=1))


@pytest.mark.parametrize(
    ("name", "ideal"),
    [
        ("capybara", 1.44),
        ("hh-rlhf", 1.52),
        ("metamath-dpo", 1.66),
        ("tldr", 1.85),
        ("tulu-helpsteer", 1.76),
        ("ultrafeedback", 1.17),
    ],
)
def test_ideals_are_those_of_the_papers_table(name: str, ideal: float) -> None:
    profile = PROFILES[name]
    assert linear_ideal(profile.prompt, profile.response) == pytest.approx(ideal, abs=0.006)


@pytest.mark.parametrize(("prefix", "response", "ideal"), [(1024, 1024, 1.33), (4096, 1024, 1.67), (16384, 64, 1.99)])
def test_linear_ideals_are_those_of_flash_preference(prefix: int, response: int, ideal: float) -> None:
    assert linear_ideal(prefix, response) == pytest.approx(ideal, abs=0.006)


def test_attention_s_ideal_is_its_ratio_of_visible_pairs() -> None:
    prefix, response = 4000, 1000
    ids = [np.array([1] * prefix + [own] * (response + 1), np.int32) for own in (2, 3)]
    lengths = GroupLengths.of([Group(tuple(Response.after(prefix, x) for x in ids))])
    counted = work_of(lengths, False).visible / work_of(lengths, True).visible
    assert attention_ideal(prefix, response) == pytest.approx(counted, rel=1e-3)


def test_flops_of_a_pair_counted_by_hand() -> None:
    # 3 prompt tokens, answers of 2 and 4; inputs are one shorter. Width 4, one head of 4, feed-forward 8, V 10.
    config = read_model_config(
        {
            "model_type": "llama",
            "vocab_size": 10,
            "hidden_size": 4,
            "intermediate_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
        }
    )
    ids = [np.array([1] * 3 + [own] * count, np.int32) for own, count in ((2, 2), (3, 4))]
    lengths = GroupLengths.of([Group(tuple(Response.after(3, x) for x in ids))])
    assert layer_parameters(config) == 4 * 4 * 4 + 3 * 4 * 8
    shared = work_of(lengths, True)
    # Tokens 3 + 1 + 3; visible keys: 1+2+3 in the prefix, 4 in one branch, 4+5+6 in the other.
    # The last prompt token predicts the first of both answers.
    assert (shared.tokens, shared.visible, shared.predictors) == (7, 6 + 4 + 15, 5)
    forward = 2 * (2 * 160 * 7 + 4 * 4 * 25) + 2 * 10 * 4 * 5
    assert useful_flops(config, shared) == 3 * forward
    separate = work_of(lengths, False)
    assert (separate.tokens, separate.visible, separate.predictors) == (10, 10 + 21, 6)


def test_states_that_predict_for_both_answers_are_counted_as_the_rows_have_them() -> None:
    answers = [
        [([1, 2, 3, 4], 2), ([1, 2, 5, 6, 7], 2)],  # a prompt in common
        [([1, 2, 3, 4, 5], 2), ([1, 2, 3, 4, 6], 2)],  # and two tokens of the answers
        [([1, 2, 3, 4, 5], 3), ([1, 2, 3, 4], 2)],  # cut at different places; one answer begins the other
        [([1, 2, 3], 2), ([4, 5, 6], 2)],  # nothing
    ]
    pairs = [Group(tuple(Response.after(prompt, np.array(ids)) for ids, prompt in responses)) for responses in answers]
    for sharing in (True, False):
        rows = build_rows([list(enumerate(pairs))], RowShape(64, 64, 8), prefix_sharing=sharing)
        real = rows.target_response[0] < 8
        assert work_of(GroupLengths.of(pairs), sharing).predictors == len(set(rows.target_index[0][real]))


def test_a_layer_s_ideal_lies_between_those_of_its_parts() -> None:
    config = read_model_config(model_mapping("mistral-7b", 1))
    for prefix, response in ((512, 128), (4096, 512), (16384, 2048)):
        parts = sorted((linear_ideal(prefix, response), attention_ideal(prefix, response)))
        assert parts[0] < attention_layer_ideal(config, prefix, response) < parts[1]


@pytest.mark.parametrize("name", MODELS)
def test_every_model_s_configuration_is_read(name: str) -> None:
    assert read_model_config(model_mapping(name, layers=3)).num_layers == 3


def test_contenders_take_turns_and_begin_in_turn() -> None:
    order: list[str] = []

    def run(name: str, number: int) -> float:
        order.append(f"{name}{number}")
        return 2.0 if name == "a" else 1.0 + number

    seconds = in_turns({name: lambda k, name=name: run(name, k) for name in "ab"}, 2)
    assert order == ["a0", "b0", "b1", "a1"]
    assert seconds == {"a": [2.0, 2.0], "b": [1.0, 2.0]}
    assert speed_up(seconds["a"], seconds["b"]) == 1.5
    assert total_speed_up(seconds["a"], seconds["b"]) == pytest.approx(4 / 3)


def test_the_reference_pass_is_added_to_an_epoch_of_dpo() -> None:
    measured = {
        "pairs": 8,
        "seconds": {"SimPO": [1.0, 1.0, 2.0], "DPO": [1.0, 1.25, 1.75]},
        "bytes": {"SimPO": 1000, "DPO": 1010},
        "reference_pass": {"pairs": 16, "seconds": [1.5, 2.5]},
    }
    simpo, dpo, with_pass = dpo_table({"some": measured}).rows
    assert simpo[2] == dpo[2] == 2.0  # pairs/s
    assert with_pass[2] == pytest.approx(16 / (16 / 2.0 + 2.0))
    assert dpo[3:5] == ("100.0 %", "80.0 % to 114.3 %")
    assert with_pass[3] == "80.0 %" and dpo[6] == "101.0 %"
