"""The estimates of what a device's memory allows, held to what they must obey whatever their constants are."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from jax_simpo.config import TrainConfig
from jax_simpo.data.rows import RowShape
from jax_simpo.errors import ConfigError
from jax_simpo.hf.config import read_model_config
from jax_simpo.hf.lora_targets import choose_targets
from jax_simpo.models.lora import Lora
from jax_simpo.models.transformer import Model
from jax_simpo.training.capacity import check_fits, device_memory, logits_bytes, longest_row, most_rows
from tests.training.support import mesh_of

GIB = 1 << 30
# Of a size that is trained on one device; nothing here makes its arrays.
CONFIG = read_model_config(
    {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    }
)
MODEL = Model(CONFIG)
ADAPTED = Model(CONFIG, lora=Lora(16, 32, choose_targets(None, "llama")))
ONE = mesh_of((1, 1, 1))
MEMORIES = [0, GIB, 20 * GIB, 24 * GIB, 32 * GIB, 80 * GIB, 1 << 50]


def lengths(model: Model = MODEL, sizes: tuple[int, int, int] = (1, 1, 1), rows: int = 4) -> np.ndarray:
    """The longest rows of each of `MEMORIES`."""
    return np.array([longest_row(model, mesh_of(sizes), rows, memory) for memory in MEMORIES])


def logits(model: Model, mesh: object = ONE) -> np.ndarray:
    """The bytes for logits of each of `MEMORIES`."""
    return np.array([logits_bytes(model, mesh, memory) for memory in MEMORIES])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keys", "model", "message"),
    [
        ({}, MODEL, r"the model has 1,100,048,384 parameters: they alone take 4\.4 GB of a device, which has 3\.2 GB"),
        (
            {"use_peft": True, "lora_r": 1024},
            Model(CONFIG, lora=Lora(1024, 32, choose_targets(None, "llama"))),
            r"parameters, with an adapter of `lora_r` 1024: they alone take 5\.4 GB",
        ),
        (
            {"row_length": 1 << 21, "use_peft": True},
            ADAPTED,
            r"`rows_per_device` \(1\) rows of `row_length` \(2097152\) tokens: one hidden state of each takes 8\.6 GB",
        ),
        ({"rows_per_device": 512, "row_length": 4096, "use_peft": True}, ADAPTED, r"`rows_per_device` \(512\) rows of"),
    ],
)
def test_sizes_of_which_a_part_alone_is_more_than_the_memory_are_an_error(
    keys: dict[str, Any], model: Model, message: str
) -> None:
    config = TrainConfig(model_name_or_path="m", **keys)
    with pytest.raises(ConfigError, match=message):
        check_fits(config, model, ONE, 3 * GIB)
    check_fits(config, model, ONE, 16 * GIB)


def test_more_memory_never_gives_shorter_rows_and_neither_do_more_devices() -> None:
    found = lengths()
    assert (np.diff(found) >= 0).all() and len(set(found)) >= 4
    for sizes in [(1, 8, 1), (1, 1, 4)]:  # the rows of a device stay as many
        split = lengths(sizes=sizes)
        assert (split >= found).all() and (split > found).any()
    np.testing.assert_array_equal(lengths(sizes=(8, 1, 1)), found)  # along `data` nothing is split


def test_the_rows_of_a_device_share_its_memory() -> None:
    alone, many = lengths(rows=1), lengths(rows=8)
    limited = alone < alone.max()
    assert limited[many > 0].any()
    np.testing.assert_array_equal(many[limited], alone[limited] // 8)


def test_a_micro_batch_holds_the_rows_that_fit_and_its_logits_are_kept_where_those_of_a_row_are() -> None:
    shape, model = RowShape(2048, 1024, 8), replace(MODEL, dtype="float32")
    a_row = 4 * shape.targets * CONFIG.vocab_size
    for memory in MEMORIES:
        rows, in_tiles = (
            most_rows(model, ONE, shape, memory, keeps_logits=keeps_logits) for keeps_logits in (True, False)
        )
        assert 1 <= rows <= in_tiles
        assert in_tiles == 1 or in_tiles * shape.length * model.config.hidden_size * 4 * CONFIG.num_layers < memory
        if longest_row(model, ONE, 1, memory) < longest_row(model, ONE, 1, MEMORIES[-1]):  # memory is the limit
            assert in_tiles == max(1, longest_row(model, ONE, 1, memory) // shape.length)
        kept = logits_bytes(model, ONE, memory)
        assert rows * a_row <= kept if a_row <= kept else rows == in_tiles


def test_what_remat_keeps_shortens_rows() -> None:
    policies = ("full", "attention", "dots", "none")
    found = [lengths(replace(MODEL, remat=remat)) for remat in policies]  # type: ignore[arg-type]
    between = (found[0] > 0) & (found[-1] < found[-1].max())
    assert between.any()
    for keeps_less, keeps_more in pairwise(found):
        assert (keeps_less >= keeps_more).all() and (keeps_less[between] > keeps_more[between]).all()


def test_wider_numbers_shorten_rows() -> None:
    half, full = lengths(), lengths(replace(MODEL, dtype="float32"))
    assert (half >= full).all() and (half > full).any()


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 4, 2)])
def test_nothing_is_left_where_parameters_and_optimizer_state_do_not_fit(sizes: tuple[int, int, int]) -> None:
    # Master weights, gradients and two moments, all float32.
    state = 4 * 4 * MODEL.parameter_count // int(np.prod(sizes))
    mesh, model = mesh_of(sizes), replace(MODEL, dtype="float32")
    assert longest_row(MODEL, mesh, 1, state) == longest_row(MODEL, mesh, 1, 0) == 0
    assert logits_bytes(model, mesh, state) == logits_bytes(model, mesh, 0) == 0
    assert longest_row(MODEL, mesh, 1, 2 * state) > 0 and logits_bytes(model, mesh, 2 * state) > 0


@pytest.mark.parametrize("remat", ["full", "attention", "dots", "none"])
def test_the_layers_inputs_and_the_logits_fit_beside_parameters_and_optimizer_state(remat: str) -> None:
    model = replace(MODEL, dtype="float32", remat=remat)  # type: ignore[arg-type]
    state = 4 * 4 * model.parameter_count
    for memory, length in zip(MEMORIES, lengths(model), strict=True):
        kept = 4 * 4 * length * CONFIG.num_layers * CONFIG.hidden_size
        assert length == 0 or state + kept + logits_bytes(model, ONE, memory) < memory


def test_a_frozen_base_leaves_more_room() -> None:
    trained, frozen = lengths(), lengths(ADAPTED)
    assert (frozen >= trained).all() and (frozen > trained).sum() >= 2
    by_dtype = [(logits(replace(m, dtype="float32"))) for m in (MODEL, ADAPTED)]
    assert (by_dtype[1][1:] >= by_dtype[0][1:]).all() and (by_dtype[1] > by_dtype[0]).sum() >= 4


def test_logits_are_kept_unless_in_16_bits_on_a_cpu() -> None:
    assert not logits(MODEL).any()
    gpu = SimpleNamespace(shape=ONE.shape, devices=np.array([SimpleNamespace(platform="gpu")]))
    for found in (logits(MODEL, gpu), logits(replace(MODEL, dtype="float32"))):
        assert (np.diff(found) >= 0).all() and len(set(found)) >= 4
        assert (found <= MEMORIES).all()


def test_the_devices_of_a_cpu_share_its_memory_and_others_say_their_own() -> None:
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert host * 0.99 < device_memory(ONE) * len(jax.local_devices()) <= host
    device = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 80 * GIB})
    assert device_memory(SimpleNamespace(local_devices=[device])) == 80 * GIB  # type: ignore[arg-type]
