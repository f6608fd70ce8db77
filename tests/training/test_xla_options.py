"""The options of XLA for the step: which are set where, and that gathers run beside products with them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import jax
import numpy as np
import pytest

from jax_simpo.plan.topology import Topology
from jax_simpo.training import xla_options
from jax_simpo.training.xla_options import choose_options, is_known, step_options
from tests.training.support import mesh_of


def gpus(fsdp: int = 8, platform: str = "gpu") -> Any:
    """A mesh of eight GPUs, as far as the choice of options looks at one."""
    devices = [create_autospec(jax.Device, instance=True, platform=platform, process_index=0)] * 8
    return SimpleNamespace(shape={"data": 8 // fsdp, "fsdp": fsdp, "tensor": 1}, devices=np.array(devices))


@pytest.fixture(autouse=True)
def _every_option_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla_options, "is_known", lambda name, value, device: True)


def test_options_are_set_on_gpus_that_gather_parameters_and_nowhere_else() -> None:
    assert len(step_options(gpus(), {})) == 3
    for others in (gpus(platform="cuda"), gpus(platform="rocm"), gpus(fsdp=2)):
        assert step_options(others, {}) == step_options(gpus(), {})
    assert step_options(gpus(fsdp=1), {}) == step_options(mesh_of((1, 8, 1)), {}) == {}


def test_what_the_user_has_set_stays_as_it_is(tmp_path: Path) -> None:
    flags = "--xla_gpu_enable_pipelined_all_gather=false  --xla_dump_to=/tmp"
    expected = {name: value for name, value in step_options(gpus(), {}).items() if "all_gather" not in name}
    assert len(expected) == 2
    assert step_options(gpus(), {"XLA_FLAGS": flags}) == expected
    (tmp_path / "flags").write_text(flags)  # XLA_FLAGS may name a file of flags
    assert step_options(gpus(), {"XLA_FLAGS": str(tmp_path / "flags")}) == expected
    assert step_options(gpus(), {"JAX_SIMPO_XLA_FLAGS": "false"}) == {}


def test_what_is_left_out_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    device = gpus().devices[0]
    taken, left_out = choose_options("gpu", device, {"XLA_FLAGS": "--xla_gpu_enable_pipelined_all_gather=false"})
    assert len(taken) == 2 and left_out == {"xla_gpu_enable_pipelined_all_gather": "XLA_FLAGS sets it"}
    taken, left_out = choose_options("gpu", device, {"JAX_SIMPO_XLA_FLAGS": "off"})
    assert not taken and set(left_out.values()) == {"JAX_SIMPO_XLA_FLAGS is off"} and len(left_out) == 3
    monkeypatch.setattr(xla_options, "is_known", lambda name, value, device: "buffering" not in name)
    taken, left_out = choose_options("gpu", device, {})
    assert left_out == {"xla_gpu_enable_while_loop_double_buffering": "the installed XLA does not know it"}
    assert choose_options("cpu", device, {}) == ({}, {})


def test_an_option_that_the_compiler_does_not_know_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    cpu = jax.devices()[0]
    # All compilers of a release know the same options.
    known = "xla_gpu_enable_latency_hiding_scheduler"
    assert is_known(known, True, cpu) and not is_known("xla_gpu_no_such_option", True, cpu)
    monkeypatch.setattr(xla_options, "_own", lambda mesh: cpu)
    assert len(step_options(gpus(), {})) == 3  # of every option the installed release knows one name
    monkeypatch.setattr(xla_options, "_OPTIONS", {"gpu": ({"xla_gpu_no_such_option": True, known: True},)})
    assert step_options(gpus(), {}) == {known: True}
    monkeypatch.setattr(xla_options, "_OPTIONS", {"gpu": ({"xla_gpu_no_such_option": True},)})
    assert step_options(gpus(), {}) == {}


# --- the compiled program

COMPILE = """
import sys
from jax_simpo.config import load_config
from jax_simpo.plan.program import Programs, TopologySetup
from jax_simpo.plan.topology import Topology

setup = TopologySetup(load_config(sys.argv[1]), topology=Topology.parse("h100:8"))
programs = Programs(setup, setup.step_plan(setup.train_pairs(), batch=64, seed=0), accumulates=True)
arguments = (programs._params, programs._accumulated, programs._rows(1), programs._denominators)
print(programs._lower(programs._functions.accumulate, *arguments).compile().as_text())
"""


def gathers_beside_products(hlo: str) -> list[tuple[bool, bool]]:
    """Returns, for every all-gather in a loop, if it is of the forward pass, and if a product runs beside it.

    In the text of a scheduled program, what stands between a collective's start and its end runs at the same time.
    """
    bodies: dict[str, list[str]] = {}
    for line in hlo.splitlines():
        if opening := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            bodies[opening[1]] = []
        elif bodies and " = " in line:
            bodies[next(reversed(bodies))].append(line)
    product = r" dot\(|__cublas\$gemm|mosaic_gpu"
    with_products = {name for name, body in bodies.items() if any(re.search(product, line) for line in body)}

    def computes(line: str) -> bool:
        return bool(re.search(product, line)) or bool(with_products & set(re.findall(r"calls=%?([\w.-]+)", line)))

    found = []
    for body in (bodies[name] for name in set(re.findall(r"\bbody=%?([\w.-]+)", hlo))):
        for number, line in enumerate(body):
            if name := re.match(r"\s*%?([\w.-]+) = .* all-gather-start\(", line):
                ends = rf" all-gather-done\(.*%{re.escape(name[1])}\)"
                end = next(n for n, other in enumerate(body) if re.search(ends, other))
                found.append(("transpose(" not in line, any(map(computes, body[number + 1 : end]))))
    return found


@pytest.mark.slow
@pytest.mark.skipif(
    not (find_spec("jax_cuda12_plugin") and find_spec("absl")),
    reason="jax[cuda12] is not installed: nothing here compiles for a GPU (see CONTRIBUTING.md)",
)
def test_with_the_options_every_gather_of_the_layers_forward_pass_runs_beside_a_product(tmp_path: Path) -> None:
    sizes = "hidden_size: 4096, intermediate_size: 14336, num_attention_heads: 32, num_key_value_heads: 8"
    (tmp_path / "config.yaml").write_text(
        f"model_config: {{model_type: llama, {sizes}, num_hidden_layers: 4, vocab_size: 4096}}\n"
        "tokenizer_name_or_path: builtin:cafe\ndataset_mixer: {builtin:cafe: 0.05}\n"
        f"data_cache_dir: {tmp_path}\nmax_length: 128\nlearning_rate: 1.0e-3\nrow_length: 8192\n"
    )

    def compiled(switch: str) -> list[bool]:
        environment = {**os.environ, **Topology.parse("h100:8").environment(), "JAX_SIMPO_XLA_FLAGS": switch}
        command = [sys.executable, "-c", COMPILE, str(tmp_path / "config.yaml")]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-2000:]
        return [beside for forward, beside in gathers_beside_products(run.stdout) if forward]

    without = compiled("false")
    assert without.count(False) >= 1  # that of a layer's first weights has nothing to run beside
    with_options = compiled("true")
    assert len(with_options) == 2 * len(without) and all(with_options)  # two layers in a round of the loop
