"""`loss_head: auto` takes no kernel that is untried, wrong or slower than `xla`, and remembers what it saw."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest

from jax_simpo.errors import ConfigError
from jax_simpo.ops.attention.evidence import Distance, Speed, Verdict
from jax_simpo.ops.loss_head.evidence import HeadShape
from jax_simpo.training import loss_head, verdicts
from jax_simpo.training.loss_head import choose_loss_head
from tests.training.runs import config_of

SHAPE = HeadShape("bfloat16", 4096, 4096, 128256, None)
SPEED = Speed(0.01, 0.03, 500.0, 1 << 28)
XLA = Verdict("xla", None, {"its log-probs": Distance(1e-4, 1e-3)}, SPEED)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keeps the verdicts of each test apart."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "jax-simpo"


def choice_among(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *found: Verdict, **keys: Any) -> Any:
    """Chooses as if these verdicts had been found on this machine, where all of the backends can run."""
    names = [verdict.backend for verdict in found]

    def tried(asked: list[str], shape: HeadShape, device: jax.Device, *, timed: bool) -> list[Verdict]:
        assert asked == names
        return list(found)

    monkeypatch.setattr(verdicts, "of_loss_heads", tried)
    monkeypatch.setattr(loss_head, "candidates", lambda place, width: names)
    monkeypatch.setattr(loss_head, "choose", lambda name, place, width: ("xla" if name == "auto" else name, "why"))
    config = config_of(tmp_path).model_copy(update=keys)
    return choose_loss_head(config, SHAPE, jax.devices()[0])


def test_a_kernel_must_be_right_and_clearly_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seconds, chosen in ((0.0295, "xla"), (0.028, "triton")):
        kernel = Verdict("triton", None, {}, replace(SPEED, seconds=seconds))
        choice = choice_among(monkeypatch, tmp_path, XLA, kernel)
        assert (
            choice.backend == chosen and "triton 2" in choice.reason and "4096 states x 4096 x 128256" in choice.reason
        )
    choice = choice_among(monkeypatch, tmp_path, XLA, Verdict("triton", "gives NaN", {}))
    assert choice.backend == "xla" and choice.warnings == ["warning: loss head 'triton' is passed over: it gives NaN"]
    with pytest.raises(ConfigError, match=r"no backend computes right numbers on .* xla gives NaN; triton x"):
        choice_among(monkeypatch, tmp_path, replace(XLA, problem="gives NaN", speed=None), Verdict("triton", "x", {}))


def test_without_a_check_auto_is_xla(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Verdict("triton", None, {}, replace(SPEED, seconds=0.001))
    assert choice_among(monkeypatch, tmp_path, XLA, kernel, attention_check=False).backend == "xla"
    unchecked = {"loss_head": "triton", "attention_check": False}
    assert choice_among(monkeypatch, tmp_path, kernel, **unchecked).backend == "triton"


def test_a_named_kernel_that_is_wrong_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"`loss_head: triton` gives NaN.*Choose `loss_head: auto`"):
        choice_among(monkeypatch, tmp_path, Verdict("triton", "gives NaN", {}), loss_head="triton")
    right = replace(XLA, backend="triton", speed=None)
    assert choice_among(monkeypatch, tmp_path, right, loss_head="triton").reason.startswith("as configured, and right")


def test_a_kernel_that_cannot_run_here_is_refused_by_name(tmp_path: Path, own_cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"`loss_head: triton` needs an NVIDIA GPU, and this is a CPU.*: xla$"):
        choose_loss_head(config_of(tmp_path, loss_head="triton"), SHAPE, jax.devices()[0])
    assert choose_loss_head(config_of(tmp_path), SHAPE, jax.devices()[0]).backend == "xla" and not own_cache.exists()


def test_a_verdict_is_kept_until_the_shape_or_the_code_changes(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[HeadShape] = []

    def examine(name: str, shape: HeadShape, device: jax.Device, *, timed: bool) -> Verdict:
        tried.append(shape)
        return XLA

    monkeypatch.setattr(verdicts, "examine_head", examine)

    def verdict(shape: HeadShape = SHAPE) -> Verdict:
        return verdicts.of_loss_heads(["xla"], shape, jax.devices()[0])[0]

    assert verdict() == verdict() == XLA and len(tried) == 1
    verdict(replace(SHAPE, frozen=True))
    assert len(tried) == 2
    monkeypatch.setattr(verdicts, "_sources", lambda kind: "other")
    verdict()
    assert len(tried) == 3 and [folder.name for folder in own_cache.iterdir()] == ["loss_head"]
