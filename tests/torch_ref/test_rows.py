"""Rows against separate sequences, and the attention functions against each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jax_simpo.data.groups import Group, Response
from jax_simpo.data.rows import RowShape, build_rows
from tests.pairs import random_group
from tests.torch_ref.support import (
    FAMILIES,
    LAYOUTS,
    Groups,
    edited,
    gradients,
    lengths_of,
    make_policy,
    oracle_prompt_sums,
    oracle_sums,
    own_responses,
    some_groups,
    some_pairs,
    step_of,
    sums_of,
)
from torch_ref.attention import RowMask, dense_attention, flex_attention, sdpa_attention
from torch_ref.losses import response_sums

DATA = {"pairs": lambda: some_pairs(6), "groups": some_groups}


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_gradients_are_those_of_separate_sequences(family: str, layout: str, data: str) -> None:
    groups = DATA[data]()
    policy, lengths = make_policy(family, layout), lengths_of(groups)
    weights = torch.linspace(-1, 1, len(lengths))  # every response counts differently
    ours = sums_of(policy, step_of(groups, layout))
    ours_gradients = gradients(policy, (ours * weights).sum())
    oracle = oracle_sums(policy, groups)
    oracle_gradients = gradients(policy, (oracle * weights).sum())
    torch.testing.assert_close(ours / lengths, oracle / lengths, atol=1e-5, rtol=0)
    assert ours_gradients.keys() == oracle_gradients.keys()
    for name, oracle_gradient in oracle_gradients.items():
        distance = torch.linalg.norm(ours_gradients[name] - oracle_gradient) / torch.linalg.norm(oracle_gradient)
        assert distance < 1e-5, name


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_prompts_count_for_the_best_response_alone_and_responses_stay_as_they_are(layout: str, data: str) -> None:
    groups = DATA[data]()
    policy = make_policy("llama", layout)
    step = step_of(groups, layout, prompts=True)
    found, of_prompts = torch.zeros(len(step.lengths.ranks)), torch.zeros(len(groups.all))
    with torch.no_grad():
        for batch in step.micro_batches:
            responses = len(batch.response_length)
            sums = response_sums(policy(batch), batch.target_response, responses + len(batch.groups))
            found[own_responses(step, batch)], of_prompts[batch.groups] = sums[:responses], sums[responses:]
        oracle, oracle_of_prompts = oracle_sums(policy, groups), oracle_prompt_sums(policy, groups)
    torch.testing.assert_close(found, oracle, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(of_prompts, oracle_of_prompts, atol=1e-4, rtol=1e-5)
    best = [group.best for group in groups.all]
    assert step.chosen_tokens == sum(len(r.targets) + r.prompt_length - 1 for r in best)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_has_the_length_and_rank_of_every_response(layout: str) -> None:
    groups = some_groups()
    step = step_of(groups, layout)
    lengths, rankings = lengths_of(groups), [group.ranks for group in groups.all]
    assert step.rankings == rankings
    for batch in step.micro_batches:
        assert torch.equal(batch.response_length, lengths[own_responses(step, batch)])
        assert list(batch.rankings) == [rankings[number] for number in batch.groups.tolist()]


@pytest.mark.parametrize("layout", ["shared and packed", "packed", "stacked"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("data", DATA)
def test_no_other_response_moves_when_the_first_changes(family: str, layout: str, data: str) -> None:
    groups, rng = DATA[data](), np.random.default_rng(1)
    changed = Groups([edited(group, rng) for group in groups.all])
    policy = make_policy(family, layout)
    with torch.no_grad():
        before, after = (sums_of(policy, step_of(g, layout)) for g in (groups, changed))
    is_first = torch.tensor([place == 0 for group in groups.all for place, _ in enumerate(group.responses)])
    torch.testing.assert_close(after[~is_first], before[~is_first], atol=2e-5, rtol=0)
    assert (after - before)[is_first].abs().max() > 0.5


def test_a_recomputed_layer_gives_the_same_gradients() -> None:
    pairs, layout = some_pairs(4), "shared and packed"
    plain, recomputed = (make_policy("llama", layout, remat=remat) for remat in ("none", "full"))
    a, b = (gradients(p, sums_of(p, step_of(pairs, layout)).sum()) for p in (plain, recomputed))
    for name in a:
        torch.testing.assert_close(a[name], b[name])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_share_out_a_step_and_make_the_same_number_of_forwards(layout: str) -> None:
    pairs = some_pairs(5)
    shares = [step_of(pairs, layout, rank=rank, world=4, rows=1) for rank in range(4)]
    assert len({len(share.micro_batches) for share in shares}) == 1
    numbers = sorted(n for share in shares for batch in share.micro_batches for n in batch.groups.tolist())
    assert numbers == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_share_without_pairs_gives_zero_gradients_for_every_parameter(layout: str) -> None:
    policy = make_policy("llama", layout)
    empty = step_of(some_pairs(1), layout, rank=1, world=2, rows=1).micro_batches[0]
    assert not len(empty.groups) and not empty.rankings
    found = gradients(policy, policy(empty).sum())
    assert found.keys() == dict(policy.named_parameters()).keys()
    assert not any(gradient.any() for gradient in found.values())


# --- the functions

# On a CPU there is nothing to compile for; the formula is what is tested.
UNCOMPILED = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")


def _row() -> tuple[RowMask, torch.Tensor]:
    """A row with a pair, a deeper tree and padding, and one of padding alone."""
    tree = random_group(np.random.default_rng(4), 50, most=8, longest=30)
    groups = [*some_pairs(1, seed=3).all, tree]
    rows = build_rows([list(enumerate(groups)), []], RowShape(256, 512, 16), prefix_sharing=True)
    assert len(tree.responses) > 4
    key_end, positions = (torch.from_numpy(a.astype(np.int64)) for a in (rows.key_end, rows.positions))
    return RowMask(key_end, positions), key_end > 0


@UNCOMPILED
@pytest.mark.parametrize("window", [None, 7])
def test_sdpa_and_flex_are_dense(window: int | None) -> None:
    mask, seeing = _row()
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 256, 8, generator=rng) for _ in range(3))
    dense = dense_attention(q, k, v, mask.visible(window), 0.4).transpose(1, 2)
    sdpa = sdpa_attention(q, k, v, mask.sdpa_mask(window), 0.4).transpose(1, 2)
    flex = flex_attention(q, k, v, mask.block_mask(window), 0.4, None).transpose(1, 2)
    torch.testing.assert_close(sdpa[seeing], dense[seeing], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(flex, dense, atol=1e-6, rtol=1e-5)
    assert not dense[~seeing].any()


@UNCOMPILED
def test_query_heads_of_flex_share_keys_and_values_that_dense_is_given_copies_of() -> None:
    mask, _ = _row()
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 256, 8, generator=rng) for heads in (4, 2, 2))
    dense = dense_attention(q, *(x.repeat_interleave(2, dim=1) for x in (k, v)), mask.visible(7), 0.4)
    torch.testing.assert_close(flex_attention(q, k, v, mask.block_mask(7), 0.4, None), dense, atol=1e-6, rtol=1e-5)


@UNCOMPILED
def test_flex_caps_scores_as_dense_does() -> None:
    mask, _ = _row()
    rng = torch.Generator().manual_seed(0)
    q, k, v = (3 * torch.randn(2, 3, 256, 8, generator=rng) for _ in range(3))
    dense = dense_attention(q, k, v, mask.visible(7), 0.4, 2.0)
    torch.testing.assert_close(flex_attention(q, k, v, mask.block_mask(7), 0.4, 2.0), dense, atol=1e-6, rtol=1e-5)


def test_the_mask_is_that_of_its_definition() -> None:
    mask, _ = _row()
    end, at = mask.key_end[0].tolist(), mask.positions[0].tolist()
    visible = mask.visible(7)[0, 0]
    for q in range(0, 256, 3):
        for k in range(256):
            assert bool(visible[q, k]) == (k <= q < end[k] and at[q] - at[k] < 7), (q, k)


def test_one_response_may_be_a_prefix_of_the_other() -> None:
    chosen = some_pairs(1).all[0].best
    shorter = Response.after(chosen.prompt_length, chosen.ids[: chosen.prompt_length + 1])
    pairs = Groups([Group((chosen, shorter))])
    policy = make_policy("llama", "shared and packed")
    with torch.no_grad():
        ours = sums_of(policy, step_of(pairs, "shared and packed"))
        torch.testing.assert_close(ours, oracle_sums(policy, pairs), atol=1e-4, rtol=1e-5)
