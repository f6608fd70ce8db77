"""What do the loss head's backends ask of GPUs and TPUs, by the programs that are compiled for them?

Compiles the forward and backward pass of the loss head of Llama 3 8B over 8192 states for GPUs and TPUs, with every
backend that can run there. It reads from each program how many bytes of every logit cross the device's memory, the
memory, and for GPUs the bytes that are moved altogether and how often the host waits. Then it compiles the kernels
alone and reports registers, spills, shared and vector memory. No GPU or TPU is needed, and nothing is run: the report
says what the hardware is asked for, not how long it takes.

Expected: no byte of a logit crosses memory in the forward pass of a kernel; with `xla` 12 do on GPUs and 8 on TPUs. In
the backward pass on GPUs 6 do with `triton` and 14 with `xla`. No kernel of `triton` needs more than 99 KiB of shared
memory, or spills without a soft cap; that of `mosaic` needs less than 16 MiB of vector memory.

Needs the compilers: `pip install "jax[cuda12]==0.10.2" absl-py jaxtyping` and `pip install --no-deps libtpu==0.0.42.1`.
Takes about five minutes on two CPU cores.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from benchmarks.facts import installed_versions, machine_facts
from benchmarks.gpu_attention import RTX_4090, resources
from benchmarks.options import Option, run
from benchmarks.results import Result, Table, gib
from jax_simpo.plan import topology
from jax_simpo.plan.hlo import gpu_work, loop_traffic
from jax_simpo.plan.topology import GPUS, Topology

STATES, WIDTH, VOCABULARY, SOFTCAP = 8192, 4096, 128256, 30.0  # of Llama 3 8B; the cap of Gemma 2
PROGRAMS = {"h100": "triton", "v5e": "mosaic", "v5p": "mosaic", "v6e": "mosaic"}
KERNEL_GPUS = ("a100-80", "rtx4090", "h100", "b200")
_TPU_SHAPES = {"v5e": "2x2", "v5p": "2x2x1", "v6e": "2x2"}


@dataclass(frozen=True)
class Program:
    """The figures of the forward and backward pass.

    Attributes:
        forward: bytes of a logit that cross the device's memory in the forward pass.
        backward: the same of the backward pass.
        temporaries: bytes beside arguments and results.
        moved: bytes that the program reads and writes; None on TPUs.
        launches: kernels that are started; None on TPUs.
        waits: times that the host waits for the device; None on TPUs.
        vector_memory: bytes of a TPU's vector memory that the kernel takes; None elsewhere.
    """

    chip: str
    backend: str
    forward: float
    backward: float
    temporaries: int
    moved: float | None
    launches: float | None
    waits: float | None
    vector_memory: int | None


@dataclass(frozen=True)
class Kernel:
    """Holds what the assembler says of one kernel; `shared_bytes` are those of a block of threads."""

    gpu: str
    name: str
    softcap: float | None
    registers: int
    spill_store_bytes: int
    shared_bytes: int


def main(
    output: Annotated[Path, Option("Folder for the results.")] = Path("docs/benchmarks"),
    chip: Annotated[list[str] | None, Option("h100, v5e, v5p or v6e (repeatable); default: all.")] = None,
    quick: Annotated[bool, Option("Kernels for one GPU, to see that it works.")] = False,
) -> None:
    """Compiles the programs and kernels and writes the report."""
    chips = chip or list(PROGRAMS)
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= _topology(chips[0]).environment() | _topology("v5e").environment()
        os.environ["XLA_FLAGS"] = f"--xla_dump_to={folder}"
        programs = [_program(name, backend) for name in chips for backend in ("xla", PROGRAMS[name])]
        kernels = _kernels(Path(folder), quick) if "h100" in chips else []
    rows = [
        [
            *(p.chip, p.backend, f"{p.forward:.3g}", f"{p.backward:.3g}", gib(p.temporaries)),
            *("" if n is None else f"{n / 1e9:.1f}" for n in [p.moved]),
            *("" if n is None else round(n) for n in (p.launches, p.waits)),
            "" if p.vector_memory is None else f"{p.vector_memory / 2**20:.1f} MiB",
        ]
        for p in programs
    ]
    Result(
        name="loss_head_kernels",
        title="The loss head on GPUs and TPUs, by its compiled programs",
        about=(
            f"Compiled for GPUs and TPUs without one; nothing was run. {STATES} states of width {WIDTH}, a vocabulary "
            f"of {VOCABULARY}, bfloat16, a float32 head."
        ),
        facts=machine_facts("none") | {"compilers": ", ".join(_versions())},
        tables=[
            Table(
                "Forward and backward pass",
                [
                    *("chip", "backend", "bytes of a logit, forward", "backward", "temporaries"),
                    *("moved (GB)", "launches", "host waits", "vector memory of the kernel"),
                ],
                rows,
                "Bytes of a logit: of the arrays as large as a tile, in whichever type, that instructions read and "
                "write in the device's memory. Moved: every operand and result of a kernel counts once, of what is "
                "sliced the slice; what a kernel or a product reads again is not in it.",
            ),
            Table(
                "Kernels of `triton`",
                ["GPU", "kernel", "soft cap", "registers", "spilled bytes", "shared memory"],
                [
                    [
                        k.gpu,
                        k.name,
                        k.softcap or "",
                        k.registers,
                        k.spill_store_bytes,
                        f"{k.shared_bytes / 1024:.1f} KiB",
                    ]
                    for k in kernels
                ],
                "A lane has 255 registers; a block of threads may have 99 KiB of shared memory on Ada, 163 on an A100, "
                "227 on Hopper and a B200.",
            ),
        ],
        data=[*(asdict(program) for program in programs), *(asdict(kernel) for kernel in kernels)],
    ).write(output)


def _versions() -> list[str]:
    return list(installed_versions(("jax", "jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12", "libtpu")))


def _topology(chip: str) -> Topology:
    return Topology.parse(f"{chip}:{_TPU_SHAPES.get(chip, '1')}")


@cache
def _device(chip: str) -> Any:
    """Returns a chip to compile for, which the machine need not have."""
    return _topology(chip).devices()[0]


# --- programs


def _program(chip: str, backend: str) -> Program:
    import jax
    import jax.numpy as jnp

    from jax_simpo.ops.logprobs import target_logps
    from jax_simpo.ops.loss_head import states
    from jax_simpo.ops.loss_head.backends import load_backend
    from jax_simpo.ops.loss_head.blocks import Blocks
    from jax_simpo.sharding import make_mesh, named

    states._PARTS = 1  # the loop over parts of a tile, which a full list does not enter, has the body of the other

    def both(hidden: Any, head: Any, index: Any, token: Any, counts: Any, dlogps: Any) -> Any:
        def logps(hidden: Any, head: Any) -> Any:
            return target_logps(hidden, head, index, token, counts=counts, backend=backend)

        values, pull = jax.vjp(logps, hidden, head)
        return values, pull(dlogps)

    mesh = make_mesh(1, 1, 1, devices=[_device(chip)])

    def array(shape: tuple[int, ...], dtype: Any, *axes: str | None) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=named(mesh, *axes))

    with jax.set_mesh(mesh):
        targets = [array((1, STATES), dtype, "batch") for dtype in (jnp.int32, jnp.int32, jnp.float32)]
        compiled: Any = (
            jax.jit(both)
            .lower(
                array((1, STATES, WIDTH), jnp.bfloat16, "batch"),
                array((VOCABULARY, WIDTH), jnp.float32, "vocab", "embed"),
                *targets[:2],
                array((1,), jnp.int32, "batch"),
                targets[2],
            )
            .compile()
        )
        chunk, logits = load_backend(backend).tile()
        tile = chunk, Blocks(logits // chunk, VOCABULARY).size
    text = compiled.as_text()
    # Each loop has the body twice, for tiles and for parts. With one loop, the forward pass is a kernel.
    traffic = [size / (2 * tile[0] * tile[1]) for size in loop_traffic(text, tile)]
    forward, backward = traffic if len(traffic) == 2 else (0.0, *traffic)
    moved = launches = waits = vector_memory = None
    if chip in GPUS:
        none, one = gpu_work(text, 0.0), gpu_work(text, 1.0)
        tiles = STATES // chunk / 2
        moved, launches, waits = (
            a + tiles * (b - a)
            for a, b in ((none.bytes, one.bytes), (none.launches, one.launches), (none.waits, one.waits))
        )
    elif backend != "xla":
        (call,) = re.findall(r"%loss_head_sums[.\d]* = .*", text)
        sizes = re.findall(r'"memory_space":"1","offset":"\d+","size":"(\d+)"', call)
        vector_memory = max(map(int, sizes))
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    print(f"{chip} {backend}: {traffic} {moved}", flush=True)
    return Program(chip, backend, forward, backward, temporaries, moved, launches, waits, vector_memory)


# --- kernels of `triton`


def _kernels(folder: Path, quick: bool) -> list[Kernel]:
    topology.GPUS["rtx4090"] = RTX_4090
    found = []
    for gpu in KERNEL_GPUS[: 1 if quick else None]:
        # The error that a kernel does not fit into next to no shared memory says how much it asks for.
        GPUS[f"{gpu}-tiny"] = replace(GPUS[gpu], shared_memory=3072)
        for softcap in (None, SOFTCAP):
            found += [_kernel(folder, gpu, name, softcap) for name in ("sums", "dlogits")]
            print(f"compiled {gpu} {softcap}", flush=True)
    return found


def _kernel(folder: Path, gpu: str, name: str, softcap: float | None) -> Kernel:
    """Compiles a kernel by itself, for its tile."""
    import jax
    import jax.numpy as jnp

    from jax_simpo.ops.loss_head import triton_kernels
    from jax_simpo.ops.loss_head.backends import Wanted
    from jax_simpo.ops.loss_head.states import SHARED

    def sums(states: Any, head: Any, live: Any) -> Any:
        return triton_kernels.sums(states, head, live, softcap, interpret=False)

    def dlogits(states: Any, weights: Any, token: Any, dlogp: Any, lse: Any, uncounted: Any) -> Any:
        wanted = Wanted(token, dlogp, lse)
        return triton_kernels.dlogits(states, weights, wanted, uncounted, softcap, interpret=False)

    number = ((), jnp.int32)
    matrices = [((2048, WIDTH), jnp.bfloat16), ((16032, WIDTH), jnp.bfloat16)]
    facts = [((2048, SHARED), jnp.int32), ((2048, SHARED), jnp.float32), ((2048,), jnp.float32)]
    calls: dict[str, tuple[Callable[..., Any], Sequence[Any]]] = {
        "sums": (sums, [*matrices, number]),
        "dlogits": (dlogits, [*matrices, *facts, number]),
    }
    function, shapes = calls[name]

    def compile_for(chip: str) -> None:
        sharding = jax.sharding.SingleDeviceSharding(_device(chip))
        arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in shapes]
        _compile(function, *arrays)

    return Kernel(gpu, name, softcap, *resources(compile_for, gpu, folder, "loss_head_"))


def _compile(function: Callable[..., Any], *arrays: Any) -> None:
    import jax

    jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).compile()


if __name__ == "__main__":
    run(main)
