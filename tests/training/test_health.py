"""A run says what is wrong with it while it trains, writes it down, reports it at its end, and can be silent."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from jax_simpo.run.health import read_findings
from jax_simpo.training import trainer
from tests.training.runs import config_of, run_printing, stop_after

# A rate at which the log-probs of everything collapse within a few steps.
SPOILT: dict[str, Any] = {"learning_rate": 1.0, "lr_scheduler_type": "constant", "max_steps": 10, "save_steps": 8}


def test_a_spoilt_run_is_told_of_in_words_and_a_killed_one_of_each_finding_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, output = config_of(tmp_path, **SPOILT), tmp_path / "run"
    console = Console(record=True, width=1000, file=StringIO())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(9, patch)
        trainer.train(config, console)
    before = read_findings(output)
    assert [finding.name for finding in before][:2] == ["learning-rate", "chosen-falls"]
    trainer.train(config, console)
    findings = read_findings(output)
    assert findings[: len(before)] == before
    during, summary = console.export_text().split("╭", 1)
    summary, page = " ".join(summary.split()), (output / "report.html").read_text(encoding="utf-8")
    for finding in findings:
        times = 2 if finding.step == 9 and finding in before else 1  # that step was taken twice
        assert during.count(f"warning: step {finding.step}: {finding.sentence}\n") == times
        assert finding.docs in summary and f'href="{finding.docs}"' in page


def test_a_run_that_goes_well_is_told_of_nothing(tmp_path: Path) -> None:
    records, printed = run_printing(config_of(tmp_path, max_steps=10, save_strategy="no"))
    assert records[-1]["loss"] < records[0]["loss"]
    assert "healthy-runs" not in printed and not (tmp_path / "run" / "findings.jsonl").exists()


def test_a_run_can_be_told_to_be_silent(tmp_path: Path) -> None:
    _, printed = run_printing(config_of(tmp_path, **{**SPOILT, "save_strategy": "no"}, health_checks=False))
    assert "healthy-runs" not in printed and not (tmp_path / "run" / "findings.jsonl").exists()
