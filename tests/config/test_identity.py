"""Which keys of a config may change when a run is resumed."""

from __future__ import annotations

import pytest

from jax_simpo.config import identity_of

CADENCE = (
    "logging_steps=7",
    "save_steps=9",
    "eval_steps=3",
    "output_dir=x",
    "attention=dense",
    "remat=none",
    "run_name=x",
)
ROWS = (
    "mesh.tensor=2",
    "rows_per_device=2",
    "row_length=256",
    "packing=false",
    "prefix_sharing=false",
    "logprob_chunk=8",
)


@pytest.mark.parametrize("override", CADENCE + ROWS)
def test_what_does_not_touch_the_mathematics_may_change_between_resumes(load, override):
    assert identity_of(load("", f"--{override}")) == identity_of(load())


@pytest.mark.parametrize(
    "override",
    [
        "chat_rendering=original",
        "special_tokens_in_messages=tokens",
        "beta=3",
        "learning_rate=2e-6",
        "seed=1",
        "max_length=2100",
        "dtype=float32",
        "dataset_mixer.x=1",
        "max_steps=9",
    ],
)
def test_what_touches_the_mathematics_makes_another_run(load, override):
    assert identity_of(load("", f"--{override}")) != identity_of(load())


def test_a_run_may_be_made_longer_only_where_its_past_would_be_the_same(load):
    def same(more: str) -> bool:
        return identity_of(load(more, "--max_steps=9")) == identity_of(load(more))

    assert same("lr_scheduler_type: constant")
    assert same("lr_scheduler_type: constant_with_warmup\nwarmup_steps: 5")
    assert not same("lr_scheduler_type: constant_with_warmup\nwarmup_ratio: 0.1")
    assert not same("lr_scheduler_type: cosine")


def test_new_keys_at_their_defaults_are_no_part_of_a_runs_identity(load):
    identity = identity_of(load(""))
    assert not {"optim", "adam_mu_dtype", "lr_scheduler_kwargs", "weight_column"} & set(identity)
    assert identity_of(load("optim: lion"))["optim"] == "lion"
