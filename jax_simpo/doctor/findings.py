"""Says what is wrong with a machine, or could be better, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from jax_simpo.doctor.facts import Facts
from jax_simpo.pages import page_url

_PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin")
_OLDEST_DRIVERS = {"jax-cuda12-plugin": 525, "jax-cuda13-plugin": 580}  # of the CUDA version, by NVIDIA's release notes
_FEW_CORES = 4


@dataclass(frozen=True)
class Finding:
    """Something to mend.

    Attributes:
        level: `error` for what stops a run or spoils it, `warning` for what makes it slower or could spoil it, `note`
            for what you may want to know.
        text: what is so.
        advice: what to do.
    """

    level: Literal["error", "warning", "note"]
    text: str
    advice: str


def find(facts: Facts) -> list[Finding]:
    """Returns the findings on a machine, errors first."""
    order = ("error", "warning", "note")
    found = [*_devices(facts), *_versions(facts), *_settings(facts)]
    return sorted(found, key=lambda finding: order.index(finding.level))


def _devices(facts: Facts) -> Iterator[Finding]:
    plugins = [name for name in _PLUGINS if name in facts.versions]
    if facts.nvidia_gpus and facts.platform != "gpu":
        text = f"{_computes(facts)}, and this machine has {facts.nvidia_gpus[0]}"
        if wanted := facts.environment.get("JAX_PLATFORMS"):
            yield Finding("error", f"{text}: JAX_PLATFORMS is {wanted}", "Unset JAX_PLATFORMS, or set it to cuda")
        elif not plugins:
            yield Finding("error", f"{text}: JAX's CUDA plugin is not installed", "pip install 'jax-simpo[gpu]'")
        else:
            advice = "Run `python -c 'import jax; jax.devices(\"cuda\")'`, which prints the driver's reason"
            yield Finding("error", f"{text}, though {plugins[0]} is installed", advice)
    if facts.tpu_chips and facts.platform != "tpu":
        text = f"{_computes(facts)}, and this machine has {facts.tpu_chips} TPU chips"
        if "libtpu" not in facts.versions:
            yield Finding("error", f"{text}: libtpu is not installed", "pip install 'jax-simpo[tpu]'")
        else:
            advice = "End the process that holds the chips (`fuser /dev/accel0 /dev/vfio/0`), and unset JAX_PLATFORMS"
            yield Finding("error", text, advice)
    if facts.system != "Linux":
        yield Finding(
            "note",
            f"JAX computes on NVIDIA GPUs and TPUs on Linux alone, and this is {facts.system}: the extras `gpu` and "
            "`tpu` add nothing here",
            "Use a machine with Linux, or WSL2 on Windows",
        )
    elif plugins and not facts.nvidia_gpus and facts.platform != "gpu":
        yield Finding(
            "note",
            f"{plugins[0]} is installed, and NVIDIA's driver lists no GPU",
            f"Install NVIDIA's driver, {_OLDEST_DRIVERS[plugins[0]]} or later; start a container with `--gpus all`",
        )
    wanted = facts.environment.get("JAX_PLATFORMS")
    if not facts.devices and wanted and not facts.nvidia_gpus and not facts.tpu_chips:
        yield Finding(
            "error",
            f"JAX_PLATFORMS is {wanted}, and the driver lists no such device",
            "Unset JAX_PLATFORMS, or install the driver and the extra `gpu` or `tpu`",
        )
    if facts.platform == "gpu" and facts.capability is None:
        yield Finding(
            "note",
            f"{facts.device_kind} has no CUDA compute capability, so it is not NVIDIA's. It runs what XLA compiles: "
            "`banded`, `blockwise` and `dense`, and of the loss head `xla`. This program has never run on such a GPU",
            "The tables above say what is right and how fast; please report what this command prints with --json",
        )
    if facts.platform in ("gpu", "tpu") and facts.cores < _FEW_CORES * facts.devices:
        share = facts.cores / facts.devices
        yield Finding(
            "note",
            f"{facts.cores} CPU cores for {facts.devices} devices: {share:.3g} each. Building rows takes little, but "
            "compiling at the start takes what there is",
            f"Give the process {_FEW_CORES} cores a device where you can choose",
        )


def _computes(facts: Facts) -> str:
    return f"JAX computes on the {facts.platform.upper()}" if facts.devices else "JAX computes on nothing"


def _versions(facts: Facts) -> Iterator[Finding]:
    plugins = [name for name in _PLUGINS if name in facts.versions]
    jaxlib = facts.versions.get("jaxlib", "")
    for plugin in plugins:
        if facts.version(plugin)[:3] != facts.version("jaxlib")[:3]:
            advice = f"pip install '{plugin}=={jaxlib}', or `pip install -U 'jax-simpo[gpu]'`"
            yield Finding("error", f"{plugin} {facts.versions[plugin]} stands beside jaxlib {jaxlib}", advice)
        driver = int((facts.nvidia_driver or "0").partition(".")[0])
        if 0 < driver < _OLDEST_DRIVERS[plugin]:
            yield Finding(
                "error",
                f"the NVIDIA driver is {facts.nvidia_driver}, and {plugin} needs {_OLDEST_DRIVERS[plugin]} or later",
                "Update the driver" + (", or install jax[cuda12]" if plugin.endswith("13-plugin") else ""),
            )
    if len(plugins) > 1:
        advice = f"pip uninstall {plugins[0]} {plugins[0].replace('plugin', 'pjrt')}, or the other pair"
        yield Finding("warning", f"{' and '.join(plugins)} are both installed; JAX takes one of them", advice)
    if facts.version("jax") >= (0, 11, 1) and () < facts.version("flax") < (0, 12, 9):
        advice = "pip install -U 'flax>=0.12.9'"
        yield Finding("error", f"flax {facts.versions['flax']} breaks on jax {facts.versions['jax']}", advice)
    if facts.platform == "gpu" and (12, 8) <= facts.version("nvidia-cuda-nvcc-cu12") < (12, 9, 86):
        version = facts.versions["nvidia-cuda-nvcc-cu12"]
        advice = "pip install -U 'nvidia-cuda-nvcc-cu12>=12.9.86'"
        yield Finding(
            "warning", f"CUDA's compiler is {version}; 12.8.0 to 12.9.0 are known to miscompile causal masks", advice
        )
    hopper = facts.capability is not None and facts.capability[0] == 9
    if hopper and facts.version("jax") >= (0, 12):
        yield Finding(
            "warning",
            "where there is no GPU, jax 0.12 compiles the `pallas` kernels in a way that ignores their trade of "
            "registers between warpgroups, which makes them spill. Whether it does so with a GPU is not known",
            "Compare the time of `pallas` above with that under jax 0.10 or 0.11",
        )
    # On Hopper an older jax is the better one, see above.
    if facts.platform in ("gpu", "tpu") and not hopper and facts.python.startswith("3.11."):
        advice = "Use Python 3.12 or later to get the newest jax"
        yield Finding("note", f"Python 3.11 gets jax up to 0.10; this is jax {facts.versions.get('jax')}", advice)


def _settings(facts: Facts) -> Iterator[Finding]:
    unset = not {"XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE"} & facts.environment.keys()
    if facts.platform == "gpu" and unset:
        yield Finding(
            "warning",
            "JAX takes 75 % of the GPU's memory, its default; rows and micro-batches are planned for that",
            "export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92",
        )
    if facts.compilation_cache is None:
        yield Finding(
            "warning",
            "compiled programs are not kept: there is no home that can be written to, so every start compiles again",
            "export JAX_COMPILATION_CACHE_DIR=/a/folder, on a file system that all hosts share",
        )
    elif facts.hosts > 1 and "JAX_COMPILATION_CACHE_DIR" not in facts.environment:
        yield Finding(
            "note",
            f"the environment names {facts.hosts} hosts, and each keeps compiled programs in its own "
            f"{facts.compilation_cache}, unless they share that folder",
            "export JAX_COMPILATION_CACHE_DIR=/a/folder, on a file system that all hosts share",
        )
    if facts.devices > 1 or facts.hosts > 1:
        reasons: dict[str, list[str]] = {}
        for option, reason in facts.xla_options_left_out.items():
            reasons.setdefault(reason, []).append(option)
        for reason, options in reasons.items():
            yield Finding(
                "note",
                f"the step is compiled without {', '.join(options)}: {reason}",
                f"{page_url('performance')} says what they do, and what decides",
            )
