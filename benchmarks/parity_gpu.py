"""Do jax-simpo and torch_ref compute the same numbers on this machine's GPU, with the attention that each takes there?

The parity check runs its own tiny models on a CPU, but a user's checkpoint on the machine's GPUs. This script writes
such a checkpoint, of a model with heads of 64, which FlexAttention and our GPU kernel take, and 30 pairs; then it runs
`python -m parity` on them twice and keeps its reports:

- in float32 with `attention: blockwise`, whose products are full float32 ones. Every bound of parity counts, and every
  wrong variant must be caught.
- in bfloat16, beside float32, with `attention: auto`. Only the figures of bfloat16 count. On a Hopper GPU `auto` may
  take `pallas`, which computes float32 products from two bfloat16 parts of each number: 16 of its 24 bits. Attention is
  then about 1e-5 of its size off, as much as parity allows a gradient as a whole. Against the rounding of bfloat16, a
  hundred times as much, that does not count.

Expected: every bound holds. On a CPU the final weights of a few tensors are 1.2e-4 to 1.6e-4 of their way apart where
1.1e-4 is allowed, because AdamW moves a weight whose gradient is mere rounding as far as any other; the exit status is
then 3.

Takes about two minutes on two CPU cores with `--quick`, which leaves bfloat16 out. On a GPU it has not run yet.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
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
DTYPES = ("float32", "bfloat16")


def main(
    output: Annotated[Path, Option("Folder for the results.")] = Path("docs/benchmarks"),
    name: Annotated[str, Option("Stem of the files.")] = "parity",
    cells: Annotated[Path | None, Option(CELLS_HELP)] = None,
    quick: Annotated[bool, Option("float32 alone.")] = False,
) -> None:
    """Compares both sides in each dtype and keeps the reports."""
    store = Cells(cells)
    verdicts, reasons = {}, []
    for dtype in DTYPES[:1] if quick else DTYPES:
        data = store.measure({"parity": PAIRS, "dtype": dtype}, partial(_compare, output, name, dtype), always=True)
        if failed(data):
            reasons.append(f"{dtype}: {data.get('details', data['failed'])}")
            continue
        verdicts[dtype] = data
        print(f"{dtype}: {verdict(data)}", flush=True)
    if reasons:
        sys.exit("\n".join(reasons))
    if any(data["broken"] for data in verdicts.values()):
        sys.exit(WRONG)


def verdict(data: Mapping[str, Any]) -> str:
    """Returns a line about a comparison."""
    held = f"{data['compared']} comparisons, attention {', '.join(data['attention'])}"
    return f"BROKEN: {'; '.join(data['broken'])} ({held})" if data["broken"] else f"every bound holds ({held})"


def _compare(output: Path, name: str, dtype: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        write_start(folder, attention="blockwise" if dtype == "float32" else "auto")
        command = [sys.executable, "-m", "parity.__main__", str(folder / "config.yaml"), "--output", work]
        with subprocess.Popen(
            [*command, *(["--quick"] if dtype == "float32" else [])],  # quick: float32 alone
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
        if process.returncode not in (0, 1) or not (folder / "report.html").exists():
            raise RuntimeError(
                f"python -m parity ended with status {process.returncode} and no report; the lines above say why"
            )
        output.mkdir(parents=True, exist_ok=True)
        for kind in ("md", "json", "html"):
            shutil.copyfile(folder / f"report.{kind}", output / f"{name}-{dtype}.{kind}")
        return judged(json.loads((folder / "report.json").read_text(encoding="utf-8")), dtype)


def judged(report: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Returns the verdict on the comparisons of a dtype: their number, the attention they took, and what is broken.

    Args:
        report: the content of parity's `report.json`.
        dtype: the dtype whose bounds count. With float32 every wrong variant must be caught too.

    Raises:
        ValueError: the report has no comparison in this dtype.
    """
    cells = [cell for cell in report["cells"] if cell["dtype"] == dtype]
    if not cells:
        raise ValueError(f"parity compared nothing in {dtype}")
    broken = [
        f"{cell['backend']}, {cell['layout']}: {figure['name']} is {figure['value']}, "
        f"at most {figure['bound']:.2g} is allowed"
        for cell in cells
        for figure in cell["figures"]
        if not figure["holds"]
    ]
    if dtype == "float32":
        variants = report["wrong variants"].items()
        broken += [f"the wrong variant {name!r} was not caught" for name, variant in variants if not variant["caught"]]
    attention = sorted({cell["facts"]["attention"] for cell in cells if "attention" in cell.get("facts", {})})
    return {"compared": len(cells), "attention": attention, "broken": broken}


def write_start(folder: Path, attention: str) -> None:
    """Writes the model, the pairs and `config.yaml` with this `attention`."""
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
        "attention": attention,
        "auto_insert_empty_system_msg": False,
        "learning_rate": 1e-4,
        "logprob_chunk": 256,
        "row_length": 256,
        "max_length": 256,
    }
    (folder / "config.yaml").write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML


if __name__ == "__main__":
    run(main)
