"""Do our attention kernels compile for an H100, and how much of its registers and shared memory do they need?

Compiles the forward and backward kernels of `attention: pallas` for an H100, which the machine need not have, and
reports for each kernel the registers, the spilled bytes, the shared memory and the tensor core instructions. Nothing is
run: the report shows that the kernels fit the hardware, not how fast they are.

Expected: every combination compiles without complaint; no kernel asks for more than the 227 KiB of shared memory a
Hopper block may have; heads of up to 128 in bfloat16 spill less than 100 bytes a lane, no kernel more than 500.

Needs no GPU, but its compiler: `pip install "jax[cuda12]" absl-py jaxtyping`, or cuda13. Takes two to four minutes on
two CPU cores (`--quick`: half a minute).
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from benchmarks.facts import installed_versions, machine_facts
from benchmarks.options import Option, run
from benchmarks.results import Result, Table

ROWS, LENGTH, HEADS, KV_HEADS = 2, 1024, 8, 2
# Windows and caps of published models: none (Llama), a window (Mistral), window and cap (Gemma 2).
VARIANTS: dict[str, tuple[int | None, float | None]] = {
    "plain": (None, None),
    "window": (512, None),
    "window, cap": (512, 50.0),
}

COMPLAINTS = {
    "'setmaxnreg' ignored": "trade of registers ignored",
    "wgmma.mma_async instructions are serialized": "tensor core products serialised",
}


@dataclass(frozen=True)
class Kernel:
    """The report of the assembler and the compiler about one kernel.

    Attributes:
        registers: registers of a lane at launch. Warpgroups then trade registers (240 for one that computes, 24 for
            the one that fetches), and the assembler allots and spills by those numbers.
        shared_bytes: shared memory of a block of threads.
        wgmma: number of tensor core instructions in the program text.
        complaints: warnings of the assembler that it ignored the trade of registers or serialised products.
    """

    dtype: str
    head_size: int
    variant: str
    name: str
    registers: int
    spill_store_bytes: int
    spill_load_bytes: int
    shared_bytes: int
    wgmma: int
    complaints: list[str]


def main(
    output: Annotated[Path, Option("Folder for the results.")] = Path("docs/benchmarks"),
    quick: Annotated[bool, Option("One dtype and head size, to see that it works.")] = False,
) -> None:
    """Compiles the kernels and writes the report."""
    with tempfile.TemporaryDirectory() as folder:
        # Mosaic GPU reads these when it compiles. They must be set before jax is imported.
        os.environ |= {"MOSAIC_GPU_DUMP_TO": folder, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "0"}
        device = _device()
        from jax_simpo.ops.attention.pallas.backend import HEAD_SIZES

        kernels = []
        for dtype, sizes in [("bfloat16", (128,))] if quick else HEAD_SIZES.items():
            for size in sizes:
                for variant in VARIANTS:
                    _compile(device, dtype, size, variant)
                    kernels += list(_kernels(Path(folder), dtype, size, variant))
                    print(f"compiled {dtype} {size} {variant}", flush=True)
    columns = [
        "dtype",
        "head size",
        "variant",
        "kernel",
        "registers",
        "spilled bytes",
        "shared memory",
        "wgmma",
        "complaints",
    ]
    rows = [[*_row(kernel), "; ".join(kernel.complaints) or "none"] for kernel in kernels]
    note = (
        "Registers: of a lane at launch, when three warpgroups share the 64k of a block; the warpgroups that compute "
        "then take 240, the one that fetches keeps 24. Spilled bytes: of a lane, counted once per store in the program "
        "text. A block may have 227 KiB of shared memory."
    )
    Result(
        name="kernel_report",
        title="Registers and shared memory of the attention kernels on an H100",
        about="Compiled for an H100, not run. " + _about(),
        facts=machine_facts(f"none; compiled for {device.device_kind}") | {"cuda": _versions()},
        tables=[Table("Kernels", columns, rows, note)],
        data=[asdict(kernel) for kernel in kernels],
    ).write(output)


def _row(k: Kernel) -> list[Any]:
    shared = f"{k.shared_bytes / 1024:.0f} KiB"
    return [k.dtype, k.head_size, k.variant, k.name, k.registers, k.spill_store_bytes, shared, k.wgmma]


def _about() -> str:
    return f"{ROWS} rows of {LENGTH}, {HEADS} query heads and {KV_HEADS} key/value heads."


def _versions() -> str:
    plugins = "jax-cuda12-plugin", "jax-cuda13-plugin"
    compilers = "nvidia-cuda-nvcc-cu12", "nvidia-cuda-nvcc"  # that of CUDA 13 has no number in its name
    return ", ".join(installed_versions((*plugins, *compilers)))


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


def _compile(device: Any, dtype: str, size: int, variant: str) -> None:
    import jax
    import jax.numpy as jnp

    from jax_simpo.ops.attention import attention, prepare_mask

    window, softcap = VARIANTS[variant]

    def attend_and_back(q: Any, k: Any, v: Any, key_end: Any, positions: Any, dout: Any) -> Any:
        mask = prepare_mask(key_end, positions, (window,), "pallas")

        def attend(q: Any, k: Any, v: Any) -> Any:
            return attention(q, k, v, mask, scale=size**-0.5, window=window, softcap=softcap)

        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(dout)

    sharding = jax.sharding.SingleDeviceSharding(device)

    def array(heads: int | None) -> jax.ShapeDtypeStruct:
        if heads is None:
            return jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32, sharding=sharding)
        return jax.ShapeDtypeStruct((ROWS, LENGTH, heads, size), dtype, sharding=sharding)

    shapes = [array(heads) for heads in (HEADS, KV_HEADS, KV_HEADS, None, None, HEADS)]
    jax.jit(attend_and_back).trace(*shapes).lower(lowering_platforms=("cuda",)).compile()


def _kernels(folder: Path, dtype: str, size: int, variant: str) -> Iterator[Kernel]:
    """Reads and removes the files that Mosaic GPU dumped for each kernel, such as the assembler's report."""
    for report in sorted(folder.glob("*.ptxas")):
        assembled = report.read_text()
        ptx, passes = report.with_suffix(".ptx"), report.with_suffix(".mlir-passes.log")

        def number(pattern: str, text: str = assembled) -> int:
            match = re.search(pattern, text)
            assert match is not None, f"{pattern} not in the assembler's report: {text}"
            return int(match[1])

        with passes.open(errors="replace") as lines:  # tens of MB
            launch = next(line for line in lines if re.search(r"dynamic_shared_memory_size %c\d+_i32", line))
        yield Kernel(
            dtype=dtype,
            head_size=size,
            variant=variant,
            name=re.sub(r"^attention_|_\d+$", "", report.stem).replace("_", ", "),
            registers=number(r"Used (\d+) registers"),
            spill_store_bytes=number(r"(\d+) bytes spill stores"),
            spill_load_bytes=number(r"(\d+) bytes spill loads"),
            shared_bytes=number(r"dynamic_shared_memory_size %c(\d+)_i32", launch),
            wgmma=ptx.read_text().count("wgmma.mma_async"),
            complaints=[text for code, text in COMPLAINTS.items() if code in assembled],
        )
        for file in folder.glob(f"{report.stem}.*"):
            file.unlink()


if __name__ == "__main__":
    run(main)
