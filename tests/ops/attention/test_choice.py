"""Tests which backend a config's `attention` stands for on each kind of device."""

from __future__ import annotations

import dataclasses
from unittest.mock import create_autospec

import jax
import pytest

from jax_simpo.errors import ConfigError
from jax_simpo.ops.attention import choose, place_of
from jax_simpo.ops.attention.backends import Place
from jax_simpo.ops.attention.choice import candidates

CPU = Place("cpu", (0, 0), "float32", 64, False)
H100 = Place("gpu", (9, 0), "bfloat16", 128, False)
A100 = Place("gpu", (8, 0), "bfloat16", 128, False)
B200 = Place("gpu", (10, 0), "bfloat16", 128, False)
T4 = Place("gpu", (7, 5), "bfloat16", 128, False)
AMD = Place("gpu", (0, 0), "bfloat16", 128, False)
TPU = Place("tpu", (0, 0), "bfloat16", 128, False)


@pytest.mark.parametrize(
    ("place", "chosen", "why"),
    [
        (CPU, "blockwise", "auto on a CPU: fastest measured there"),
        (H100, "pallas", "auto on a Hopper GPU"),
        (dataclasses.replace(H100, head_dim=96), "cudnn", "pallas has kernels for heads of 64, 128, 256"),
        (dataclasses.replace(H100, head_dim=256, dtype="float32"), "banded", "64, 128 in float32"),
        (A100, "triton", "not measured yet"),
        (B200, "triton", "not measured yet"),
        (dataclasses.replace(A100, head_dim=96), "cudnn", "triton has kernels for heads of 64, 128, 256"),
        (dataclasses.replace(A100, head_dim=96, softcap=True), "banded", "cudnn cannot cap attention scores"),
        (T4, "banded", "triton needs an NVIDIA GPU of compute capability 8.0 (A100) or later"),
        (AMD, "banded", "cudnn needs an NVIDIA GPU of compute capability 8.0 (A100) or later"),
        (dataclasses.replace(TPU, dtype="float32"), "blockwise", "splash computes in bfloat16, and `dtype` is float32"),
    ],
)
def test_auto_takes_the_first_preference_that_can_run(place: Place, chosen: str, why: str) -> None:
    name, reason = choose("auto", place)
    assert name == chosen
    assert why in reason


@pytest.mark.parametrize("installed", [True, False])
def test_auto_on_a_tpu_is_splash_where_tokamax_is_installed(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jax_simpo.ops.attention.splash.find_spec", lambda name: object() if installed else None)
    name, why = choose("auto", TPU)
    assert name == ("splash" if installed else "blockwise")
    assert installed or "splash needs the package tokamax" in why


@pytest.mark.parametrize(
    ("name", "place", "message"),
    [
        (
            "splash",
            CPU,
            "`attention: splash` needs a TPU, and this is a CPU; choose auto .*: dense, blockwise, banded$",
        ),
        ("pallas", CPU, "`attention: pallas` needs a Hopper GPU"),
        ("pallas", A100, "needs a Hopper GPU .* and this is a GPU; .*: dense, blockwise, banded, triton, cudnn$"),
        ("cudnn", TPU, "`attention: cudnn` needs an NVIDIA GPU, and this is a TPU"),
        ("cudnn", dataclasses.replace(H100, softcap=True), "`attention: cudnn` cannot cap attention scores"),
    ],
)
def test_a_backend_that_cannot_run_here_is_an_error_with_the_choices(name: str, place: Place, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose(name, place)


@pytest.mark.parametrize("platform", ["gpu", "rocm"])
def test_an_amd_gpu_is_a_gpu_on_which_xla_alone_computes(platform: str) -> None:
    """jax calls AMD's devices "gpu", as NVIDIA's; "rocm" is its name for their platform."""
    device = create_autospec(jax.Device, instance=True, platform=platform, compute_capability="gfx942")
    place = place_of(device)
    assert place == AMD and place.kind == "GPU"
    assert list(candidates(place).reasons) == ["banded", "blockwise"]


def test_the_choice_knows_the_device_at_hand() -> None:
    if jax.default_backend() == "cpu":
        assert choose("auto", place_of())[0] == "blockwise"
        with pytest.raises(ConfigError, match="this is a CPU"):
            choose("pallas", place_of())
