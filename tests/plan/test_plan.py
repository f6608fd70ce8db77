"""Tests `jax-simpo plan`: compares its figures with those that can be counted without a compiler."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from rich.console import Console

from jax_simpo import cli
from jax_simpo.config import load_config
from jax_simpo.data.packing import measure
from jax_simpo.errors import MeshError, PlanError
from jax_simpo.hf.config import read_model_config
from jax_simpo.models.config import ModelConfig
from jax_simpo.models.transformer import Model
from jax_simpo.ops.attention import prepare_causal_mask
from jax_simpo.plan import make_hardware_plan, program, topology
from jax_simpo.plan.flops import Work, useful_flops, work_of
from jax_simpo.plan.report import HardwarePlan, Memory, Traffic, show
from jax_simpo.plan.topology import GPUS, TPUS, Topology
from jax_simpo.training.setup import Setup
from tests.training.support import tiny_model

CONFIGS = Path(__file__).parents[2] / "configs" / "plan"
MODEL = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "vocab_size": 256,
    "tie_word_embeddings": False,
}


def write_config(folder: Path, **changes: Any) -> Path:
    config = {
        "model_config": MODEL,
        "tokenizer_name_or_path": "builtin:cafe",
        "dataset_mixer": {"builtin:cafe": 0.05},
        "data_cache_dir": str(folder / "cache"),
        "max_length": 128,
        "learning_rate": 1e-3,
        "global_batch_size": 64,
        "dtype": "float32",
        "row_length": 128,
        **changes,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


# --- a whole plan


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("plan"))


@pytest.fixture(scope="module")
def planned(config: Path) -> dict[str, Any]:
    """Returns the output of `plan --json` for eight CPU devices."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as status:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda text: printed.append(text))
        patch.setattr("sys.argv", ["jax-simpo", "plan", str(config), "--topology", "cpu:8", "--json"])
        cli.main()
    assert not status.value.code
    return json.loads(printed[0])


@pytest.fixture(scope="module")
def setup(config: Path) -> Setup:
    return Setup(load_config(config))


def test_the_json_has_what_it_promises(planned: dict[str, Any]) -> None:
    assert planned["topology"] == "cpu:8" and planned["devices"] == 8 and planned["fits"] is True
    assert set(planned["bytes_per_device"]) == {"arguments", "temporaries", "total", "capacity"}
    assert set(planned["tokens_per_step"]) == {"separate", "shared"}
    assert all(set(traffic) == {"count", "bytes"} for traffic in planned["collectives"].values())
    assert planned["micro_batches_per_step"] > 1  # so that a step has every kind of program


def test_arguments_are_the_parameters_and_moments_of_a_device_and_its_rows(
    planned: dict[str, Any], setup: Setup
) -> None:
    row = planned["row"]
    rows = 4 * (3 * row["length"] + 3 * row["targets"] + 2 * row["responses"])
    counters = 2 * 4  # of AdamW and of the schedule
    expected = 3 * 4 * setup.model.parameter_count // 8 + counters + rows
    sizes = planned["bytes_per_device"]
    assert sizes["arguments"] == expected
    assert sizes["total"] == sizes["arguments"] + sizes["temporaries"] < sizes["capacity"]
    # Gradients, and the values that four layers keep of a row with `remat: full`.
    memory = planned["memory"]
    assert memory["gradients"] == 4 * setup.model.parameter_count // 8
    assert memory["activations"] == 4 * 4 * row["length"] * 64


def test_parameters_are_gathered_once_per_pass_and_no_activation_travels(planned: dict[str, Any], setup: Setup) -> None:
    shapes = setup.model.abstract
    looked_up = shapes["embed"]["embedding"].size  # never gathered
    gathered = 2 * 4 * (setup.model.parameter_count - looked_up) * planned["micro_batches_per_step"]
    assert planned["collectives"]["all-gather"]["bytes"] == pytest.approx(gathered, rel=0.1)
    # The embedding's own two all-to-alls of a row's hidden states.
    hidden = 2 * 4 * planned["row"]["length"] * 64 * planned["micro_batches_per_step"]
    assert planned["collectives"]["all-to-all"]["bytes"] == pytest.approx(hidden, rel=0.01)
    # Gradients, and no more: an activation of each layer would be a quarter more.
    reduced = sum(planned["collectives"].get(kind, {"bytes": 0})["bytes"] for kind in ("all-reduce", "reduce-scatter"))
    gradients = 4 * (setup.model.parameter_count - looked_up) * planned["micro_batches_per_step"]
    assert reduced == pytest.approx(gradients, rel=0.1)


def test_tokens_and_flops_are_those_of_the_data(planned: dict[str, Any], setup: Setup) -> None:
    pairs = setup.train_pairs()
    lengths = pairs.lengths
    for name, sharing in (("separate", False), ("shared", True)):
        assert planned["tokens_per_step"][name] == round(64 * lengths.row_tokens(sharing).mean())
    assert planned["tokens_per_step"]["shared"] < planned["tokens_per_step"]["separate"]
    expected = useful_flops(setup.model.config, work_of(lengths, True)) * 64 / len(pairs)
    assert planned["flops_per_step"] == pytest.approx(expected)
    plan = setup.step_plan(pairs, batch=64, seed=42)
    assert planned["micro_batches_per_step"] == measure(plan).rows / plan.rows_per_micro_batch


def test_the_largest_micro_batch_is_the_whole_step_where_all_fits(planned: dict[str, Any]) -> None:
    assert planned["largest_rows_per_device"] == planned["most_rows_per_device"] > 1


def test_automatic_micro_batches_are_those_that_the_topologys_memory_holds(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_config(config, ["--rows_per_device=auto", "--packing=false"])
    pairs, found = None, []
    for memory in (1 << 20, 12 << 20, 1 << 40):
        monkeypatch.setattr(Topology, "memory", memory)
        setup = program.TopologySetup(settings, topology=Topology.parse("cpu:8"))
        pairs = pairs or setup.train_pairs()
        plan = setup.step_plan(pairs, batch=64, seed=42)
        found.append(plan.rows_per_micro_batch // 8)
        line = setup.packing_lines("training", plan, measure(plan)).splitlines()[1]
        assert f"of {found[-1]} row" in line and "`rows_per_device: auto`" in line
    assert found[0] == 1 < found[1] < found[2] == 8  # 64 pairs, one a row


def test_a_plan_is_read_back_and_shown(planned: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    plan = HardwarePlan.from_json(planned)
    assert json.loads(json.dumps(plan.to_json())) == planned
    show(plan, Console(width=200))
    printed = capsys.readouterr().out
    for part in ("cpu:8: 8 x cpu", "fsdp=8", "optimizer state", "all-gather", "sharing saves", "fits: "):
        assert part in printed


@pytest.mark.parametrize("rounds", [8, 4, 3])
def test_activations_are_counted_whatever_number_of_layers_a_round_of_the_loop_computes(rounds: int) -> None:
    """XLA's double buffering computes two layers in a round, and its pipelining two layers before the loop."""
    state = "(s32[], bf16[8,1,256,64], bf16[1,256,64])"
    hlo = f"""
%body (p: {state}) -> {state} {{
  ROOT %p = {state} parameter(0)
}}

%cond (q: {state}) -> pred[] {{
  ROOT %q = pred[] parameter(0)
}}

ENTRY %main (x: {state}) -> {state} {{
  %x = {state} parameter(0)
  ROOT %w = {state} while(%x), condition=%cond, body=%body, backend_config={{"known_trip_count":{{"n":"{rounds}"}}}}
}}
"""
    of_eight_layers = SimpleNamespace(
        _step_plan=SimpleNamespace(shape=SimpleNamespace(length=256)),
        _setup=SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(num_layers=8))),
    )
    assert program.Programs._activation_bytes(of_eight_layers, hlo, 1) == 2 * 8 * 256 * 64  # type: ignore[arg-type]


def test_useful_flops_are_what_xla_counts_where_no_loop_hides_them() -> None:
    """With one layer, dense attention and no recomputation XLA counts every product, and full rows have no padding."""
    changes = {"num_hidden_layers": 1, "hidden_size": 256, "intermediate_size": 1024, "head_dim": 64}
    small = tiny_model(**changes)
    model = Model(small.config, "float32", "none")

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(128), tokens.shape)
        mask = prepare_causal_mask(positions, backend="dense")
        hidden = model.hidden_states(params, tokens, positions, mask)
        return jnp.sum(hidden**2)

    tokens = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    counted = jax.jit(jax.grad(loss)).lower(model.abstract, tokens).compile().cost_analysis()["flops"]
    headless = ModelConfig(**{**vars(model.config), "vocab_size": 0})
    # Dense attention computes every pair of query and key.
    expected = useful_flops(headless, Work(256, 2 * 128 * 128, 0))
    assert counted == pytest.approx(expected, rel=0.03)


# --- what a user can get wrong


@pytest.mark.parametrize(
    ("text", "mentioned"),
    [
        ("v9:2x2", ["v9:2x2", "no such topology", "v5p:2x2x4", "h100:8", "cpu:8"]),
        ("v5p", ["no such topology"]),
        ("v5p:16", ["v5p takes 3 number(s)", "v5p:2x2x4"]),
        ("v5e:2x2x4", ["v5e takes 2 number(s)"]),
        ("h100:1x2x8", ["h100 takes 1 or 2 number(s)"]),
        ("cpu:0", ["no such topology"]),
        ("2xh100:8", ["only TPUs have slices", "h100:2x8"]),
    ],
)
def test_an_unknown_topology_is_told_with_those_known(text: str, mentioned: list[str]) -> None:
    with pytest.raises(PlanError) as error:
        Topology.parse(text)
    assert all(part in str(error.value) for part in mentioned)


@pytest.mark.parametrize(
    ("text", "count", "platform"),
    [
        ("v5p:2x2x4", 16, "tpu"),
        ("v6e:16x16", 256, "tpu"),
        ("2xv5e:4x4", 32, "tpu"),
        ("2xtpu7x:2x2x4", 64, "tpu"),
        ("H100:2x8", 16, "cuda"),
        ("cpu:8", 8, "cpu"),
    ],
)
def test_a_topology_is_read(text: str, count: int, platform: str) -> None:
    read = Topology.parse(text)
    assert (read.count, read.platform, str(read)) == (count, platform, text.lower())
    assert read.memory > 0


@pytest.mark.parametrize(("name", "package"), [("v5p:2x2x4", "libtpu"), ("h100:8", "jax_cuda12_plugin")])
def test_a_compiler_that_is_missing_is_told_with_how_to_get_it(
    name: str, package: str, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        topology, "find_spec", lambda wanted: None if wanted.replace("13", "12") == package else object()
    )
    with pytest.raises(PlanError, match=rf"{package} missing.*pip install"):
        make_hardware_plan(config, [], Topology.parse(name))


def test_the_plugin_for_cuda_13_does_as_well_as_that_for_cuda_12(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology, "find_spec", lambda wanted: None if wanted == "jax_cuda12_plugin" else object())
    Topology.parse("h100:8").check_installed()


def test_a_mesh_that_does_not_divide_is_told(config: Path) -> None:
    with pytest.raises(MeshError, match="fsdp=3"):
        make_hardware_plan(config, ["--mesh.fsdp=3"], Topology.parse("cpu:8"))


@pytest.mark.parametrize("search", [False, True])
def test_a_compiler_that_breaks_off_is_told_and_what_was_found_before_is_kept(
    search: bool, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_plan = plan_of(memory_of(8), notes=["the compiler broke off"], largest_rows_per_device=None)
    (tmp_path / "plan.json").write_text(json.dumps(saved_plan.to_json()))
    python = tmp_path / "python"
    task = "import json, pathlib, sys; task = json.loads(sys.argv[1])"
    copies = f"pathlib.Path(task['result']).write_text(pathlib.Path('{tmp_path}/plan.json').read_text())"
    python.write_text(f'#!/bin/sh\n{sys.executable} -c "{task}; {copies if search else ""}" "$3"\nkill -9 $$\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    if search:
        assert make_hardware_plan(config, [], Topology.parse("cpu:8")) == saved_plan
    else:
        with pytest.raises(PlanError, match=r"broke off, status -9 .*memory may be too small"):
            make_hardware_plan(config, [], Topology.parse("cpu:8"))


# --- does it fit, and what to do


def memory_of(gib: float) -> Memory:
    return Memory(1 << 30, 2 << 30, 0, 1 << 30, 0, int((gib - 4) * (1 << 30)))


def plan_of(memory: Memory, **changes: Any) -> HardwarePlan:
    values: dict[str, Any] = {
        "topology": "v5e:4x4",
        "devices": 16,
        "device_kind": "TPU v5 lite",
        "mesh": {"data": 1, "fsdp": 16, "tensor": 1},
        "attention": "splash",
        "row": {"length": 4096, "targets": 2048, "responses": 16},
        "rows_per_device": 4,
        "micro_batches_per_step": 2.0,
        "pairs_per_step": 128,
        "longest_pair": 2048,
        "settings": {"remat": "dots", "dtype": "bfloat16", "prefix_sharing": True, "max_length": 2048},
        "capacity": 16 << 30,
        "memory": memory,
        "flops_per_step": 1e15,
        "collectives": {"all-gather": Traffic(2, 10)},
        "tokens_per_step": {"separate": 20, "shared": 15},
        "largest_rows_per_device": 2,
        "most_rows_per_device": 8,
    }
    return HardwarePlan(**{**values, **changes})


@pytest.mark.parametrize(
    ("plan", "mentioned", "not_mentioned"),
    [
        (plan_of(memory_of(15.9)), [], ["rows_per_device"]),
        (plan_of(memory_of(20)),
         ["`rows_per_device: 2` instead of 4", "`remat: full`", "`row_length: 2048`", "tensor"], ["larger topology"]),
        (plan_of(memory_of(20), largest_rows_per_device=0, rows_per_device=1, longest_pair=4096),
         ["`max_length`", "tensor"], ["rows_per_device", "row_length"]),
        (plan_of(memory_of(20), capacity=3 << 30, largest_rows_per_device=0),
         ["alone take 4.00 GiB of the 3.00 GiB", "larger topology", "use_peft"], []),
        (plan_of(memory_of(8), capacity=7 << 30),
         ["larger topology", "take 4.00 GiB of each", "use_peft"], ["alone"]),
        (plan_of(memory_of(20), mesh={"data": 4, "fsdp": 4, "tensor": 1}), ["`mesh.data: 1`", "saves 3.00 GiB"], []),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_with_the_settings_to_change(
    plan: HardwarePlan, mentioned: list[str], not_mentioned: list[str]
) -> None:
    advice = "\n".join(plan.advice())
    assert plan.fits == (not mentioned)
    assert all(part in advice for part in mentioned) and not any(part in advice for part in not_mentioned)


@pytest.mark.parametrize("start", [1, 4])
@pytest.mark.parametrize(("first", "each"), [(3.0, 1.0), (0.5, 3.7), (9.0, 0.25), (20.0, 1.0), (1.0, 0.01)])
def test_the_largest_micro_batch_is_one_that_was_compiled_and_the_next_does_not_fit(
    start: int, first: float, each: float
) -> None:
    tried = []

    def total(rows: int) -> int:
        tried.append(rows)
        return int(1000 * (first + each * rows))

    largest = program._largest(total, start, 64, 16000)
    fitting = [n for n in range(1, 65) if first + each * n <= 16]
    assert largest == max(fitting, default=0)
    assert len(tried) <= 1 + program._COMPILATIONS and (largest in tried or largest == 0)


# --- hardware that is not here


def test_every_chip_has_the_memory_its_maker_states() -> None:
    stated = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32, "tpu7x": 96}  # GB a device, Google's TPU documentation
    stated |= {"a100-40": 40, "a100-80": 80, "h100": 80, "h200": 141, "b200": 180}
    for name in (*TPUS, *GPUS):
        shape = (2,) * TPUS[name].axes if name in TPUS else (8,)
        assert Topology(name, shape).memory / 1e9 == pytest.approx(stated[name], rel=0.09)


needs_libtpu = pytest.mark.skipif(
    not (find_spec("libtpu") and find_spec("tokamax")),
    reason="libtpu (or tokamax) is not installed: nothing here compiles for a TPU (see CONTRIBUTING.md)",
)


MESHES = """
from jax_simpo.plan.topology import Topology
from jax_simpo.sharding import make_mesh

for name, sizes in (("v6e:16x16", (1, 64, 4)), ("v5p:2x2x4", (1, 16, 1)), ("v5e:4x8", (2, 2, 8))):
    mesh = make_mesh(*sizes, devices=Topology.parse(name).devices())
    assert tuple(mesh.shape.values()) == sizes and len(set(mesh.devices.flat)) == mesh.size
"""


@pytest.mark.slow
@needs_libtpu
def test_a_mesh_may_split_the_axes_of_a_tpus_torus() -> None:
    environment = {**os.environ, **Topology.parse("v6e:16x16").environment()}
    run = subprocess.run([sys.executable, "-c", MESHES], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


TWO_SLICES = """
import sys
from jax_simpo.config import load_config
from jax_simpo.plan.program import Programs, TopologySetup
from jax_simpo.plan.topology import Topology

setup = TopologySetup(load_config(sys.argv[1]), topology=Topology.parse("2xv5e:4x4"))
assert [{device.slice_index for device in half.flat} for half in setup.mesh.devices] == [{0}, {1}]
programs = Programs(setup, setup.step_plan(setup.train_pairs(), batch=64, seed=0), accumulates=True)
arguments = (programs._params, programs._accumulated, programs._rows(1), programs._denominators)
print(programs._lower(programs._functions.accumulate, *arguments).compile().as_text())
"""


@pytest.mark.slow
@needs_libtpu
def test_between_two_slices_only_sums_of_gradients_travel(tmp_path: Path) -> None:
    model = {**MODEL, "hidden_size": 512, "head_dim": 128, "intermediate_size": 1536}
    config = write_config(tmp_path, model_config=model, dtype="bfloat16", mesh={"data": 2, "fsdp": 16})
    environment = {**os.environ, **Topology.parse("2xv5e:4x4").environment()}
    run = subprocess.run([sys.executable, "-c", TWO_SLICES, config], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    # Within a slice XLA writes collectives as ever, of the slice's own 16 devices ...
    groups = set(
        re.findall(r" (?:all-gather|all-reduce|reduce-scatter|all-to-all)\(.*replica_groups=(\S+),", run.stdout)
    )
    assert groups == {"{{" + ",".join(map(str, range(16))) + "}}"}
    # ... and between slices as transfers through the hosts.
    transfers = re.findall(r" send\(.*", run.stdout)
    assert transfers and all('_xla_megascale_transfer_type="ALL_REDUCE"' in transfer for transfer in transfers)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(("name", "chips"), [("v5p:2x2x4", 16), ("v5e:16x16", 256)])
def test_llama_3_8b_takes_of_tpus_what_the_design_says(name: str, chips: int) -> None:
    plan = make_hardware_plan(CONFIGS / "llama-3-8b.yaml", [], Topology.parse(name), search=False)
    model = Model(read_model_config(yaml.safe_load((CONFIGS / "llama-3-8b.yaml").read_text())["model_config"]))
    assert plan.attention == "splash" and plan.devices == chips and plan.fits
    # Memory: state split over all chips, one activation a layer; the head whole, with its gradient and its reduction.
    memory, count = plan.memory, model.parameter_count
    assert memory.parameters + memory.optimizer == pytest.approx(12 * count / chips, rel=1e-3)
    assert memory.gradients == pytest.approx(4 * count / chips, rel=1e-3)
    assert memory.activations == 2 * 32 * plan.row["length"] * 4096
    head = 128256 * 4096
    assert memory.working < 2 * 2 * count / chips + (2 + 3 * 4) * head + 3 * 2**30
    # Traffic: every matrix gathered once forward and once backward in bfloat16, for both responses.
    times = plan.micro_batches_per_step
    layers = count - 2 * head
    traffic = {kind: collectives.bytes for kind, collectives in plan.collectives.items()}
    assert traffic["all-gather"] == pytest.approx(2 * 2 * (layers + head) * times, rel=0.1)
    # The embedding's two all-to-alls are the only activations that travel ...
    assert traffic["all-to-all"] == pytest.approx(2 * 2 * plan.row["length"] * 4096 * times, rel=0.01)
    # ... for gradients explain the rest: layers in bfloat16, the head in float32. One activation a layer would not fit.
    rest = sum(size for kind, size in traffic.items() if kind not in ("all-gather", "all-to-all"))
    assert np.isclose(rest, (2 * layers + 4 * head) * times, rtol=0.1)


@pytest.mark.slow
@pytest.mark.skipif(
    not ((find_spec("jax_cuda12_plugin") or find_spec("jax_cuda13_plugin")) and find_spec("absl")),
    reason="jax[cuda12] is not installed: nothing here compiles for a GPU (see CONTRIBUTING.md)",
)
def test_llama_3_8b_takes_of_eight_h100_what_the_design_says() -> None:
    plan = make_hardware_plan(CONFIGS / "llama-3-8b.yaml", [], Topology.parse("h100:8"), search=False)
    assert plan.attention == "pallas" and plan.devices == 8
    head = 128256 * 4096
    layers = 8030261248 - 2 * head
    times = plan.micro_batches_per_step
    assert plan.memory.parameters + plan.memory.optimizer == pytest.approx(12 * 8030261248 / 8, rel=1e-3)
    assert plan.collectives["all-gather"].bytes == pytest.approx(2 * 2 * (layers + head) * times, rel=0.1)
