"""A process that hangs, or that the network loses, takes the other down within a minute; then the run goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from jax_simpo.run.metrics import read_metrics
from tests.training.test_hosts import CONFIG, WITHIN, Hosts, place_of

pytestmark = pytest.mark.slow

STEPS = 40
SLOWLY = {"seconds_a_step": 0.25}  # so that there is time to lose a process
# Two hosts in network namespaces of their own, joined by one cable, which is pulled when the file `cut` appears. All of
# it lies in namespaces that end with the script. Each host finds its own address under its name, as Gloo expects.
NETWORK = """
set -e
folder=$1; shift
mount -t tmpfs none /run
for n in 0 1; do ip netns add host$n; done
ip link add to0 type veth peer name to1
for n in 0 1; do
  ip link set to$n netns host$n
  ip -n host$n addr add 10.9.0.$((n + 1))/24 dev to$n
  ip -n host$n link set to$n up
  ip -n host$n link set lo up
  printf '127.0.0.1 localhost\\n10.9.0.%d %s\\n' $((n + 1)) "$(hostname)" > "$folder/hosts.$n"
done
for n in 0 1; do
  (
    set +e
    ip netns exec host$n sh -c 'mount --bind "$0" /etc/hosts && . "$1" && shift && exec "$@"' \\
      "$folder/hosts.$n" "$folder/environment.$n" "$@" > "$folder/stdout.$n" 2> "$folder/stderr.$n"
    echo $? > "$folder/status.$n"
  ) &
done
while [ ! -e "$folder/cut" ]; do sleep 0.1; done
ip -n host1 link set to1 down
wait
"""


def config_in(folder: Path) -> list[str]:
    """Writes the config of a run of some seconds, and returns the command that runs it."""
    folder.mkdir()
    config = {**CONFIG, "dataset_mixer": {"builtin:cafe": 0.02}, "do_eval": False, "eval_strategy": "no"}
    config |= {"max_steps": STEPS, "save_steps": 3, "model_config": {**CONFIG["model_config"], "num_hidden_layers": 1}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return ["train", str(folder / "config.yaml"), f"--output_dir={folder}/run"]


def outcome(folder: Path) -> tuple[list[dict[str, Any]], bytes]:
    """Returns the records of a run without their times, and its weights."""
    times = ("seconds", "per_second", "waited", "idle", "runtime")
    records = [{k: v for k, v in r.items() if not any(t in k for t in times)} for r in read_metrics(folder / "run")]
    return records, (folder / "run/model/model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], bytes]:
    folder = tmp_path_factory.mktemp("whole") / "job"
    hosts = Hosts(folder, [config_in(folder)])
    assert hosts.wait(240) == [0, 0], hosts.said(0)
    return outcome(folder)


def goes_on_to(oracle: Any, folder: Path, command: list[str]) -> None:
    """Starts a run once more, and checks that it ends as the one that nothing happened to."""
    for own in folder.glob("cwd.*"):
        shutil.rmtree(own)
    hosts = Hosts(folder, [command])
    assert hosts.wait(240) == [0, 0], hosts.said(0)
    assert outcome(folder) == oracle


@pytest.mark.parametrize("hangs", [0, 1])
def test_a_process_that_hangs_takes_the_other_down_within_a_minute(hangs: int, oracle: Any, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    command = config_in(folder)
    hosts = Hosts(folder, [command], **SLOWLY)
    try:
        hosts.await_file("run/checkpoints/6/seal.json")
        hosts.processes[hangs].send_signal(signal.SIGSTOP)
        other, since = hosts.processes[1 - hangs], time.monotonic()
        assert other.wait(WITHIN) != 0
        print(f"after {time.monotonic() - since:.1f} s, status {other.returncode}: {hosts.said(1 - hangs)[-500:]}")
    finally:
        for process in hosts.processes:
            process.kill()
            process.wait()
    goes_on_to(oracle, folder, command)


def test_a_slow_disk_of_one_process_changes_nothing(oracle: Any, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    hosts = Hosts(folder, [config_in(folder)], seconds_a_write=0.2)
    assert hosts.wait(240) == [0, 0], hosts.said(0)
    assert outcome(folder) == oracle


def test_processes_that_lose_each_other_both_end_within_a_minute(oracle: Any, tmp_path: Path) -> None:
    unshare = ["unshare", "--user", "--map-root-user", "--net", "--mount", "--pid", "--fork", "--kill-child"]
    if not shutil.which("ip") or not shutil.which("unshare") or subprocess.run([*unshare, "true"]).returncode:
        pytest.skip("needs `ip`, `unshare` and user namespaces")
    folder = tmp_path / "job"
    command = config_in(folder)
    (folder / "job.json").write_text(json.dumps({"commands": [command], **SLOWLY}))
    for number in range(2):
        place = place_of(number, folder, "10.9.0.1:7654")
        lines = [f"export {name}='{value}'\n" for name, value in place.items()]
        (folder / f"cwd.{number}").mkdir()
        (folder / f"environment.{number}").write_text("".join([*lines, f"cd '{folder}/cwd.{number}'\n"]))
    child = [sys.executable, "-m", "tests.training.hosts_child", str(folder / "job.json")]
    network = subprocess.Popen([*unshare, "bash", "-c", NETWORK, "network", str(folder), *child], env=os.environ)
    try:
        until = time.monotonic() + 180
        while not (folder / "run/checkpoints/6/seal.json").exists():
            assert time.monotonic() < until and network.poll() is None, (folder / "stderr.0").read_text()
            time.sleep(0.1)
        (folder / "cut").touch()
        since = time.monotonic()
        assert network.wait(WITHIN) == 0
    finally:
        network.kill()
    said = [(folder / f"stderr.{number}").read_text() for number in range(2)]
    print(f"after {time.monotonic() - since:.1f} s", *(text[-500:] for text in said), sep="\n")
    assert all(int((folder / f"status.{number}").read_text()) != 0 for number in range(2))
    goes_on_to(oracle, folder, command)
