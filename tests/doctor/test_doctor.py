"""`jax-simpo doctor`: what it prints, and that what is wrong on a chip changes its answer and its status."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from jax_simpo.cli import app
from jax_simpo.doctor import measure, report
from jax_simpo.ops.attention import dense
from jax_simpo.ops.loss_head import evidence
from jax_simpo.ops.loss_head.evidence import HeadShape
from tests.ops.attention.planted import PLANTED, plant


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures small things only, and keeps its verdicts apart."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    small = replace(report._SMALL, heads=2, kv_heads=1, head_dim=16, row_length=256, remainder=0)
    monkeypatch.setattr(report, "_SMALL", small)
    monkeypatch.setattr(report, "_SMALL_HEAD", HeadShape("float32", 64, 32, 500, None))
    for name, value in (("_TARGETS", 60), ("_COUNTS", (60, 41)), ("_LENGTH", 70), ("_VOCABULARY", 300)):
        monkeypatch.setattr(evidence, name, value)
    monkeypatch.setitem(measure._SIZES, "cpu", 128)
    monkeypatch.setitem(measure._COPY_BYTES, "cpu", 1 << 16)


def doctor(*arguments: str) -> tuple[int, str]:
    answer = CliRunner(env={"COLUMNS": "1000"}).invoke(app, ["doctor", *arguments])
    assert answer.exception is None or isinstance(answer.exception, SystemExit), answer.output
    return answer.exit_code, answer.stdout


def test_a_sound_cpu(tmp_path: Path) -> None:
    status, printed = doctor()
    assert status == 0 and "nothing to mend" in printed
    assert "blockwise  right" in printed and "splash cannot run here: it needs a TPU" in printed
    assert "attention: blockwise (auto: the fastest right one on cpu" in printed and "loss head: xla (auto" in printed
    # What was seen is kept for runs.
    kept = {path.name.split("-")[0] for path in (tmp_path / "home/jax-simpo/attention").iterdir()}
    assert kept == {"dense", "blockwise", "banded"}


def test_planted_faults_are_named_and_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "wrong_mask", "nan", "crash")
    status, printed = doctor("--json")
    examination = json.loads(printed)
    assert status == 0 and examination["healthy"] and examination["chosen"] == "dense"
    texts = " ".join(finding["text"] for finding in examination["findings"])
    for name, problem in (("wrong_mask", "is wrong"), ("nan", "gives NaN"), ("crash", "fails: NotImplementedError")):
        assert f"attention: {name} {problem}" in texts


def test_variants_of_a_backend_are_tried_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "VARIANTS", {"nan": replace(dense.BACKEND, attend=PLANTED["nan"])}, raising=False)
    status, printed = doctor()
    assert status == 0
    assert re.search(r"^dense +right", printed, re.MULTILINE)
    assert re.search(r"^dense\+nan +not to be used", printed, re.MULTILINE)
    assert "warning: attention: dense+nan gives NaN" in printed


def test_a_machine_without_a_right_backend_ends_with_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "nan")
    monkeypatch.setattr(report, "candidates", lambda place: type("C", (), {"reasons": {"nan": ""}})())
    status, printed = doctor()
    assert status == 1 and "no backend computes right numbers on cpu" in printed


def test_the_shapes_are_those_of_the_config(tmp_path: Path) -> None:
    model = {
        "model_type": "gemma2",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 64,
        "sliding_window": 128,
    }
    file = tmp_path / "config.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "model_config": model,
                "tokenizer_name_or_path": "builtin:cafe",
                "dataset_mixer": {"builtin:cafe": 1.0},
                "row_length": 1024,
            }
        )
    )
    status, printed = doctor(str(file), "--dtype=float32", "--json")
    examination = json.loads(printed)
    shape = examination["shape"]
    assert status == 0 and examination["shortened"].startswith("shortened for a CPU from 1 x 1024 tokens")
    assert (shape["heads"], shape["kv_heads"], shape["head_dim"], shape["row_length"]) == (4, 2, 16, 256)
    assert shape["windows"] == [128, None] and shape["softcap"] == 50.0 and shape["scale"] == 0.125


def test_a_platform_that_is_not_here_is_told_without_a_traceback() -> None:
    command = [sys.executable, "-m", "jax_simpo", "doctor"]
    ended = subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": "cuda"}, capture_output=True, text=True)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert "error: JAX cannot use its devices" in ended.stderr and "JAX_PLATFORMS is cuda" in ended.stderr


def test_overrides_without_a_config_are_refused() -> None:
    answer = CliRunner().invoke(app, ["doctor", "--beta=2"])
    assert "--beta=2" in str(answer.exception) and answer.exit_code == 1


def test_a_wrong_loss_head_ends_with_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "target_logps", lambda *_, **__: 1 / 0)
    status, printed = doctor()
    assert status == 1 and "error: loss head: xla fails: ZeroDivisionError" in printed
    assert "`loss_head: auto`: no backend computes right numbers on cpu" in printed
