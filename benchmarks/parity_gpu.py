"""Do jax-simpo and torch_ref compute the same numbers on this machine's GPU, with the attention that each takes there?

The parity check runs its own tiny models on a CPU, but a user's checkpoint on the machine's GPUs. This script writes
such a checkpoint, of a model with heads of 64, which FlexAttention and our GPU kernel take, and 30 pairs; then it runs
`python -m parity` on them and keeps its reports.

Expected: every bound holds. On a CPU the final weights of a few tensors are 1.2e-4 to 1.6e-4 of their way apart where
1.1e-4 is allowed, because AdamW moves a weight whose gradient is mere rounding as far as any other; the exit status is
then 3.

Takes about two minutes on two CPU cores with `--quick`. On a GPU it has not run yet.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from benchmarks.cells import CELLS_HELP, WRONG, Cells, failed
from benchmarks.contenders.job import Job
from benchmarks.facts import ROOT
from benchmarks.models import model_mapping
from benchmarks.options import Option, run
from jax_simpo.data.synthetic import make_rows

PAIRS = 30


def main(
    output: Annotated[Path, Option("Folder for the results.")] = Path("docs/benchmarks"),
    name: Annotated[str, Option("Stem of the files.")] = "parity",
    cells: Annotated[Path | None, Option(CELLS_HELP)] = None,
    quick: Annotated[bool, Option("float32 alone, fewer models.")] = False,
) -> None:
    """Compares both sides and keeps the reports."""
    data = Cells(cells).measure({"parity": PAIRS, "quick": quick}, partial(_compare, output, name, quick), always=True)
    if failed(data):
        sys.exit(data.get("details", data["failed"]))
    print(data["verdict"], flush=True)
    sys.exit(WRONG if data["status"] else 0)


def _compare(output: Path, name: str, quick: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        write_start(folder)
        command = [sys.executable, "-m", "parity", str(folder / "config.yaml"), "--output", work]
        with subprocess.Popen(
            [*command, *(["--quick"] if quick else [])],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            lines = []
            for line in process.stdout:  # what is broken is shown at once
                print(line, end="", flush=True)
                lines.append(line.rstrip())
        if process.returncode not in (0, 1) or not (folder / "report.html").exists():
            raise RuntimeError(
                f"python -m parity ended with status {process.returncode} and no report; the lines above say why"
            )
        output.mkdir(parents=True, exist_ok=True)
        for kind in ("md", "json", "html"):
            shutil.copyfile(folder / f"report.{kind}", output / f"{name}.{kind}")
    return {"status": process.returncode, "broken": [x for x in lines if x.startswith("BROKEN")], "verdict": lines[-2]}


def write_start(folder: Path) -> None:
    """Writes the model, the pairs and `config.yaml`."""
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
    run(main)
