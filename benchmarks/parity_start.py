"""Writes a start model, pairs and a config for `python -m parity`: `python -m benchmarks.parity_start FOLDER`.

The parity check runs its own tiny models on a CPU, but a user's checkpoint on the machine's GPUs. This model has heads
of 64, which FlexAttention and our GPU kernel take.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.contenders.job import Job
from benchmarks.facts import ROOT
from benchmarks.models import model_mapping
from jax_simpo.data.synthetic import make_rows

PAIRS = 30


def main(folder: Path) -> None:
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    # Parity's own models draw weights with 0.1 at a width of 64. At four times the width, half of it gives equal sums.
    narrow = {"hidden_size": 256, "intermediate_size": 896, "num_attention_heads": 4, "initializer_range": 0.05}
    mapping = {**model_mapping("small"), **narrow}
    job = Job(str(folder), mapping, "builtin:cafe", PAIRS, "cpu")
    job.save()
    subprocess.run([sys.executable, "-m", "benchmarks.contenders.start", str(job.file)], cwd=ROOT, check=True)
    job.rows.write_text("".join(json.dumps(row) + "\n" for row in make_rows("cafe", "train")[:PAIRS]))
    config = {
        "model_name_or_path": str(job.start),
        "tokenizer_name_or_path": job.tokenizer,
        "dataset_mixer": {str(job.rows): 1.0},
        "data_cache_dir": str(folder / "cache"),
        "auto_insert_empty_system_msg": False,
        "learning_rate": 1e-4,
        "logprob_chunk": 256,
        "row_length": 256,
        "max_length": 256,
    }
    (folder / "config.yaml").write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML


if __name__ == "__main__":
    main(Path(sys.argv[1]))
