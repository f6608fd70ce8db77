"""Tests how processes find each other, and the launch files."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from jax_simpo import cli
from jax_simpo.config import builtin, load_config
from jax_simpo.errors import LaunchError
from jax_simpo.processes import launch
from jax_simpo.processes.launch import Join, Launch, find, named_hosts

ROOT = Path(__file__).parents[2]
FILES = ROOT / "configs" / "launch"
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}
FOUND_BY_JAX = Join()


@pytest.mark.parametrize(
    ("options", "environment", "expected"),
    [
        ({}, {}, None),
        ({"num_processes": 1}, {}, None),
        ({"num_processes": 1, "process_id": 0, "coordinator_address": "a:1"}, {}, None),
        (
            {"coordinator_address": "a:1", "num_processes": 2, "process_id": 1},
            SLURM,
            Join("a:1", 2, 1),
        ),
        ({"coordinator_address": "a:1"}, SLURM, Join("a:1")),
        ({"distributed": True}, {}, FOUND_BY_JAX),
        ({"distributed": False}, SLURM, None),
        ({}, SLURM, FOUND_BY_JAX),
        ({}, {**SLURM, "SLURM_NTASKS": "1"}, None),
        # A batch script without `srun`: tasks were asked for, but this process is none of them.
        ({}, {k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}, None),
        # The only task of a node takes all its GPUs. Of several tasks each takes one GPU, by JAX's own rule.
        (
            {},
            {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_ON_NODE": "4"},
            Join(local_device_ids=(0, 1, 2, 3)),
        ),
        (
            {},
            {**SLURM, "SLURM_NTASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_GPUS_ON_NODE": "4"},
            FOUND_BY_JAX,
        ),
        ({}, {**POD, "TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "3"}, FOUND_BY_JAX),
        ({}, {**POD, "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
        ({}, {"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, FOUND_BY_JAX),
        ({}, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
    ],
)
def test_processes_are_found_by_options_or_by_the_environment(
    options: dict[str, Any], environment: dict[str, str], expected: Join | None
) -> None:
    assert find(Launch(**options), environment) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_processes": 2, "process_id": 0}, "takes three options"),
        ({"coordinator_address": "a:1"}, "takes three options"),
        ({"coordinator_address": "a", "num_processes": 2, "process_id": 0}, "give HOST:PORT, such as a:8476"),
        ({"coordinator_address": "a:1", "num_processes": 2, "process_id": 2}, "processes count from 0 to 1"),
        ({"coordinator_address": "a:1", "num_processes": 2, "process_id": -1}, "processes count from 0 to 1"),
        ({"distributed": False, "process_id": 1}, "give only one"),
    ],
)
def test_a_place_that_is_none_is_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        find(Launch(**options), {})


@pytest.mark.parametrize(
    ("environment", "hosts"),
    [
        ({}, 1),
        ({"SLURM_JOB_NUM_NODES": "4"}, 4),
        ({"SLURM_JOB_NUM_NODES": "4", "SLURM_STEP_NUM_NODES": "2"}, 2),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c,d"}, 4),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "2"}, 4),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, 1),
        (
            {"TPU_WORKER_HOSTNAMES": "WARNING: could not determine hostnames, please set them, otherwise libtpu fails"},
            1,
        ),
    ],
)
def test_the_environment_says_how_many_hosts_there_are(environment: dict[str, str], hosts: int) -> None:
    assert named_hosts(environment) == hosts


def test_a_pod_that_cannot_find_the_others_does_not_train_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(LaunchError, match=r"pod 3 of an indexed Kubernetes job.*`--no-distributed`"):
        find(Launch(), POD)
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda _: object())
    assert find(Launch(), POD) == FOUND_BY_JAX


# --- the files


def in_shell(path: Path) -> list[str]:
    """Returns the arguments of the one `jax-simpo` command in a script, its variables replaced by their values."""
    text = re.sub(r"\\\n", " ", path.read_text())
    (line,) = (line for line in text.splitlines() if "jax-simpo train" in line and not line.startswith("#"))
    default = re.search(r'^CONFIG="\$\{1:-(.*)\}"$', text, re.MULTILINE)
    assert default is not None
    words = shlex.split(line[line.index("jax-simpo") :])
    values = {"$CONFIG": default[1], "--mesh.data=$SLURM_NNODES": "--mesh.data=2"}
    return [values.get(word, word) for word in words if word != "${@:2}"]


def the_container(path: Path) -> dict[str, Any]:
    """Returns the one container of a JobSet's pods."""
    (job,) = yaml.safe_load(path.read_text())["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    return container


def in_jobset(path: Path) -> list[str]:
    container = the_container(path)
    return [*container["command"], *container["args"]]


@pytest.mark.parametrize("name", ["multi-gpu.sh", "slurm.sbatch", "gke-tpu.yaml"])
def test_a_launch_file_uses_options_and_keys_that_are_there(name: str) -> None:
    words = in_jobset(FILES / name) if name.endswith(".yaml") else in_shell(FILES / name)
    program, command, config, *arguments = words
    assert program == "jax-simpo"
    click: Any = get_command(cli.app)
    options = {o for parameter in click.commands[command].params for o in (*parameter.opts, *parameter.secondary_opts)}
    overrides = [word for word in arguments if word.partition("=")[0] not in options]
    load_config(config, overrides)


def test_the_jobset_names_only_what_its_image_or_its_volume_has() -> None:
    """A pod starts in an empty folder, and what it writes elsewhere than on the volume is lost with it."""
    container = the_container(FILES / "gke-tpu.yaml")
    volumes = tuple(f"{mount['mountPath']}/" for mount in container["volumeMounts"])
    assert all(volume.startswith("/") for volume in volumes)
    _, config, *overrides = container["args"]
    assert config.startswith((builtin.PREFIX, *volumes))
    values = dict(override.split("=", 1) for override in overrides)
    values |= {variable["name"]: variable["value"] for variable in container["env"] if "value" in variable}
    paths = {values[name] for name in ("--output_dir", "HF_HOME", "JAX_COMPILATION_CACHE_DIR")}
    paths |= {value for value in values.values() if "/" in value}
    assert [path for path in paths if not path.startswith(volumes)] == []


def test_the_scripts_are_shell() -> None:
    for path in (FILES / "multi-gpu.sh", FILES / "slurm.sbatch"):
        assert subprocess.run(["bash", "-n", str(path)]).returncode == 0


def test_the_jobset_has_a_pod_for_each_host_of_its_slice() -> None:
    jobset = yaml.safe_load((FILES / "gke-tpu.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = 1
    for size in topology.split("x"):
        chips *= int(size)
    assert job["completions"] == job["parallelism"]
    assert job["completions"] * pod["containers"][0]["resources"]["limits"]["google.com/tpu"] == chips
    mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_every_launch_file_is_explained() -> None:
    page = (ROOT / "docs" / "launch.md").read_text()
    for path in FILES.iterdir():
        assert f"(../configs/launch/{path.name})" in page
    commands: Any = get_command(cli.app)
    for command in ("train", "eval", "score", "export"):
        options = {o for p in commands.commands[command].params for o in (*p.opts, *p.secondary_opts)}
        named = set(re.findall(r"^\| `(--[\w-]+)`", page, re.MULTILINE))
        assert len(named) == 5 and named <= options
