"""What do our attention backends ask of GPUs, by the programs that are compiled for them?

Compiles the forward and backward pass of attention over one packed row of shared pairs for an A100 and an H100, with
every backend that can run there, and reads from each program the memory, the kernels that are launched, how often the
host waits for the device, and the bytes that are moved. Then compiles the kernels of `attention: triton` alone, for
every head size and several GPUs, and reports registers, spills and shared memory. No GPU is needed, and nothing is run:
the report says what the hardware is asked for, not how long it takes.

Expected: `triton` moves the fewest bytes and keeps next to nothing; `cudnn` with slots as long as the longest response
takes a tenth of the memory it takes with slots as long as the row; only `blockwise` makes the host wait. No kernel of
`triton` needs more than 99 KiB of shared memory on Ampere and Ada, or spills more than 64 bytes there.

Needs the GPU compiler of jax 0.10: `pip install "jax[cuda12]==0.10.2" absl-py jaxtyping`. Takes ten minutes on
two busy CPU cores.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from benchmarks.facts import machine_facts
from benchmarks.options import Option, run
from benchmarks.results import Result, Table
from jax_simpo.plan import topology
from jax_simpo.plan.hlo import gpu_work
from jax_simpo.plan.topology import GPUS, Gpu, Topology

LENGTH, HEADS, KV_HEADS, HEAD_SIZE = 8192, 32, 8, 128  # attention of Llama 3 8B
PROMPT, RESPONSES, PAIRS = 400, (300, 300), 8
TRITON_ROWS, TRITON_LENGTH, TRITON_HEADS, TRITON_KV_HEADS = 2, 1024, 8, 2
# The figures of the data sheet; memory and cores do not matter to the kernels.
RTX_4090 = Gpu("NVIDIA GeForce RTX 4090", (8, 9), 25393692672, 128, 128, 102400, 1008000000000, 75497472, 2.52)
LIMIT = 99 * 1024  # bytes of shared memory of a block of threads on Ada


@dataclass(frozen=True)
class Program:
    """The figures of the forward and backward pass of one layer's attention; `waits` are the host's for the device."""

    gpu: str
    backend: str
    temporaries: int
    launches: float
    waits: float
    bytes: float


@dataclass(frozen=True)
class Kernel:
    """Holds what the assembler says of one kernel; `shared_bytes` are those of a block of threads."""

    gpu: str
    dtype: str
    head_size: int
    group: int
    name: str
    registers: int
    spill_store_bytes: int
    shared_bytes: int


def main(
    output: Annotated[Path, Option("Folder for the results.")] = Path("docs/benchmarks"),
    quick: Annotated[bool, Option("One GPU and head size, to see that it works.")] = False,
) -> None:
    """Compiles the programs and kernels and writes the report."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {
            "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_COMPILATION_CACHE": "0",
            "XLA_FLAGS": f"--xla_dump_to={folder}",
        }
        programs = [
            _program(gpu, backend, label, longest)
            for gpu, with_pallas in (("a100-80", False), ("h100", True))[: 1 if quick else 2]
            for backend, label, longest in _contenders(with_pallas)
        ]
        kernels = _all_kernels(Path(folder), quick)
    gib = 1 << 30
    rows = [
        [p.gpu, p.backend, f"{p.temporaries / gib:.3f}", round(p.launches), round(p.waits), f"{p.bytes / 1e9:.2f}"]
        for p in programs
    ]
    about = (
        f"One row of {LENGTH} tokens holds {PAIRS} pairs with prompts of {PROMPT} and answers of "
        f"{RESPONSES[0]} tokens; {HEADS} query heads of {HEAD_SIZE}, {KV_HEADS} key/value heads, bfloat16."
    )
    Result(
        name="gpu_attention",
        title="Attention on GPUs, by its compiled programs",
        about=f"Compiled for GPUs without one; nothing was run. {about}",
        facts=machine_facts("none") | {"cuda": _versions()},
        tables=[
            Table(
                "Forward and backward pass of a layer",
                ["GPU", "backend", "temporaries (GiB)", "launches", "host waits", "moved (GB)"],
                rows,
                "Without the preparation of the mask, which is done once per batch. Every operand and result of a "
                "kernel counts once, of what is sliced the slice; what a kernel of `pallas`, `triton` or cuDNN reads "
                "again is not in it. Of `blockwise`, the mean of the live blocks is taken as the length of its loops.",
            ),
            Table(
                "Kernels of `triton`",
                ["GPU", "dtype", "head size", "group", "kernel", "registers", "spilled bytes", "shared memory"],
                [
                    [*row[:5], row[5], row[6], f"{row[7] / 1024:.1f} KiB"]
                    for row in (list(asdict(kernel).values()) for kernel in kernels)
                ],
                "With a window and a cap on scores, which take the most registers; group: query heads that share a "
                "key/value head. A lane has 255 registers; a block of threads may have 99 KiB of shared memory on Ada, "
                "163 on an A100, 227 on Hopper and a B200.",
            ),
        ],
        data=[*(asdict(program) for program in programs), *(asdict(kernel) for kernel in kernels)],
    ).write(output)


# --- programs


def _contenders(with_pallas: bool) -> list[tuple[str, str, int]]:
    """Lists the backends, their names in the report, and the longest response that they are told of."""
    longest = -(-(PROMPT + max(RESPONSES)) // 128) * 128
    return [
        ("dense", "dense", longest),
        ("blockwise", "blockwise", longest),
        ("banded", "banded", longest),
        ("cudnn", "cudnn, slots as long as the row", LENGTH),
        ("cudnn", "cudnn", longest),
        ("triton", "triton", longest),
        *([("pallas", "pallas", longest)] if with_pallas else []),
    ]


def _row() -> tuple[np.ndarray, np.ndarray]:
    """Returns `key_end` and positions, `[1, L]`: pairs with shared prompts, then padding."""
    key_end, positions = np.zeros((2, 1, LENGTH), np.int32)
    chosen, rejected = RESPONSES
    size = PROMPT + chosen + rejected
    for start in range(0, PAIRS * size, size):
        ends = start + np.array([size, PROMPT + chosen, size])
        key_end[0, start : start + size] = np.repeat(ends, [PROMPT, chosen, rejected])
        positions[0, start : start + size] = [*range(PROMPT + chosen), *range(PROMPT, PROMPT + rejected)]
    return key_end, positions


def _program(gpu: str, backend: str, label: str, longest: int) -> Program:
    import jax
    import jax.numpy as jnp

    from jax_simpo.ops.attention import Room, attention, prepare_mask

    span = -(-(PROMPT + sum(RESPONSES)) // 128) * 128
    room = Room(2 * PAIRS, longest, span)

    def prepare(key_end: Any, positions: Any) -> Any:
        return prepare_mask(key_end, positions, backend=backend, room=room)

    def attend_and_back(q: Any, k: Any, v: Any, dout: Any, mask: Any) -> Any:
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, mask, scale=HEAD_SIZE**-0.5), q, k, v)
        return out, pull(dout)

    sharding = jax.sharding.SingleDeviceSharding(_device(gpu))

    def placed(like: Any) -> Any:
        return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=sharding)

    def array(heads: int) -> Any:
        return placed(jax.ShapeDtypeStruct((1, LENGTH, heads, HEAD_SIZE), jnp.bfloat16))

    key_end, positions = _row()
    mask = jax.tree.map(placed, jax.eval_shape(prepare, key_end, positions))
    arrays = [array(heads) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    compiled = _compile(attend_and_back, *arrays, mask)
    work = gpu_work(compiled.as_text(), _mean_live_blocks(key_end, positions))
    print(f"{gpu} {label}: {work}", flush=True)
    memory = compiled.memory_analysis().temp_size_in_bytes
    return Program(gpu, label, memory, work.launches, work.waits, work.bytes)


@cache
def _device(gpu: str) -> Any:
    """Returns a GPU to compile for, which the machine need not have."""
    hardware = Topology.parse(f"{gpu}:1")
    hardware.check_installed()
    return hardware.devices()[0]


def _compile(function: Callable[..., Any], *arrays: Any) -> Any:
    import jax

    return jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).compile()


def _mean_live_blocks(key_end: np.ndarray, positions: np.ndarray) -> float:
    """Returns how many key blocks a query block of `blockwise` visits on average."""
    import jax.numpy as jnp

    from jax_simpo.ops.attention.blockwise import find_live_blocks

    return float(find_live_blocks(jnp.asarray(key_end), jnp.asarray(positions), None).counts.mean())


# --- kernels of `triton`


def _all_kernels(folder: Path, quick: bool) -> list[Kernel]:
    from jax_simpo.ops.attention.triton.sizes import HEAD_SIZES

    topology.GPUS["rtx4090"] = RTX_4090
    found = []
    for gpu in ("a100-80", "rtx4090", "h100", "b200")[: 1 if quick else 4]:
        # The error that a kernel does not fit into next to no shared memory says how much it asks for.
        GPUS[f"{gpu}-tiny"] = replace(GPUS[gpu], shared_memory=3072)
        for dtype, sizes in [("bfloat16", (64,))] if quick else HEAD_SIZES.items():
            for size in sizes:
                for group in (1, 4):
                    found += _kernels(folder, gpu, dtype, size, group)
                    print(f"compiled {gpu} {dtype} {size}, group {group}", flush=True)
    return found


def _kernels(folder: Path, gpu: str, dtype: str, size: int, group: int) -> list[Kernel]:
    """Compiles the three kernels of a model, each by itself."""
    import jax
    import jax.numpy as jnp

    from jax_simpo.ops.attention.backends import ScoreRule
    from jax_simpo.ops.attention.triton import backward, forward
    from jax_simpo.ops.attention.triton.sizes import BLOCK, tilings

    rule = ScoreRule(size**-0.5, window=512, softcap=50.0)
    rows, length, kv_heads = TRITON_ROWS, TRITON_LENGTH, TRITON_HEADS // group
    blocks = length // BLOCK

    def call(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        tiles = getattr(tilings(size, dtype, group), name)
        if name == "forward":
            return lambda q, k, v, dout, lse, delta, ends, places, *lists: kernel(
                q, k, v, ends, places, *lists, rule=rule, tiles=tiles, interpret=False
            )
        return lambda *arrays: kernel(
            backward.Inputs(*arrays[:8]), *arrays[8:], rule=rule, tiles=tiles, interpret=False
        )

    calls = {
        "forward": call("forward", forward.forward),
        "dq": call("dq", backward.query_gradient),
        "dk_dv": call("dk_dv", backward.key_value_gradients),
    }

    def arrays(gpu: str) -> list[Any]:
        sharding = jax.sharding.SingleDeviceSharding(_device(gpu))
        matrices = [((rows, length, n, size), dtype) for n in (TRITON_HEADS, kv_heads, kv_heads, TRITON_HEADS)]
        vectors = [((rows, TRITON_HEADS, length), jnp.float32)] * 2
        integers = [((rows, length), jnp.int32)] * 2 + [((rows, blocks, n), jnp.int32) for n in (blocks, 2)]
        return [jax.ShapeDtypeStruct(*array, sharding=sharding) for array in (*matrices, *vectors, *integers)]

    found = []
    for name, function in calls.items():

        def compile_for(chip: str, function: Callable[..., Any] = function) -> None:
            _compile(function, *arrays(chip))

        found.append(Kernel(gpu, dtype, size, group, name, *resources(compile_for, gpu, folder, "attention_")))
    return found


def resources(compile_for: Callable[[str], None], gpu: str, folder: Path, name: str) -> tuple[int, int, int]:
    """Compiles a kernel; returns its registers, the bytes of a lane that are spilled, and its bytes of shared memory.

    Args:
        compile_for: compiles the kernel for a chip of `GPUS`.
        gpu: the chip; `GPUS` also has `GPU-tiny`, the same with next to no shared memory.
        folder: that XLA dumps programs to.
        name: that the kernel's own begins with.
    """
    import jax

    try:
        compile_for(f"{gpu}-tiny")
        raise AssertionError(f"the kernel {name} takes no shared memory")
    except jax.errors.JaxRuntimeError as error:
        asked = re.search(r"Shared memory size limit exceeded: requested (\d+)", str(error))
        if asked is None:
            raise
    for file in folder.glob("*.ptx"):
        file.unlink()
    compile_for(gpu)
    return *_assembled(folder, name), int(asked[1])


def _assembled(folder: Path, name: str) -> tuple[int, int]:
    """Assembles the kernel that XLA dumped; returns its registers, and the bytes of a lane that are spilled.

    Args:
        folder: where the PTX lies.
        name: what the kernel's name begins with.
    """
    (ptx,) = [file for file in folder.glob("*.ptx") if f".entry {name}" in file.read_text()]
    target = re.search(r"\.target (sm_\w+)", ptx.read_text())
    assert target is not None
    nvidia = find_spec("nvidia.cuda_nvcc")
    assert nvidia is not None and nvidia.submodule_search_locations is not None
    ptxas = Path(nvidia.submodule_search_locations[0]) / "bin" / "ptxas"
    command = [str(ptxas), "-v", f"-arch={target[1]}", str(ptx), "-o", os.devnull]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled, registers = re.search(r"(\d+) bytes spill stores", report), re.search(r"Used (\d+) registers", report)
    assert spilled is not None and registers is not None, report
    return int(registers[1]), int(spilled[1])


def _versions() -> str:
    from importlib import metadata

    return ", ".join(f"{name} {metadata.version(name)}" for name in ("jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12"))


if __name__ == "__main__":
    run(main)
