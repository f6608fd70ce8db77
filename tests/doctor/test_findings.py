"""Every known fault of a machine is found, with advice, and a sound machine has none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from jax_simpo.doctor.facts import Facts, gather_facts
from jax_simpo.doctor.findings import find

H100 = Facts(
    system="Linux",
    python="3.12.3",
    versions={"jax": "0.11.2", "jaxlib": "0.11.2", "jax-cuda13-plugin": "0.11.2", "flax": "0.12.12"},
    platform="gpu",
    device_kind="NVIDIA H100 80GB HBM3",
    devices=1,
    device_memory=78 << 30,
    capability=(9, 0),
    nvidia_gpus=["NVIDIA H100 80GB HBM3"],
    nvidia_driver="580.65.06",
    tpu_chips=0,
    hosts=1,
    cores=16,
    host_memory=128 << 30,
    environment={"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"},
    compilation_cache="/home/user/.cache/jax-simpo/xla",
    xla_options={"xla_gpu_enable_latency_hiding_scheduler": True},
    xla_options_left_out={},
)
SWITCHED_OFF = {"xla_gpu_a": "JAX_SIMPO_XLA_FLAGS is false", "xla_gpu_b": "JAX_SIMPO_XLA_FLAGS is false"}
CPU_OF_GPU = {"platform": "cpu", "capability": None, "device_memory": None}


def with_versions(**versions: str) -> dict[str, Any]:
    return {"versions": {name.replace("_", "-"): version for name, version in versions.items()}}


def test_a_sound_machine_has_no_findings() -> None:
    assert find(H100) == []


def test_a_hopper_gpu_is_not_sent_to_the_jax_that_it_is_warned_of() -> None:
    versions = with_versions(jax="0.10.2", jaxlib="0.10.2", jax_cuda12_plugin="0.10.2", flax="0.12.8")
    assert find(replace(H100, python="3.11.7", **versions)) == []


@pytest.mark.parametrize(
    ("changes", "level", "text", "advice"),
    [
        (
            {**CPU_OF_GPU, **with_versions(jax="0.11.2", jaxlib="0.11.2")},
            "error",
            "this machine has NVIDIA H100 80GB HBM3: JAX's CUDA plugin is not installed",
            "jax-simpo[gpu]",
        ),
        (
            {**CPU_OF_GPU, "environment": {"JAX_PLATFORMS": "cpu"}},
            "error",
            "JAX_PLATFORMS is cpu",
            "Unset JAX_PLATFORMS",
        ),
        (
            {
                "platform": "none",
                "devices": 0,
                "capability": None,
                "nvidia_gpus": [],
                "environment": {"JAX_PLATFORMS": "cuda"},
            },
            "error",
            "JAX_PLATFORMS is cuda, and the driver lists no such device",
            "Unset JAX_PLATFORMS",
        ),
        (CPU_OF_GPU, "error", "though jax-cuda13-plugin is installed", "prints the driver's reason"),
        (
            {**CPU_OF_GPU, "nvidia_gpus": [], "tpu_chips": 4, **with_versions(jax="0.11.2", jaxlib="0.11.2")},
            "error",
            "4 TPU chips: libtpu is not installed",
            "jax-simpo[tpu]",
        ),
        (
            {
                **CPU_OF_GPU,
                "nvidia_gpus": [],
                "tpu_chips": 4,
                **with_versions(jax="0.11.2", jaxlib="0.11.2", libtpu="0.0.48"),
            },
            "error",
            "JAX computes on the CPU, and this machine has 4 TPU chips",
            "process that holds the chips",
        ),
        (
            with_versions(jax="0.11.2", jaxlib="0.11.2", jax_cuda13_plugin="0.10.2"),
            "error",
            "jax-cuda13-plugin 0.10.2 stands beside jaxlib 0.11.2",
            "jax-cuda13-plugin==0.11.2",
        ),
        (
            {"nvidia_driver": "570.12"},
            "error",
            "the NVIDIA driver is 570.12, and jax-cuda13-plugin needs 580",
            "cuda12",
        ),
        (
            with_versions(jax="0.11.2", jaxlib="0.11.2", jax_cuda12_plugin="0.11.2", jax_cuda13_plugin="0.11.2"),
            "warning",
            "are both installed",
            "pip uninstall jax-cuda12-plugin jax-cuda12-pjrt",
        ),
        (
            with_versions(jax="0.11.2", jaxlib="0.11.2", jax_cuda13_plugin="0.11.2", flax="0.12.8"),
            "error",
            "flax 0.12.8 breaks on jax 0.11.2",
            "flax>=0.12.9",
        ),
        (
            with_versions(jax="0.11.2", jaxlib="0.11.2", jax_cuda12_plugin="0.11.2", nvidia_cuda_nvcc_cu12="12.9.41"),
            "warning",
            "known to miscompile causal masks",
            "12.9.86",
        ),
        (
            with_versions(jax="0.12.0.1", jaxlib="0.12.0.1", jax_cuda12_plugin="0.12.0.1"),
            "warning",
            "ignores their trade of registers",
            "Compare the time of `pallas`",
        ),
        ({"environment": {}}, "warning", "75 % of the GPU's memory", "XLA_PYTHON_CLIENT_MEM_FRACTION=0.92"),
        ({"compilation_cache": None}, "warning", "every start compiles again", "JAX_COMPILATION_CACHE_DIR"),
        ({"devices": 8}, "note", "16 CPU cores for 8 devices: 2 each", "4 cores a device"),
        (
            {**CPU_OF_GPU, "nvidia_gpus": []},
            "note",
            "jax-cuda13-plugin is installed, and NVIDIA's driver lists no GPU",
            "driver, 580 or later; start a container with `--gpus all`",
        ),
        (
            {**CPU_OF_GPU, "nvidia_gpus": [], "system": "Darwin", **with_versions(jax="0.11.2", jaxlib="0.11.2")},
            "note",
            "this is Darwin: the extras `gpu` and `tpu` add nothing here",
            "a machine with Linux, or WSL2",
        ),
        (
            {
                "device_kind": "AMD Instinct MI300X",
                "capability": None,
                "nvidia_gpus": [],
                **with_versions(jax="0.11.2"),
            },
            "note",
            "AMD Instinct MI300X has no CUDA compute capability",
            "report",
        ),
        (
            {"devices": 4, "xla_options_left_out": SWITCHED_OFF},
            "note",
            "compiled without xla_gpu_a, xla_gpu_b: JAX_SIMPO_XLA_FLAGS is false",
            "performance.html",
        ),
        (
            {"hosts": 2, "xla_options_left_out": {"xla_gpu_a": "the installed XLA does not know it"}},
            "note",
            "compiled without xla_gpu_a: the installed XLA does not know it",
            "what decides",
        ),
        (
            {"hosts": 4},
            "note",
            "the environment names 4 hosts, and each keeps compiled programs in its own /home/user/.cache",
            "JAX_COMPILATION_CACHE_DIR",
        ),
        ({"python": "3.11.7", "capability": (8, 0)}, "note", "Python 3.11 gets jax up to 0.10", "Python 3.12"),
    ],
)
def test_each_fault_is_found_with_advice(changes: dict[str, Any], level: str, text: str, advice: str) -> None:
    found = find(replace(H100, **changes))
    matching = [finding for finding in found if text in finding.text]
    assert len(matching) == 1, found
    assert matching[0].level == level and advice in matching[0].advice
    assert [finding.level for finding in found] == sorted(
        (finding.level for finding in found), key=["error", "warning", "note"].index
    )


def test_hosts_that_share_a_cache_and_single_gpus_without_options_are_sound() -> None:
    shared = {**H100.environment, "JAX_COMPILATION_CACHE_DIR": "/shared/xla"}
    assert find(replace(H100, hosts=4, environment=shared)) == []
    assert find(replace(H100, xla_options_left_out=SWITCHED_OFF)) == []


def test_the_facts_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "3")
    monkeypatch.setenv("JAX_SIMPO_XLA_FLAGS", "false")
    facts = gather_facts()
    assert facts.hosts == 3 and facts.xla_options == facts.xla_options_left_out == {}  # there are none for CPUs
    assert facts.environment["SLURM_JOB_NUM_NODES"] == "3" and facts.environment["JAX_SIMPO_XLA_FLAGS"] == "false"
    assert facts.platform == "cpu" and facts.devices >= 1 and facts.cores >= 1 and facts.host_memory > 1 << 30
    assert facts.version("jax") >= (0, 10, 2) and facts.version("no such package") == ()
    assert facts.environment["JAX_PLATFORMS"] == "cpu"
