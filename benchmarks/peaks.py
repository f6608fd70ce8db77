"""Which machine is this, and how fast are its matrix products and its memory?

Writes what `nvidia-smi` says, the versions, and for JAX and PyTorch, each in a process of its own, the floating-point
operations a second of a large matrix product and the bytes a second of a copy, from many calls in a window. Every other
page of a GPU states its figures beside such a product of its own.

Expected on an H100 SXM: 600 to 800 TFLOP/s in bfloat16, and 2.8 to 3.1 TB/s. Not measured yet.

Takes about half a minute (`--quick`: 15 seconds).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from benchmarks.cells import CELLS_HELP, Cells, failed
from benchmarks.facts import machine_facts
from benchmarks.options import Option, run
from benchmarks.results import Result, Table
from benchmarks.timing import sampled
from benchmarks.workers import Requests, RestartedWorker

DTYPE = "bfloat16"
COPIED = 2**30  # bytes of the array that is copied
QUICK_WIDTH, QUICK_COPIED = 256, 2**20
LIMIT = 60.0  # seconds of a measurement


def main(
    output: Annotated[Path, Option("Folder for the results.")] = Path("docs/benchmarks"),
    name: Annotated[str, Option("Stem of the files.")] = "facts",
    cells: Annotated[Path | None, Option(CELLS_HELP)] = None,
    quick: Annotated[bool, Option("Tiny arrays, to see that it runs.")] = False,
) -> None:
    """Measures the peaks and writes the page."""
    width, copied = (QUICK_WIDTH, QUICK_COPIED) if quick else (None, COPIED)
    store = Cells(cells)
    smi = store.measure({"facts": "nvidia-smi"}, _nvidia_smi)
    said = smi["failed"] if failed(smi) else smi["text"]
    print(said, flush=True)
    rows = []
    measured = {"nvidia-smi": smi}
    with tempfile.TemporaryDirectory() as logs, ExitStack() as workers:
        for framework in _SIDES:
            worker = workers.enter_context(
                RestartedWorker(["benchmarks.peaks", "--worker", framework], Path(logs) / framework)
            )
            for what, size in {"device": None, "matmul": width, "copy": copied}.items():
                data = store.measure(
                    {"facts": framework, "what": what, "size": size},
                    partial(worker.ask, LIMIT, what=what, size=size),
                    always=True,
                )
                measured[f"{framework} {what}"] = data
                rows.append((framework, what, data["failed"] if failed(data) else data["text"]))
                print(*rows[-1], sep=": ", flush=True)
    tables = [Table("The machine", ("framework", "", ""), rows, "The best of five windows of many calls.")]
    device = measured["jax device"].get("text", "none that jax can use")
    about = f"Peaks of {DTYPE}. What `nvidia-smi` said:\n\n```\n{said}\n```"
    Result(name, "The machine and its peaks", about, machine_facts(device), tables, measured).write(output)
    if unable := [f"{what}: {data['failed']}" for what, data in measured.items() if failed(data)]:
        sys.exit(f"not measured: {'; '.join(unable)}")


def _nvidia_smi() -> dict[str, str]:
    if shutil.which("nvidia-smi") is None:
        return {"text": "there is no nvidia-smi here"}
    done = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=60)
    return {"text": (done.stdout + done.stderr).strip()}


def _jax(what: str, size: int | None) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from benchmarks.steps import device_name, matmul_peak

    if what == "device":
        stats = jax.devices()[0].memory_stats() or {}
        memory = stats.get("bytes_limit")
        limit = f"{memory / 2**30:.1f} GiB for jax" if memory else "memory not stated"
        return {"text": f"{device_name()}, {len(jax.devices())} device(s), {limit}"}
    if what == "matmul":
        return _matmul(matmul_peak(DTYPE, size))
    assert size is not None
    array = jnp.ones(size // 2, DTYPE)
    return _copy(size, sampled(partial(jax.jit(lambda x: x * 2), array), jax.block_until_ready))


def _torch(what: str, size: int | None) -> dict[str, Any]:
    import torch

    gpu = torch.cuda.is_available()
    if what == "device":
        name = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}" if gpu else "CPU"
        memory = f", {torch.cuda.get_device_properties(0).total_memory / 2**30:.1f} GiB" if gpu else ""
        return {"text": name + memory}
    device = "cuda" if gpu else "cpu"

    def wait(_: Any) -> None:
        if gpu:
            torch.cuda.synchronize()

    if what == "matmul":
        width = size or (8192 if gpu else 2048)
        a = torch.randn(width, width, device=device, dtype=getattr(torch, DTYPE))
        return _matmul(2.0 * width**3 / min(sampled(partial(torch.mm, a, a), wait)["seconds"]))
    assert size is not None
    array = torch.ones(size // 2, device=device, dtype=getattr(torch, DTYPE))
    return _copy(size, sampled(partial(torch.mul, array, 2), wait))


def _matmul(flops: float) -> dict[str, Any]:
    return {"flops_per_second": flops, "text": f"{flops / 1e12:.4g} TFLOP/s"}


def _copy(size: int, times: dict[str, Any]) -> dict[str, Any]:
    speed = 2 * size / min(times["seconds"])  # read once, written once
    return {"bytes_per_second": speed, "text": f"{speed / 1e12:.3g} TB/s, read and written"}


_SIDES: dict[str, Callable[[str, int | None], dict[str, Any]]] = {"jax": _jax, "torch": _torch}


def _serve(framework: str) -> None:
    requests = Requests()
    requests.serve(lambda request: _SIDES[framework](request["what"], request["size"]), keep_on=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        _serve(*sys.argv[2:])
    else:
        run(main)
