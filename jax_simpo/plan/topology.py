"""Describes the hardware that a hardware plan can be made for: names, numbers and memory of its chips.

This module imports jax only in `Topology.devices`, so that the name of a topology and its compiler are checked before
jax is loaded.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from jax_simpo.errors import PlanError

if TYPE_CHECKING:
    import jax

_GIB = 1 << 30


@dataclass(frozen=True)
class Tpu:
    """A TPU chip.

    Attributes:
        axes: number of axes of its torus.
        memory: bytes of high-bandwidth memory that a program may use on a device: all but the compiler's reserve, as
            libtpu 0.0.42 states it when a program does not fit.
        devices: devices of each chip, as jax counts them.
        options: options of the compiler's topology.
    """

    axes: int
    memory: int
    devices: int = 1
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU, as CUDA reports it. The figures are those of XLA's target descriptions (openxla/xla, gpu specs).

    Attributes:
        name: name in CUDA.
        capability: CUDA compute capability.
        memory: bytes of memory.
        cores: streaming multiprocessors.
        lanes: float32 units of each multiprocessor.
        shared_memory: bytes of shared memory of each multiprocessor.
        bandwidth: bytes a second of the memory.
        cache: bytes of the second-level cache.
        clock: GHz.
    """

    name: str
    capability: tuple[int, int]
    memory: int
    cores: int
    lanes: int
    shared_memory: int
    bandwidth: int
    cache: int
    clock: float


# https://docs.cloud.google.com/tpu/docs/v5e and its neighbours give 32, 16, 95, 32 and 192 GB.
TPUS = {
    # jax runs the two cores of a v4 chip as one device ("megacore").
    "v4": Tpu(3, int(30.75 * _GIB), options={"chip_config_name": "megacore"}),
    "v5e": Tpu(2, int(15.75 * _GIB)),
    "v5p": Tpu(3, int(95.74 * _GIB)),
    "v6e": Tpu(2, int(31.25 * _GIB)),
    "tpu7x": Tpu(3, int(94.75 * _GIB), devices=2),
}
_A100 = (108, 64, 167936)
_H100 = (132, 128, 233472)
GPUS = {
    "a100-40": Gpu("NVIDIA A100-SXM4-40GB", (8, 0), 42331013120, *_A100, 1555200000000, 41943040, 1.41),
    "a100-80": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 85100068864, *_A100, 2039040000000, 41943040, 1.41),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 84942979072, *_H100, 3352320000000, 52428800, 1.98),
    "h200": Gpu("NVIDIA H200 141GB HBM3e", (9, 0), 151397597184, *_H100, 4800000000000, 52428800, 1.98),
    "b200": Gpu("NVIDIA B200", (10, 0), 191514411008, 148, 128, 233472, 7672320000000, 132644864, 1.965),
}
# CUDA's contexts and libraries and NCCL's buffers take about so much of a GPU; XLA cannot use it.
_GPU_RESERVED = 2 * _GIB

KNOWN = (
    f"TPUs {', '.join(name + ':' + ('2x2x4' if tpu.axes == 3 else '4x4') for name, tpu in TPUS.items())} (any size of "
    f"the torus; 2xv5e:4x4 is two slices), GPUs {', '.join(f'{name}:8' for name in GPUS)} (or h100:2x8, two hosts of "
    "8), cpu:8"
)


@dataclass(frozen=True)
class Topology:
    """A number of chips of one kind.

    Attributes:
        chip: a key of `TPUS` or `GPUS`, or cpu.
        shape: the shape of a TPU's torus; hosts and GPUs a host, or only the latter; the number of CPU devices.
        slices: number of TPU slices of that shape, with a slower network between them.
    """

    chip: str
    shape: tuple[int, ...]
    slices: int = 1

    @staticmethod
    def parse(text: str) -> Topology:
        """Reads `v5p:2x2x4`, `2xv5e:4x4` (two slices), `h100:8`, `h100:2x8`, `cpu:8`.

        Raises:
            PlanError: the text names no known hardware.
        """
        match = re.fullmatch(r"(?:([1-9]\d*)x)?([a-z][a-z0-9-]*):([1-9]\d*(?:x[1-9]\d*)*)", text.strip().lower())
        chip = match[2] if match else text.partition(":")[0].lower()
        if match is None or (chip != "cpu" and chip not in TPUS and chip not in GPUS):
            raise PlanError(f"--topology {text}: no such topology; known: {KNOWN}")
        slices = int(match[1] or 1)
        if slices > 1 and chip not in TPUS:
            raise PlanError(f"--topology {text}: only TPUs have slices; several hosts of GPUs are {chip}:{slices}x8")
        shape = tuple(int(n) for n in match[3].split("x"))
        axes = {TPUS[chip].axes} if chip in TPUS else {1} if chip == "cpu" else {1, 2}
        if len(shape) not in axes:
            example = "x".join("224"[: max(axes)]) if chip in TPUS else "8"
            numbers = " or ".join(map(str, sorted(axes)))
            raise PlanError(f"--topology {text}: {chip} takes {numbers} number(s), such as {chip}:{example}")
        return Topology(chip, shape, slices)

    def __str__(self) -> str:
        return f"{f'{self.slices}x' if self.slices > 1 else ''}{self._slice}"

    @property
    def _slice(self) -> str:
        return f"{self.chip}:{'x'.join(map(str, self.shape))}"

    @property
    def count(self) -> int:
        """The number of devices, as jax counts them."""
        return self.slices * math.prod(self.shape) * (TPUS[self.chip].devices if self.chip in TPUS else 1)

    @property
    def platform(self) -> Literal["tpu", "cuda", "cpu"]:
        """The platform's name in jax."""
        return "tpu" if self.chip in TPUS else "cuda" if self.chip in GPUS else "cpu"

    @property
    def memory(self) -> int:
        """The bytes of memory that a program may use on each device."""
        if self.chip in TPUS:
            return TPUS[self.chip].memory
        if self.chip in GPUS:
            return GPUS[self.chip].memory - _GPU_RESERVED
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // self.count

    def check_installed(self) -> None:
        """Checks that the compiler for these chips is installed.

        Raises:
            PlanError: it is not; the message says how to install it.
        """
        packages = {"tpu": ("libtpu", "tokamax"), "cuda": (_cuda_plugin(), "absl"), "cpu": ()}[self.platform]
        missing = [package for package in packages if find_spec(package) is None]
        if not missing:
            return
        advice = f"pip install 'jax-simpo[{'tpu' if self.platform == 'tpu' else 'gpu'}]'"
        if missing == ["libtpu"]:
            # Wherever libtpu is installed, jax looks for a TPU at every start, which an everyday environment can avoid.
            advice += "; or, for plans alone, pip install --no-deps --target DIR libtpu, and PYTHONPATH=DIR before plan"
        raise PlanError(
            f"--topology {self}: the compiler for it is not installed here ({', '.join(missing)} missing). The "
            f"hardware itself is not needed: {advice}"
        )

    def environment(self) -> dict[str, str]:
        """Returns the environment variables of the process that compiles. It never uses an accelerator."""
        common = {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(self.count if self.platform == "cpu" else 1),
            "JAX_ENABLE_COMPILATION_CACHE": "0",  # a cached program does not report its memory
        }
        if self.platform == "tpu":
            # Without the first of these, libtpu asks Google's metadata server about this machine.
            quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3"}
            # No TPU is opened here, so several processes may load libtpu at once.
            return common | quiet | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        return common

    def devices(self) -> list[jax.Device]:
        """Returns the devices to compile for; they cannot compute. Call it only in a process with `environment`.

        Raises:
            PlanError: the compiler knows no such chips, or not in this number.
        """
        import jax
        from jax.experimental import topologies

        if self.platform == "cpu":
            return jax.devices()
        try:
            if self.platform == "tpu":
                options: dict[str, Any] = dict(TPUS[self.chip].options)
                if self.slices > 1:
                    options["num_slices"] = self.slices
                chips = topologies.get_topology_desc(platform="tpu", topology_name=self._slice, **options)
            else:
                hosts, gpus_per_host = (1, *self.shape)[-2:]
                chips = topologies.get_topology_desc(
                    platform="cuda",
                    topology_name=self.chip,
                    topology=f"1x{hosts}x{gpus_per_host}",
                    target_config=_target_config(GPUS[self.chip]),
                )
        except Exception as error:  # jax raises several types for a platform that is missing
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise PlanError(f"--topology {self}: the compiler does not know it ({reason}); known: {KNOWN}") from error
        return list(chips.devices)


def _target_config(gpu: Gpu) -> str:
    """Returns the description that XLA needs of a GPU that is not here: a `GpuTargetConfigProto` as text.

    The limits that all of these GPUs share are from the table of compute capabilities in the CUDA programming guide.
    """
    major, minor = gpu.capability
    # The kernels use instructions that exist on one capability only (the tensor cores of Hopper and Blackwell).
    features = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {gpu.shared_memory - 1024}
  shared_memory_per_core: {gpu.shared_memory}
  core_count: {gpu.cores}
  fpus_per_core: {gpu.lanes}
  memory_bandwidth: {gpu.bandwidth}
  l2_cache_size: {gpu.cache}
  clock_rate_ghz: {gpu.clock}
  device_memory_size: {gpu.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {features} }}
}}
runtime_version {{ major: 12 minor: 9 patch: 1 }}
dnn_version_info {{ major: 9 minor: 10 }}
platform_name: "CUDA"
device_description_str: "{gpu.name}"
"""


def _cuda_plugin() -> str:
    """Returns the name of the CUDA plugin of jax that is installed, or of the one that the project's extra brings."""
    return next((name for name in ("jax_cuda12_plugin", "jax_cuda13_plugin") if find_spec(name)), "jax_cuda12_plugin")
