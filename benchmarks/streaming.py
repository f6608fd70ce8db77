"""Does loading or exporting a checkpoint need much host memory beside the parameters themselves?

Writes a checkpoint of a 1B model in bfloat16 shards, the format of Hugging Face, loads it in float32 onto eight CPU
devices (`fsdp=8`), and exports it again in shards of the same size. Peak memory is that of the process (mapped pages of
files included), minus its memory before; for loading, the parameters are subtracted too.

Expected: both peaks are less than 1.3 times the largest file, and do not grow with the model.

Takes about a minute and 12 GiB of memory and disk (`--quick`: a few seconds, with a model too small to tell).
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import jax
import ml_dtypes
import numpy as np

from benchmarks.facts import forget_peak, machine_facts, peak_resident_bytes, resident_bytes
from benchmarks.models import model_mapping
from benchmarks.options import Option, run
from benchmarks.results import Result, Table, gib
from benchmarks.steps import device_name
from jax_simpo import hf
from jax_simpo.hf.config import read_model_config, write_model_config
from jax_simpo.hf.safetensors_files import TensorWriter, split_into_files, write_index
from jax_simpo.models.transformer import Model
from jax_simpo.sharding import make_mesh

DEVICES = 8
BOUND = 1.3  # times the largest file


def main(
    output: Annotated[Path, Option("Folder for the results.")] = Path("docs/benchmarks"),
    model: Annotated[str, Option("See benchmarks/models.py.")] = "llama-3.2-1b",
    max_shard_size: Annotated[str, Option("Largest file; one tensor is never cut.")] = "500MB",
    tensor: Annotated[int, Option("Devices along `tensor`; the others are along `fsdp`.")] = 1,
    name: Annotated[str, Option("Stem of the files.")] = "streaming",
    quick: Annotated[bool, Option("A small model, to see that it runs.")] = False,
) -> None:
    """Measures the peaks of loading and exporting."""
    if quick:
        model, max_shard_size = "small", "1MB"
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    mesh = make_mesh(fsdp=-1, tensor=tensor)
    policy = Model(read_model_config(model_mapping(model)), "bfloat16", "full")
    max_bytes = hf.shard_bytes(max_shard_size)
    with TemporaryDirectory() as folder, jax.set_mesh(mesh):
        start, exported = Path(folder, "start"), Path(folder, "exported")
        largest = _write_checkpoint(policy, start, max_bytes)
        measured: dict[str, Any] = {"parameters": policy.parameter_count, "largest_file": largest}
        # Allocations, threads and compiled programs of jax's first use do not belong to the measurement.
        jax.block_until_ready(jax.jit(lambda x: x + 1)(np.zeros(8)))
        params, measured["load"] = _measure(lambda: jax.block_until_ready(hf.load_params(start, policy, mesh)))
        resident = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        measured["resident"] = resident
        measured["load"]["beyond"] = measured["load"]["peak"] - resident
        _, measured["export"] = _measure(
            lambda: hf.save_model(params, policy, exported, "bfloat16", max_shard_bytes=max_bytes)
        )
        measured["export"]["beyond"] = measured["export"]["peak"]
        measured["files"] = len(list(exported.glob("*.safetensors")))
        measured["equal"] = _same_files(start, exported)
    rows = []
    for direction in ("load", "export"):
        usage = measured[direction]
        usage["times_largest_file"] = usage["beyond"] / largest
        rows.append((direction, gib(usage["beyond"]), f"{usage['times_largest_file']:.2f}", usage["seconds"]))
    note = (
        f"{policy.parameter_count:,} parameters, {gib(resident)} in float32 over {DEVICES} devices "
        f"(fsdp={DEVICES // tensor}, tensor={tensor}); {measured['files']} files, the largest of {gib(largest)}. "
        f"Bound: {BOUND} times that. Exported weights equal to the bit: {'yes' if measured['equal'] else 'NO'}."
    )
    columns = ("", "peak beyond the parameters", "times the largest file", "seconds")
    about = "Host memory of reading a sharded checkpoint onto devices and of writing it again."
    tables = [Table(f"Streaming {model}", columns, rows, note)]
    Result(name, "Streaming weights", about, machine_facts(device_name()), tables, measured).write(output)


def _write_checkpoint(model: Model, folder: Path, max_bytes: int) -> int:
    """Writes random weights in bfloat16 shards; returns the bytes of the largest file."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(write_model_config(model.config, "bfloat16")))
    files = split_into_files(hf.tensor_shapes(model), "bfloat16", max_bytes)
    rng = np.random.default_rng(0)
    for file, shapes in files.items():
        with TensorWriter(folder / file, shapes, "bfloat16") as writer:
            for name, shape in shapes.items():
                writer.write(name, rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16))
    write_index(folder, files, "bfloat16")
    return max((folder / file).stat().st_size for file in files)


def _measure(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Runs a function; returns its result, its seconds and its peak memory minus the memory before."""
    gc.collect()
    forget_peak()
    before = resident_bytes()
    started = time.perf_counter()
    result = work()
    return result, {"seconds": time.perf_counter() - started, "peak": peak_resident_bytes() - before}


def _same_files(first: Path, second: Path) -> bool:
    names = sorted(path.name for path in first.glob("*.safetensors"))
    if names != sorted(path.name for path in second.glob("*.safetensors")):
        return False
    return all(_payload(first / name) == _payload(second / name) for name in names)


def _payload(path: Path) -> bytes:
    """Reads the tensors of a safetensors file, without its header."""
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


if __name__ == "__main__":
    run(main)
