"""The training step: layout, packing and mesh never show in a number. Also checks the programs it compiles to."""

from __future__ import annotations

import itertools
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_simpo.data.groups import Group, Response
from jax_simpo.data.loader import build_step
from jax_simpo.data.packing import grow_micro_batches
from jax_simpo.models.policy import Forward
from jax_simpo.objectives import DPO, Objective, SimPO
from jax_simpo.objectives.orpo import ORPO
from jax_simpo.plan.hlo import Collective, collectives
from jax_simpo.sharding import named
from jax_simpo.training.evaluate import evaluation_metrics, score_groups
from jax_simpo.training.optim import run_optimizer
from jax_simpo.training.step import (
    Accumulated,
    Denominators,
    accumulate_step,
    make_train_functions,
)
from tests.pairs import random_group
from tests.training.support import (
    MESHES,
    OBJECTIVE,
    OPTIMIZER,
    VOCABULARY,
    History,
    Pairs,
    edited,
    fresh_params,
    mesh_of,
    plan_of,
    run_steps,
    score_function,
    shared_optimizer,
    some_pairs,
    tiny_model,
    train_functions,
)

LAYOUTS = [*itertools.product((True, False), repeat=2)]
STEPS, BATCH = 20, 16


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return some_pairs(40)


@pytest.fixture(scope="module")
def reference(pairs: Pairs) -> History:
    """Twenty steps on one device, shared and packed."""
    return run_steps(pairs, steps=STEPS, batch=BATCH, mesh=mesh_of((1, 1, 1)))


# Meshes and layouts that the parity check runs as many steps on, in CI too, are marked as slow.


@pytest.mark.parametrize(
    "mesh", [pytest.param("fsdp=8", marks=pytest.mark.slow), "fsdp=4 x tensor=2", "data=2 x fsdp=4"]
)
def test_twenty_steps_give_the_same_losses_on_every_mesh(mesh: str, pairs: Pairs, reference: History) -> None:
    history = run_steps(pairs, steps=STEPS, batch=BATCH, mesh=mesh_of(MESHES[mesh]))
    np.testing.assert_allclose(history.values("loss"), reference.values("loss"), atol=1e-5)
    np.testing.assert_allclose(history.values("grad_norm"), reference.values("grad_norm"), rtol=1e-4)
    assert reference.values("loss")[-1] < 0.7 * reference.values("loss")[0]


@pytest.mark.parametrize(
    ("sharing", "packing"),
    [(False, True), *(pytest.param(sharing, False, marks=pytest.mark.slow) for sharing in (True, False))],
)
def test_twenty_steps_give_the_same_losses_in_every_layout(
    sharing: bool, packing: bool, pairs: Pairs, reference: History
) -> None:
    history = run_steps(pairs, steps=STEPS, batch=BATCH, mesh=mesh_of((1, 1, 1)), sharing=sharing, packing=packing)
    np.testing.assert_allclose(history.values("loss"), reference.values("loss"), atol=2e-5)


def test_steps_give_the_same_losses_in_micro_batches_of_any_number_of_rows(pairs: Pairs, reference: History) -> None:
    mesh = mesh_of((1, 1, 1))
    grown = grow_micro_batches(plan_of(pairs, mesh, batch=BATCH), 1, most=64)
    assert grown.rows_per_micro_batch > 2 and grown.step(0).micro_batches == 1
    for rows in (2, grown.rows_per_micro_batch):
        history = run_steps(pairs, steps=4, batch=BATCH, mesh=mesh, rows=rows)
        np.testing.assert_allclose(history.values("loss"), reference.values("loss")[:4], rtol=1e-6)
        np.testing.assert_allclose(history.values("grad_norm"), reference.values("grad_norm")[:4], rtol=1e-5)


def test_groups_of_mixed_size_give_the_same_losses_on_a_mesh_and_in_every_layout() -> None:
    rng = np.random.default_rng(5)
    groups = Pairs([random_group(rng, VOCABULARY, most=5, longest=40) for _ in range(20)])
    assert len({len(group.responses) for group in groups.all}) > 2
    # The loss is divided by the comparisons of the whole step, which no row and no device knows.
    objective = SimPO(beta=2.0, gamma_beta_ratio=0.5, sft_weight=0.1, compare_weights="rank", mean_over="pairs")
    settings = {"steps": 4, "batch": 7, "objective": objective}
    reference = run_steps(groups, mesh=mesh_of((1, 1, 1)), **settings)
    others = {
        "mesh": run_steps(groups, mesh=mesh_of(MESHES["data=2 x fsdp=4"]), **settings),
        "separate": run_steps(groups, mesh=mesh_of((1, 1, 1)), sharing=False, packing=False, **settings),
    }
    for name, history in others.items():
        for metric in objective.metrics:
            theirs = reference.values(metric)
            np.testing.assert_allclose(history.values(metric), theirs, atol=2e-5, err_msg=f"{name}: {metric}")


@pytest.mark.parametrize(("sharing", "packing"), LAYOUTS)
@pytest.mark.parametrize("rank", [0, 1])
def test_no_log_prob_of_one_response_moves_when_the_other_changes(rank: int, sharing: bool, packing: bool) -> None:
    before, mesh, model = some_pairs(12, seed=3), mesh_of((1, 1, 1)), tiny_model()
    rng = np.random.default_rng(4)
    after = Pairs([edited(pair, rank, rng) for pair in before.all])
    with jax.set_mesh(mesh):
        params = fresh_params(model, mesh)
        score = score_function(Forward(model, "blockwise", 64), mesh)
        # Lengths and shared prefixes are the same, so both sit in the same rows.
        plan = plan_of(before, mesh, batch=12, sharing=sharing, packing=packing)
        old, new = (score_groups(score, params, plan, p, mesh) for p in (before, after))
    sums = [s.sums.reshape(-1, 2).T for s in (old, new)]
    np.testing.assert_array_equal(sums[0][1 - rank], sums[1][1 - rank])
    assert (np.abs(sums[0][rank] - sums[1][rank]) > 0.01).mean() > 0.8


def test_the_sft_term_is_divided_by_the_chosen_tokens_of_the_whole_step(pairs: Pairs) -> None:
    objective = SimPO(beta=2.0, gamma_beta_ratio=0.5, sft_weight=0.3)
    mesh, model = mesh_of((1, 1, 1)), tiny_model()
    record = run_steps(pairs, steps=1, batch=BATCH, mesh=mesh, objective=objective).records[0]
    with jax.set_mesh(mesh):
        params = fresh_params(model, mesh)
        plan = plan_of(pairs, mesh, batch=BATCH)
        scores = score_groups(score_function(Forward(model, "dense", 64), mesh), params, plan, pairs, mesh)
    step = plan.groups(0)
    best = scores.lengths.starts[step]
    cross_entropy = -scores.sums[best].sum() / scores.lengths.targets[best].sum()
    preference = float(scores.of_groups(step).terms(objective).loss.mean())
    assert record["sft_loss"] == pytest.approx(cross_entropy, abs=1e-5)
    assert record["loss"] == pytest.approx(preference + 0.3 * cross_entropy, abs=1e-5)


@pytest.mark.parametrize(("sharing", "packing"), [(True, True), (False, False)])
def test_the_sft_term_may_be_over_prompts_too_in_steps_and_evaluations(
    sharing: bool, packing: bool, pairs: Pairs
) -> None:
    objective = ORPO(beta=0.1, sft_weight=1.0, sft_over="prompt_and_response")
    mesh, model = mesh_of((1, 1, 1)), tiny_model()
    plan = plan_of(pairs, mesh, batch=BATCH, sharing=sharing, packing=packing, prompt_targets=True)
    with jax.set_mesh(mesh):
        params = fresh_params(model, mesh)
        functions = train_functions(Forward(model, "dense", 64), objective, shared_optimizer(), mesh)
        step = build_step(plan, pairs, 0)
        record = accumulate_step(functions, params, step).metrics
        score = score_function(Forward(model, "dense", 64), mesh, prompts=True)
        scores = score_groups(score, params, replace(plan, seed=None), pairs, mesh).of_groups(step.groups)
    # The oracle: the chosen sequences alone, as rows of one response whose prompt is their first token.
    whole = Pairs([Group(tuple(Response.after(1, r.ids) for r in pair.responses)) for pair in pairs.all])
    with jax.set_mesh(mesh):
        plain = score_function(Forward(model, "dense", 64), mesh)
        oracle = score_groups(plain, params, replace(plan_of(whole, mesh, batch=BATCH), seed=None), whole, mesh)
    oracle = oracle.of_groups(step.groups)
    expected = -oracle.sums[::2].sum() / oracle.lengths.targets[::2].sum()
    assert float(record["sft_loss"]) == pytest.approx(expected, rel=1e-6)
    assert evaluation_metrics(scores, objective)["sft_loss"] == pytest.approx(expected, rel=1e-6)
    assert evaluation_metrics(scores, objective)["loss"] == pytest.approx(float(record["loss"]), rel=1e-6)
    assert scores.prompt_lengths.min() > 0


def test_empty_rows_add_nothing(pairs: Pairs) -> None:
    mesh = mesh_of((1, 8, 1))
    plan = plan_of(pairs, mesh, batch=2)
    step = build_step(plan, pairs, 0)
    assert sum(not rows.key_end.any() for b in step.micro_batches for rows in (b.rows(i, i + 1) for i in range(8))) >= 6
    alone = run_steps(pairs, steps=2, batch=2, mesh=mesh_of((1, 1, 1)))
    spread = run_steps(pairs, steps=2, batch=2, mesh=mesh)
    np.testing.assert_allclose(alone.values("loss"), spread.values("loss"), atol=1e-5)
    assert np.isfinite(alone.values("grad_norm")).all()


def test_a_run_of_varying_packs_compiles_two_programs(pairs: Pairs) -> None:
    plan = plan_of(pairs, mesh_of((1, 1, 1)), batch=7)
    steps = [build_step(plan, pairs, k) for k in range(plan.steps_per_epoch)]
    assert len({len(step.micro_batches) for step in steps}) > 1 and len({len(step.groups) for step in steps}) > 1
    # An optimizer of its own, so that no other test's programs are counted.
    optimizer = run_optimizer(OPTIMIZER, len(steps))[1]
    history = run_steps(pairs, steps=len(steps), batch=7, mesh=mesh_of((1, 1, 1)), optimizer=optimizer)
    assert history.programs == 2  # a micro-batch, whether its step has one or several, and the update


def test_a_step_of_one_micro_batch_gives_the_same_without_a_sum(pairs: Pairs) -> None:
    mesh, model = mesh_of((1, 1, 1)), tiny_model()
    step = build_step(plan_of(pairs, mesh, batch=2), pairs, 0)
    assert len(step.micro_batches) == 1
    with jax.set_mesh(mesh):
        params = fresh_params(model, mesh)
        settings = (Forward(model, "blockwise", 64), OBJECTIVE, optax.sgd(1.0), mesh)
        ways = [make_train_functions(*settings, accumulates=accumulates) for accumulates in (False, True)]
        alone, summed = (accumulate_step(functions, params, step) for functions in ways)
    assert float(optax.tree.norm(alone.gradients)) > 0
    # XLA fuses the two programs differently, so sums are rounded differently.
    chex.assert_trees_all_close(alone, summed, atol=1e-6)


def test_keeping_the_logits_changes_no_number(pairs: Pairs, reference: History) -> None:
    history = run_steps(pairs, steps=3, batch=BATCH, mesh=mesh_of((1, 1, 1)), logits_bytes=1 << 30)
    np.testing.assert_allclose(history.values("loss"), reference.values("loss")[:3], rtol=1e-6)
    np.testing.assert_allclose(history.values("grad_norm"), reference.values("grad_norm")[:3], rtol=1e-5)


def test_all_gradients_are_those_of_the_dense_oracle_on_separate_unpacked_rows(pairs: Pairs) -> None:
    # One step of plain gradient descent: the change of the parameters is the gradient.
    settings = {"steps": 1, "batch": BATCH, "optimizer": optax.sgd(1.0), "mesh": mesh_of((1, 1, 1))}
    oracle = run_steps(pairs, **settings, sharing=False, packing=False, attention="dense")
    history = run_steps(pairs, **settings)
    chex.assert_trees_all_close(history.params, oracle.params, atol=2e-6)


# --- the compiled step

LAYERS, WIDTH, INNER, BIG_VOCABULARY, LENGTH, TARGETS = 4, 128, 384, 8192, 256, 1024


def compiled_step(  # type: ignore[no-untyped-def]
    sizes: tuple[int, int, int],
    tied: bool,
    dtype: str = "float32",
    layers: int = LAYERS,
    vocabulary: int = BIG_VOCABULARY,
    chunk: int = 128,
    objective: Objective = OBJECTIVE,
):
    """Compiles the gradient step of a small model with a large vocabulary for a mesh."""
    mesh = mesh_of(sizes)
    model = tiny_model(
        dtype,
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        tie_word_embeddings=tied,
    )
    functions = make_train_functions(Forward(model, "blockwise", chunk), objective, optax.adamw(1e-3), mesh)
    widths = {"tokens": LENGTH, "positions": LENGTH, "key_end": LENGTH, "response_group": 8, "response_rank": 8}
    widths |= {f"target_{name}": TARGETS for name in ("index", "token", "response")}
    rows = {
        name: jax.ShapeDtypeStruct((sizes[0] * sizes[1], width), jnp.int32, sharding=named(mesh, "batch", None))
        for name, width in widths.items()
    }
    if objective.needs_reference:
        rows["reference_sum"] = jax.ShapeDtypeStruct(
            (sizes[0] * sizes[1], 8), jnp.float32, sharding=named(mesh, "batch", None)
        )
    with jax.set_mesh(mesh):
        params = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            model.abstract,
            model.shardings(mesh),
        )
        scalar = jnp.ones(())
        metrics = dict.fromkeys(objective.metrics, scalar)
        lowered = functions.accumulate.lower(params, Accumulated(params, metrics), rows, Denominators(scalar, scalar))  # type: ignore[attr-defined]
        return lowered.compile()


@pytest.fixture(scope="module", params=[((1, 8, 1), True), ((1, 4, 2), False)], ids=["fsdp-tied", "tensor-untied"])
def compiled(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    sizes, tied = request.param
    program = compiled_step(sizes, tied)
    return program, collectives(program.as_text()), sizes


def of_shape(step_collectives: list[Collective], kind: str, shape: tuple[int, ...]) -> list[Collective]:
    return [c for c in step_collectives if c.kind == kind and shape in c.shapes]


def test_layer_parameters_are_gathered_once_per_pass_for_both_responses(compiled) -> None:  # type: ignore[no-untyped-def]
    _, step_collectives, (_, _, tensor) = compiled
    for shape in [(WIDTH, INNER // tensor), (INNER // tensor, WIDTH)]:
        gathers = of_shape(step_collectives, "all-gather", shape)
        count = 2 if shape[0] == WIDTH else 1  # gate and up have one shape, down the other
        assert sum(c.times for c in gathers) == 2 * LAYERS * count  # one forward, one backward


def test_the_loss_head_is_gathered_once_per_pass_and_its_gradient_scattered_once(compiled) -> None:  # type: ignore[no-untyped-def]
    _, step_collectives, (_, fsdp, tensor) = compiled
    gathers = of_shape(step_collectives, "all-gather", (BIG_VOCABULARY // tensor, WIDTH))
    assert 1 <= sum(c.times for c in gathers) <= 2
    scatters = of_shape(step_collectives, "reduce-scatter", (BIG_VOCABULARY // tensor, WIDTH // fsdp))
    assert sum(c.times for c in scatters) == 1
    # Nothing of the head's size, whole or in part, is reduced in a loop over chunks.
    in_loops = [
        c for c in step_collectives if c.times > 1 and any(BIG_VOCABULARY // tensor in shape for shape in c.shapes)
    ]
    assert in_loops == []


def test_no_activations_travel_over_fsdp_but_the_embeddings_own(compiled) -> None:  # type: ignore[no-untyped-def]
    _, step_collectives, (_, _, tensor) = compiled
    hidden = [c for c in step_collectives if any(len(s) == 3 and s[1] == LENGTH for s in c.shapes)]
    if tensor == 1:
        assert {c.kind for c in hidden} == {"all-to-all"} and sum(c.times for c in hidden) == 2
    else:  # tensor parallelism sums each block's output; nothing is gathered
        assert {c.kind for c in hidden} <= {"all-to-all", "all-reduce"}


def test_the_log_sum_exp_is_reduced_once_per_pass_and_only_over_several_devices(compiled) -> None:  # type: ignore[no-untyped-def]
    _, step_collectives, (_, _, tensor) = compiled
    # Maxima and sums of all states, and the logits of their targets in a device's row.
    sums = [
        c for c in step_collectives if c.kind == "all-reduce" and any(s in ((TARGETS,), (1, TARGETS)) for s in c.shapes)
    ]
    assert {c.times for c in sums} <= {1}
    assert sum(len(c.shapes) for c in sums) == (3 if tensor > 1 else 0)


def test_no_array_of_targets_by_vocabulary_is_alive(compiled) -> None:  # type: ignore[no-untyped-def]
    program, _, (_, _, tensor) = compiled
    assert program.memory_analysis().temp_size_in_bytes < 4 * TARGETS * BIG_VOCABULARY // tensor


def test_a_step_with_a_reference_takes_the_memory_of_one_without(compiled) -> None:  # type: ignore[no-untyped-def]
    program, _, sizes = compiled
    if sizes[2] == 1:
        pytest.skip("one mesh is enough")
    with_reference = compiled_step(sizes, False, objective=DPO(beta=0.1))
    ours, plain = (
        m.temp_size_in_bytes + m.argument_size_in_bytes + m.output_size_in_bytes
        for m in (with_reference.memory_analysis(), program.memory_analysis())
    )
    print(f"{ours:,} bytes with a reference, {plain:,} without: {ours / plain:.4f}")
    assert abs(ours / plain - 1) < 0.02


def test_no_copy_of_the_layers_or_second_float32_copy_of_the_head_is_alive_in_bfloat16() -> None:
    """Measures how the temporaries of a step grow with the layers and the vocabulary; float32 masters are arguments."""

    def temporaries(**changes: int) -> int:
        program = compiled_step((1, 1, 1), False, "bfloat16", chunk=16, **changes)  # type: ignore[arg-type]
        return int(program.memory_analysis().temp_size_in_bytes)

    def layer_bytes(count: int) -> int:
        model = tiny_model(hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=count)
        return 4 * model.parameter_count

    least = temporaries()
    layer, head = layer_bytes(2) - layer_bytes(1), 4 * BIG_VOCABULARY * WIDTH
    # A layer's gradients, and its input, which is a sixth of that in float32; a copy would be a half more in bfloat16.
    assert 0 < temporaries(layers=2 * LAYERS) - least < 1.4 * layer * LAYERS
    # The head in bfloat16, the sum of its gradients, a chunk's, and the chunk's logits.
    assert 0 < temporaries(vocabulary=2 * BIG_VOCABULARY) - least < 2.8 * head
