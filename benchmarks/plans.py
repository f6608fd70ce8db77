"""Which models fit which TPUs and GPUs, with which memory and which collectives?

Compiles the step of each config in configs/plan for several topologies with `jax-simpo plan`, each in a process of its
own and as many at once as there are cores, and reports the memory of a device and the collectives of a step; then the
memory of models of 0.1 to 70 billion parameters on the GPUs that they need. No such hardware is needed, and nothing is
run. A plan that fails is named on the page with its error, and the exit status is 1.

Expected: every step fits with one row a device.

Needs the compilers: libtpu and `jax[cuda12]` (CONTRIBUTING.md says how to keep them out of the environment).
Takes about 46 minutes of processor time; on two CPU cores that other work shared it took 84 minutes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

from benchmarks.facts import machine_facts
from benchmarks.models import model_mapping
from benchmarks.options import Option, run
from benchmarks.results import Result, Table

MODELS = {
    "plan/llama-3-8b": "Llama-3-8B",
    "plan/gemma-2-9b": "Gemma-2-9b",
    "plan/mistral-7b": "Mistral-7B",
}
TOPOLOGIES = ("v5p:2x2x4", "v5e:16x16", "v6e:16x16", "2xv5e:16x16", "h100:8")
# Model of `models.MODELS`, whether it trains an adapter, and GPUs that it fits. Everything else is as in
# configs/plan/llama-3-8b.yaml.
SIZES = (
    ("smollm2-135m", False, "h100:1"),
    ("llama-3.2-1b", False, "h100:1"),
    ("llama-3.2-3b", False, "h100:1"),
    ("llama-3-8b", True, "h100:1"),
    ("llama-3-8b", False, "h100:4"),
    ("llama-3-70b", True, "h100:8"),
    ("llama-3-70b", False, "h100:4x8"),
)
LORA = ("--use_peft=true", "--lora_r=16", "--lora_alpha=32")
PACKAGES = ("libtpu", "tokamax", "jax-cuda12-plugin", "jax-cuda13-plugin")
PARTS = ("parameters + optimizer", "gradients", "activations", "other", "total", "of")
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all")
GIB = 1 << 30


def main(
    output: Annotated[Path, Option("Folder for the results.")] = Path("docs/benchmarks"),
    topology: Annotated[list[str] | None, Option("A topology to compile for (repeatable).")] = None,
    quick: Annotated[bool, Option("One model on eight devices of a CPU, to see that it works.")] = False,
) -> None:
    """Compiles the steps and writes the report."""
    models = ["plan/mistral-7b"] if quick else list(MODELS)
    topologies = topology or (["cpu:8"] if quick else list(TOPOLOGIES))
    cells = [(model, place, ()) for model in models for place in topologies]
    sizes = [("tiny", True, "cpu:1")] if quick else [size for size in SIZES if size[2].startswith(_kinds(topologies))]
    by_size = [("plan/llama-3-8b", place, _sizes_of(model, lora)) for model, lora, place in sizes]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each waits for a process
        found = list(pool.map(lambda cell: _plan(*cell), [*cells, *by_size]))
    plans = [(MODELS[model], place, plan) for (model, place, _), plan in zip(cells, found, strict=False)]
    sized = [
        (f"{model}, LoRA" if lora else model, place, plan)
        for (model, lora, place), plan in zip(sizes, found[len(cells) :], strict=True)
    ]
    Result(
        name="plans",
        title="Llama-3-8B, Gemma-2-9b and Mistral-7B, as compiled",
        about="What `jax-simpo plan` says of the configs in [configs/plan](../../configs/plan). They have the batch of "
        "the published runs (128 pairs) and their lengths, and made-up pairs of UltraFeedback's lengths. bfloat16, "
        "`remat: full`, everything on `fsdp`, but slices on `data`. Compiled, not run: no such hardware was at hand. "
        "[plan.md](../plan.md) explains the columns.",
        facts=machine_facts("none") | {"compilers": _versions()},
        tables=[
            _memory_table(
                "Memory of a device, GiB",
                plans,
                "Every step is one micro-batch with one row a device. A row is at least as long as the longest pair, "
                "2048 tokens.",
            ),
            Table(
                "Collectives of a step: how many, and GiB of the whole arrays",
                ["model", "topology", *KINDS],
                [[model, place, *_collectives(plan)] for model, place, plan in plans],
                "Each compiler reduces gradients in its own way: by reduce-scatters, by all-reduces, or by "
                "collective-permutes.",
            ),
            _memory_table(
                "Memory of a device by the size of the model, GiB",
                sized,
                "The settings of plan/llama-3-8b with another model; LoRA has rank 16 on all linear layers but the "
                "head. One row a device in a micro-batch.",
            ),
        ],
        data={"plans": [{"model": model, **plan} for model, _, plan in [*plans, *sized]]},
    ).write(output)
    if failed := [f"{model} on {place}" for model, place, plan in [*plans, *sized] if "error" in plan]:
        sys.exit(f"not compiled: {', '.join(failed)}")


def _kinds(topologies: Iterable[str]) -> tuple[str, ...]:
    """Returns what is left of topologies without their sizes, such as `h100`."""
    return tuple(place.partition(":")[0] for place in topologies)


def _sizes_of(model: str, lora: bool) -> tuple[str, ...]:
    """Returns the overrides that give a config the sizes of a model, and an adapter."""
    return f"--model_config={json.dumps(model_mapping(model))}", *(LORA if lora else ())


def _plan(model: str, topology: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Returns the hardware plan of a config as `--json` prints it, or the last line of its error."""
    print(f"{model} on {topology}", flush=True)
    command = [sys.executable, "-m", "jax_simpo", "plan", f"builtin:{model}", "--topology", topology, *overrides]
    if slices := re.match(r"(\d+)x[a-z]", topology):  # the network between slices is for gradients alone
        command.append(f"--mesh.data={slices[1]}")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([*command, "--json", "--no-search"], capture_output=True, text=True, env=environment)
    try:
        plan: dict[str, Any] = json.loads(done.stdout)  # the exit status is 1 where a step does not fit
    except json.JSONDecodeError:
        plan = {"error": " ".join(done.stderr.split())[-300:]}
        print(plan["error"], flush=True)
    return plan


def _memory_table(title: str, plans: Sequence[tuple[str, str, Mapping[str, Any]]], note: str) -> Table:
    columns = ["model", "topology", "attention", "row", *PARTS]
    return Table(title, columns, [[model, place, *_memory(plan)] for model, place, plan in plans], note)


def _memory(plan: Mapping[str, Any]) -> list[str]:
    if "error" in plan:
        return [plan["error"], "", *("" for _ in PARTS)]
    memory = plan["memory"]
    parts = (
        memory["parameters"] + memory["optimizer"],
        memory["gradients"],
        memory["activations"],
        memory["rows"] + memory["working"],
        plan["bytes_per_device"]["total"],
        plan["capacity"],
    )
    return [plan["attention"], str(plan["row"]["length"]), *(f"{size / GIB:.2f}" for size in parts)]


def _collectives(plan: Mapping[str, Any]) -> list[str]:
    found = plan.get("collectives", {})
    unknown = set(found) - set(KINDS)
    assert not unknown, f"a kind of collective without a column: {unknown}"
    return [f"{found[kind]['count']}, {found[kind]['bytes'] / GIB:.1f}" if kind in found else "" for kind in KINDS]


def _versions() -> str:
    installed = {dist.metadata["Name"]: dist.version for dist in metadata.distributions()}
    return ", ".join(f"{name} {installed[name]}" for name in PACKAGES if name in installed)


if __name__ == "__main__":
    run(main)
