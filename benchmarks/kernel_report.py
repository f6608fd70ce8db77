"""Do our attention kernels compile for an H100, how much of it do they need, and how long are their inner loops?

Compiles the forward and backward kernels of `attention: pallas` for an H100, which the machine need not have, and
reports for each kernel the registers, the spilled bytes, the shared memory, and the instructions of one step over a
full and over a mixed block. The variants of the forward kernel (`Switches`) are compiled without window and cap, and
with both. Nothing is run: the report shows that the kernels fit the hardware and how much a step
computes, not how fast they are.

Where no GPU is present, some releases of jax have a kernel assembled as a part of a larger program, and the assembler
then ignores the trade of registers between warpgroups. The report says so, and takes the numbers of such a kernel from
its PTX assembled as a whole program by CUDA's ptxas.

Expected: every combination compiles without complaint; no kernel asks for more than the 227 KiB of shared memory a
Hopper block may have; heads of up to 128 in bfloat16 spill less than 100 bytes a lane, no kernel more than 500.

Needs no GPU, but its compiler: `pip install "jax[cuda12]" nvidia-cuda-nvdisasm absl-py jaxtyping`, or `jax[cuda13]`.
Takes about five minutes on two CPU cores (`--quick`: half a minute).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from benchmarks.facts import installed_versions, machine_facts
from benchmarks.options import Option, run
from benchmarks.results import Result, Table

if TYPE_CHECKING:
    from jax_simpo.ops.attention.pallas.switches import Switches

ROWS, LENGTH, HEADS, KV_HEADS = 2, 1024, 8, 2
# Windows and caps of published models: none (Llama), a window (Mistral), window and cap (Gemma 2).
LAYERS: dict[str, tuple[int | None, float | None]] = {
    "plain": (None, None),
    "window": (512, None),
    "window, cap": (512, 50.0),
}
COMPLAINTS = {
    "'setmaxnreg' ignored": "trade of registers ignored",
    "wgmma.mma_async instructions are serialized": "tensor core products serialised",
}
PACKAGES = ("jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cuda-nvcc-cu12", "nvidia-cuda-nvcc")


@dataclass(frozen=True)
class Kernel:
    """Holds what the assembler says of one kernel, and what the disassembler finds in it.

    Attributes:
        switches: the variants that are not the default, such as "overlap".
        registers: registers of a lane at launch. Warpgroups then trade registers (240 for one that computes, 24 for
            the one that fetches), and the assembler allots and spills by those numbers.
        shared_bytes: shared memory of a block of threads.
        full: instructions of a lane in one step over a full block, `mixed` over a mixed one.
        wgmma: tensor core instructions in a step.
        complaints: warnings of the assembler that it ignored the trade of registers or serialised products.
        complaints_of_jax: the same, when jax had the kernel assembled.
    """

    dtype: str
    head_size: int
    layer: str
    switches: str
    name: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    full: int
    mixed: int
    wgmma: int
    complaints: list[str]
    complaints_of_jax: list[str]

    @property
    def key(self) -> tuple[Any, ...]:
        return self.dtype, self.head_size, self.layer, self.switches, self.name


def main(
    output: Annotated[Path, Option("Folder for the results.")] = Path("docs/benchmarks"),
    name: Annotated[str, Option("Stem of the files.")] = "kernel_report",
    before: Annotated[Path | None, Option("JSON of an earlier report, to compare with.")] = None,
    layer: Annotated[list[str] | None, Option("plain, window or 'window, cap' (repeatable).")] = None,
    quick: Annotated[bool, Option("One dtype and head size, to see that it works.")] = False,
) -> None:
    """Compiles the kernels and writes the report."""
    with tempfile.TemporaryDirectory() as folder:
        # Mosaic GPU reads these when it compiles. They must be set before jax is imported.
        os.environ |= {"MOSAIC_GPU_DUMP_TO": folder, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "0"}
        os.environ["CUDA_ROOT"] = str(Path(_tool("nvdisasm")).parents[1])
        device = _device()
        from jax_simpo.ops.attention.pallas.backend import HEAD_SIZES
        from jax_simpo.ops.attention.pallas.switches import Switches

        variants = {
            "": Switches(),
            "ping-pong": Switches(ping_pong=True),
            "overlap": Switches(overlap=True),
            "ping-pong, overlap": Switches(ping_pong=True, overlap=True),
        }
        kernels = []
        for dtype, sizes in [("bfloat16", (128,))] if quick else HEAD_SIZES.items():
            for size in sizes:
                for kind in layer or LAYERS:
                    for variant, switches in variants.items() if kind != "window" else [("", Switches())]:
                        _compile(device, dtype, size, kind, switches, backward=variant == "")
                        kernels += list(_kernels(Path(folder), (dtype, size, kind, variant)))
                    print(f"compiled {dtype} {size} {kind}", flush=True)
    note = (
        "Registers are those of a lane at launch, when three warpgroups share the 64k of a block; then the two that "
        "compute take 240, and the one that fetches keeps 24. Spilled bytes are those of a lane, each counted once in "
        "the program. A block may have 227 KiB of shared memory. Full and mixed are the instructions of a lane in one "
        "step over such a block, wgmma those of them for the tensor cores."
    )
    defaults, others = ([k for k in kernels if bool(k.switches) == other] for other in (False, True))
    tables = [
        Table("Kernels", COLUMNS, [_row(k) for k in defaults], note),
        Table("Variants of the forward kernel", ["switches", *COLUMNS], [[k.switches, *_row(k)] for k in others]),
    ]
    if before is not None:
        tables.append(_comparison(kernels, json.loads(before.read_text())))
    Result(
        name=name,
        title=f"Resources of the attention kernels on an H100, {_versions()}",
        about=_about(kernels),
        facts=machine_facts(f"none; compiled for {device.device_kind}") | {"cuda": _versions()},
        tables=tables,
        data=[asdict(kernel) for kernel in kernels],
    ).write(output)


COLUMNS = (
    *("dtype", "head size", "layer", "kernel", "registers", "spilled bytes", "shared memory"),
    *("full", "mixed", "wgmma", "complaints"),
)


def _row(k: Kernel) -> list[Any]:
    resources = k.registers, k.spill_bytes, f"{k.shared_bytes / 1024:.0f} KiB"
    complaints = "; ".join(k.complaints) or "none"
    return [k.dtype, k.head_size, k.layer, k.name, *resources, k.full, k.mixed, k.wgmma, complaints]


def _comparison(kernels: list[Kernel], earlier: Mapping[str, Any]) -> Table:
    """Sets the kernels beside those of an earlier report."""
    was = {kernel.key: kernel for kernel in (Kernel(**fields) for fields in earlier["data"])}
    pairs = [(was[k.key], k) for k in kernels if k.key in was]
    rows = [
        [
            *(b.dtype, b.head_size, b.layer, b.name),
            *(f"{getattr(a, field)} → {getattr(b, field)}" for field in ("full", "mixed", "spill_bytes")),
            f"{a.shared_bytes / 1024:.0f} → {b.shared_bytes / 1024:.0f} KiB",
        ]
        for a, b in pairs
    ]
    columns = ["dtype", "head size", "layer", "kernel", "full", "mixed", "spilled bytes", "shared memory"]
    return Table(f"Beside commit {earlier['facts']['commit']}", columns, rows)


def _about(kernels: list[Kernel]) -> str:
    text = (
        f"The kernels were compiled for an H100 without one; nothing was run. There are {ROWS} rows of {LENGTH}, "
        f"{HEADS} query heads and {KV_HEADS} key/value heads."
    )
    for complaint in COMPLAINTS.values():
        if count := sum(complaint in k.complaints_of_jax for k in kernels):
            text += f' When jax had the kernels assembled, the complaint about {count} was "{complaint}".'
    return text


def _versions() -> str:
    return ", ".join(installed_versions(("jax", *PACKAGES)))


def _tool(name: str) -> str:
    """Returns the path of a program of CUDA, from NVIDIA's packages or the system."""
    spec = find_spec("nvidia")
    roots = [Path(root) for root in (spec.submodule_search_locations or [])] if spec else []
    # CUDA 12's own assembler comes before CUDA 13's, which the disassembler's package may have brought.
    candidates = [root / folder / "bin" / name for folder in ("cuda_nvcc", "cu13") for root in roots]
    found = next((str(path) for path in candidates if path.exists()), shutil.which(name))
    if found is None:
        package = {"ptxas": "'jax[cuda12]'", "nvdisasm": "nvidia-cuda-nvdisasm"}[name]
        raise SystemExit(f"{name} is not installed here: pip install {package}")
    return found


def _device() -> Any:
    """Returns an H100 to compile for, which the machine need not have."""
    from jax_simpo.errors import PlanError
    from jax_simpo.plan.topology import Topology

    hardware = Topology.parse("h100:8")
    try:
        hardware.check_installed()
        return hardware.devices()[0]
    except PlanError as error:
        raise SystemExit(str(error)) from error


def _compile(device: Any, dtype: str, size: int, layer: str, switches: Switches, *, backward: bool) -> None:
    import jax
    import jax.numpy as jnp

    from jax_simpo.ops.attention import Mask
    from jax_simpo.ops.attention.backends import ScoreRule
    from jax_simpo.ops.attention.pallas.backend import make_backend

    window, softcap = LAYERS[layer]
    backend, rule = make_backend(switches), ScoreRule(size**-0.5, window, softcap)

    def run(q: Any, k: Any, v: Any, key_end: Any, positions: Any, dout: Any) -> Any:
        mask = Mask(key_end, positions, (), (window,), "pallas", None, False)
        mask = replace(mask, tables=(backend.prepare(mask, window),))
        out, pull = jax.vjp(lambda q, k, v: backend.attend(q, k, v, mask, rule), q, k, v)
        return (out, pull(dout)) if backward else out

    sharding = jax.sharding.SingleDeviceSharding(device)

    def array(heads: int | None) -> jax.ShapeDtypeStruct:
        if heads is None:
            return jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32, sharding=sharding)
        return jax.ShapeDtypeStruct((ROWS, LENGTH, heads, size), dtype, sharding=sharding)

    shapes = [array(heads) for heads in (HEADS, KV_HEADS, KV_HEADS, None, None, HEADS)]
    jax.jit(run).trace(*shapes).lower(lowering_platforms=("cuda",)).compile()


def _kernels(folder: Path, case: tuple[str, int, str, str]) -> Iterator[Kernel]:
    """Reads and removes the files that Mosaic GPU dumped for each kernel, such as the assembler's report."""
    for by_jax in sorted(folder.glob("*.ptxas")):
        report, passes = by_jax.read_text(errors="replace"), by_jax.with_suffix(".mlir-passes.log")
        complaints_of_jax = _complaints(report)
        if complaints_of_jax:
            ptx, cubin = str(by_jax.with_suffix(".ptx")), str(by_jax.with_suffix(".cubin"))
            report = _output([_tool("ptxas"), "--gpu-name=sm_90a", "--verbose", f"--output-file={cubin}", ptx])
            program = _output([_tool("nvdisasm"), "--print-code", cubin])
        else:
            program = by_jax.with_suffix(".sass_ctrl").read_text()
        steps = _loops(program)
        assert len(steps) == 2, f"{by_jax.stem}: {len(steps)} loops, not one over full and one over mixed blocks"
        with passes.open(errors="replace") as lines:  # tens of MB
            launch = next(line for line in lines if re.search(r"dynamic_shared_memory_size %c\d+_i32", line))
        yield Kernel(
            *case,
            name=re.sub(r"^attention_|_\d+$", "", by_jax.stem).replace("_", ", "),
            registers=_number(r"Used (\d+) registers", report),
            spill_bytes=_number(r"(\d+) bytes spill stores", report),
            shared_bytes=_number(r"dynamic_shared_memory_size %c(\d+)_i32", launch),
            full=len(steps[0]),
            mixed=len(steps[1]),
            wgmma=sum("HGMMA" in instruction for instruction in steps[1]),
            complaints=_complaints(report),
            complaints_of_jax=complaints_of_jax,
        )
        for file in folder.glob(f"{by_jax.stem}.*"):
            file.unlink()


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match is not None, f"{pattern} not in: {text}"
    return int(match[1])


def _complaints(report: str) -> list[str]:
    return [text for code, text in COMPLAINTS.items() if code in report]


def _loops(program: str) -> list[list[str]]:
    """Returns the instructions of each loop that has tensor core products, in the order of the program.

    A loop ends with a branch back to its label. A wait for a barrier spins behind the end of the program (`EXIT`) and
    branches back too; that is none.
    """
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in program.splitlines():
        if label := re.match(r"\s*(\.L_x?_?\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*)", line):
            instructions.append(instruction[1])
            target = re.search(r"BRA.*`\((\.L\w+)\)", line)
            if target and target[1] in labels:
                body = instructions[labels[target[1]] :]
                if any("HGMMA" in i for i in body) and not any("EXIT" in i for i in body):
                    loops.append(body)
    return loops


if __name__ == "__main__":
    run(main)
