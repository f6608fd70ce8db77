"""Makes a tiny model and random pairs, and runs optimizer steps on any mesh and layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jax_simpo.config import TrainConfig
from jax_simpo.data.groups import Group, GroupLengths
from jax_simpo.data.loader import build_step
from jax_simpo.data.packing import StepPlan, make_step_plan
from jax_simpo.hf.config import read_model_config
from jax_simpo.models.policy import Forward
from jax_simpo.models.transformer import Model, Params
from jax_simpo.objectives import Objective, SimPO
from jax_simpo.sharding import make_mesh
from jax_simpo.training.optim import run_optimizer
from jax_simpo.training.step import TrainFunctions, make_score_function, make_train_functions, run_step
from tests.pairs import random_pairs

VOCABULARY = 96
CONFIG = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
}
OBJECTIVE = SimPO(beta=2.5, gamma_beta_ratio=0.55)
OPTIMIZER = TrainConfig(
    model_name_or_path="unused",
    dataset_mixer={"unused": 1.0},
    learning_rate=1e-3,
    lr_scheduler_type="constant",
    weight_decay=0.0,
    max_grad_norm=1.0,
)
MESHES = {"one device": (1, 1, 1), "fsdp=8": (1, 8, 1), "fsdp=4 x tensor=2": (1, 4, 2), "data=2 x fsdp=4": (2, 4, 1)}


def mesh_of(sizes: tuple[int, int, int]) -> Mesh:
    return make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])


def tiny_model(dtype: str = "float32", **changes: Any) -> Model:
    return Model(read_model_config({**CONFIG, **changes}), dtype)


# Tests of a process that want the same functions share them, and so what is traced and compiled at their first call.


@cache
def shared_optimizer() -> Any:
    """Returns the optimizer of `OPTIMIZER`, whose constant learning rate needs no number of steps."""
    return run_optimizer(OPTIMIZER, 1)[1]


@cache
def train_functions(forward: Forward, objective: Objective, optimizer: Any, mesh: Mesh) -> TrainFunctions:
    return make_train_functions(forward, objective, optimizer, mesh)


@cache
def score_function(forward: Forward, mesh: Mesh, prompts: bool = False) -> Callable[..., Any]:
    return make_score_function(forward, mesh, prompts=prompts)


@cache
def _drawn(model: Model) -> Params:
    return jax.device_get(model.init(0, mesh_of((1, 1, 1))))


def fresh_params(model: Model, mesh: Mesh) -> Params:
    """Returns what `model.init(0, mesh)` draws, which is the same on every mesh."""
    # A copy, because a step takes the memory of its parameters, and a CPU's may be that of the host.
    return jax.device_put(jax.tree.map(np.array, _drawn(model)), model.shardings(mesh))


@dataclass(frozen=True)
class Pairs:
    """Pairs in memory, with the interface of a dataset."""

    all: list[Group]

    def groups(self, indices: np.ndarray) -> list[Group]:
        return [self.all[i] for i in indices]


def some_pairs(count: int, seed: int = 0) -> Pairs:
    return Pairs(random_pairs(np.random.default_rng(seed), count, VOCABULARY, prompt=(5, 60), response=(3, 40)))


def plan_of(
    pairs: Pairs,
    mesh: Mesh,
    *,
    batch: int,
    sharing: bool = True,
    packing: bool = True,
    prompt_targets: bool = False,
    rows: int = 1,
) -> StepPlan:
    return make_step_plan(
        GroupLengths.of(pairs.all),
        global_batch_size=batch,
        rows_per_micro_batch=rows * mesh.shape["data"] * mesh.shape["fsdp"],
        row_length=256 if packing else None,
        max_row_length=256,
        prefix_sharing=sharing,
        packing=packing,
        seed=0,
        prompt_targets=prompt_targets,
    )


@dataclass(frozen=True)
class History:
    """The metrics of each step of a run, the last parameters on the host, and the number of programs compiled."""

    records: list[dict[str, float]]
    params: Any
    programs: int = 0

    def values(self, name: str) -> np.ndarray:
        return np.array([record[name] for record in self.records])


def run_steps(
    pairs: Pairs,
    *,
    steps: int,
    batch: int,
    mesh: Mesh,
    sharing: bool = True,
    packing: bool = True,
    model: Model | None = None,
    objective: Objective = OBJECTIVE,
    optimizer: Any = None,
    attention: str = "blockwise",
    params: Any = None,
    logits_bytes: int = 0,
    rows: int = 1,
) -> History:
    """Runs optimizer steps with the trainer's functions, without its files and console."""
    model = model or tiny_model()
    optimizer = optimizer or shared_optimizer()
    plan = plan_of(pairs, mesh, batch=batch, sharing=sharing, packing=packing, rows=rows)
    records = []
    with jax.set_mesh(mesh):
        functions = train_functions(Forward(model, attention, 64, logits_bytes), objective, optimizer, mesh)
        params = fresh_params(model, mesh) if params is None else jax.device_put(params, model.shardings(mesh))
        state = functions.init_optimizer(params)
        for k in range(steps):
            params, state, metrics = run_step(functions, params, state, build_step(plan, pairs, k))
            records.append({name: float(value) for name, value in metrics.items()})
        programs = functions.accumulate._cache_size() + functions.update._cache_size()  # type: ignore[attr-defined]
        return History(records, jax.device_get(params), programs)


def edited(pair: Group, rank: int, rng: np.random.Generator) -> Group:
    """Redraws the unshared tokens of one response but the first of them, so that the shared prefix stays the same."""
    other = pair.responses[1 - rank].ids
    response = pair.responses[rank]
    ids = response.ids.copy()
    same = np.flatnonzero(ids[: len(other)] != other[: len(ids)])
    start = (int(same[0]) if same.size else min(len(ids), len(other))) + 1
    ids[start:] = rng.integers(1, VOCABULARY, len(ids) - start)
    changed = replace(response, ids=ids)
    return Group((changed, pair.responses[1]) if rank == 0 else (pair.responses[0], changed))
