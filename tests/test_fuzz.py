"""Whatever stands in a file of the user, the program answers with a result or with a line: coverage-guided."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SECONDS = 60
CONFIG = """model_name_or_path: m
dataset_mixer: {a.jsonl: 1.0, b: 0.5}
dataset_splits: [train, test]
objective: {dpo: 1.0, sft: 0.1}
learning_rate: 5e-7
mesh: {fsdp: -1}
lr_scheduler_kwargs: {min_lr_ratio: 0.1}
torch_dtype: bfloat16
"""
ROWS = """{"prompt": "Tea?", "chosen": "Yes.", "rejected": "No."}
{"prompt": [{"role": "user", "content": "Tea?"}], "responses": ["a", "b", "c"], "scores": [3, 2, 1]}
{"chosen": [{"role": "user", "content": [{"type": "text", "text": "Tea?"}]}, {"role": "assistant", "content": "Yes."}],
 "rejected": [{"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "No."}]}
{"instruction": "Tea?", "completions": [{"response": "a", "overall_score": 1}, {"response": "b", "overall_score": 2}]}
{"prompt": "Tea?", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}], "tools": []}
"""
LINES = [line for line in ROWS.replace("},\n ", "}, ").replace("],\n ", "], ").splitlines() if line]
CORPUS = {
    "config": [CONFIG],
    "override": ["learning_rate=1e-6", "mesh={fsdp: 4, tensor: 2}", "dataset_splits=[train]", "objective=dpo"],
    "rows": [*LINES, "\n".join(LINES)],
    "values": ["0123456789" * 20, "tea" * 100],
    "table": [f"[{', '.join(LINES)}]", f'{{"data": [{LINES[0]}]}}'],
}


@pytest.mark.slow
@pytest.mark.parametrize("target", CORPUS)
def test_any_text_gets_a_result_or_a_line(target: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="needs atheris: pip install atheris")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, text in enumerate(CORPUS[target]):
        (corpus / str(number)).write_text(text)
    flags = [f"-max_total_time={SECONDS}", "-timeout=20", "-rss_limit_mb=4000", "-max_len=4096"]
    command = [sys.executable, "-m", "tests.fuzz_child", target, str(corpus), *flags, f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    print(done.stderr[-1500:])
    assert done.returncode == 0, done.stderr[-6000:]
