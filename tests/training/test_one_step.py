"""One step: the trainer, the parity check, the benchmarks and these tests run the same functions, not copies."""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_simpo.data.loader import build_step
from jax_simpo.models.policy import Forward
from jax_simpo.models.transformer import Params
from jax_simpo.sharding import put_rows
from jax_simpo.training import capacity, optim, schedules, step
from parity.jax_side import Runner
from parity.variants import RIGHT
from tests.training.support import OBJECTIVE, mesh_of, plan_of, some_pairs, tiny_model


@pytest.fixture(autouse=True, scope="module")
def quick_runs() -> None:
    """Leaves the functions of this module's runs as they are: whether they are the same ones is the question here."""


ROOT = Path(__file__).parents[2]
# The function -> the modules that call it in place of a copy.
CALLERS: dict[Any, tuple[str, ...]] = {
    step.run_step: ("jax_simpo.training.loop", "parity.jax_side", "benchmarks.steps", "tests.training.support"),
    step.accumulate_step: ("parity.jax_side", "tests.training.test_lora_step"),
    step.split_step: ("parity.variants",),
    step.make_train_functions: (
        *("jax_simpo.training.trainer", "jax_simpo.plan.program"),
        *("parity.jax_side", "benchmarks.steps", "tests.training.support"),
    ),
    optim.run_optimizer: (
        *("jax_simpo.training.trainer", "jax_simpo.plan.program"),
        *("parity.jax_side", "benchmarks.steps", "tests.training.support"),
    ),
    capacity.training_forward: ("jax_simpo.training.setup", "parity.jax_side", "benchmarks.steps"),
}
# These benchmarks time an operation of the step by itself, so they differentiate it themselves.
ONE_OPERATION = (
    *("attention_check.py", "attention_cpu.py", "attention_speed_sides.py", "gpu_attention.py", "kernel_report.py"),
    *("layers_sides.py", "loss_head_sides.py", "loss_head_kernels.py", "masks.py"),
)
# Parts of the step and of its forward pass: whoever puts them together has a copy.
PARTS = {
    optim.__name__: ("make_optimizer",),
    schedules.__name__: ("learning_rate_schedule", "count_warmup_steps"),
    step.__name__: ("micro_batch_loss",),
    "jax_simpo.ops.attention": ("prepare_mask", "attention"),
    "jax_simpo.ops": ("logprobs",),
    "jax_simpo.ops.logprobs": ("target_logps",),
    "jax_simpo.ops.responses": ("sum_responses",),
    "jax": ("grad", "value_and_grad", "vjp"),
    "optax": ("apply_updates",),
}


def copied_parts(source: str) -> list[str]:
    """Lists the lines that use a part of the step which only `run_step` and `Forward` should use."""
    tree = ast.parse(source)
    # `functions.accumulate.lower(...)` and `jax.eval_shape(functions.accumulate, ...)` run no step.
    compiled = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ("lower", "_cache_size")
    } | {
        id(argument)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "jax.eval_shape"
        for argument in node.args
    }
    copied = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            parts = PARTS.get(node.module or "", ())
            copied += [f"{node.lineno}: {node.module}.{alias.name}" for alias in node.names if alias.name in parts]
        elif isinstance(node, ast.Import):
            copied += [f"{node.lineno}: {a.name}" for a in node.names if a.name in PARTS and a.name.startswith("jax_")]
        elif isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            of_functions = owner.rpartition(".")[2].lstrip("_") == "functions" and node.attr in ("accumulate", "update")
            of_a_library = owner in ("jax", "optax") and node.attr in PARTS[owner]
            if of_a_library or (of_functions and id(node) not in compiled):
                copied.append(f"{node.lineno}: {ast.unparse(node)}")
    return copied


@pytest.mark.parametrize(
    ("function", "module"), [(function, module) for function, modules in CALLERS.items() for module in modules]
)
def test_every_caller_has_the_same_function_and_calls_it(function: Any, module: str) -> None:
    called = {
        ast.unparse(node.func)
        for node in ast.walk(ast.parse(Path(str(import_module(module).__file__)).read_text()))
        if isinstance(node, ast.Call)
    }
    owner, name = import_module(module), function.__name__
    if name not in vars(owner):  # imported with its module
        short = function.__module__.rpartition(".")[2]
        owner, name = vars(owner)[short], f"{short}.{name}"
    assert getattr(owner, function.__name__) is function
    assert name in called


def test_no_caller_puts_a_step_or_a_forward_pass_together_itself() -> None:
    files = [
        *Path(str(step.__file__)).parent.glob("*.py"),
        *(ROOT / "parity").rglob("*.py"),
        *(path for path in (ROOT / "benchmarks").rglob("*.py") if path.name not in ONE_OPERATION),
        Path(__file__).with_name("support.py"),
    ]
    files = [path for path in files if path not in (Path(str(step.__file__)), Path(str(optim.__file__)))]
    copied = {str(path.relative_to(ROOT)): copied_parts(path.read_text()) for path in files}
    assert {"jax_simpo", "parity", "benchmarks", "tests"} == {Path(path).parts[0] for path in copied}
    assert len(copied) > 30
    assert not {path: lines for path, lines in copied.items() if lines}


@pytest.mark.parametrize(
    "wrong",
    [
        "for rows in batch.micro_batches:\n    so_far = self.functions.accumulate(params, so_far, rows, denominators)",
        "params, state, norm = functions.update(params, state, gradients)",
        "step = self._functions.accumulate\nso_far = step(params, None, rows, denominators)",
        "def f():\n    import jax\n    return jax.grad(loss)(params)",
        "from jax import value_and_grad",
        "import optax\nparams = optax.apply_updates(params, updates)",
        "from jax_simpo.training.optim import make_optimizer",
        "from jax_simpo.ops.logprobs import target_logps as logps_of",
        "import jax_simpo.ops.logprobs",
        "from jax_simpo.ops import logprobs",
        "from jax_simpo.ops.attention import prepare_mask",
        "from jax_simpo.training.step import micro_batch_loss",
    ],
)
def test_a_module_with_a_copy_of_the_step_is_found(wrong: str) -> None:
    assert len(copied_parts(wrong)) == 1


def test_a_module_that_calls_the_step_or_compiles_it_is_none() -> None:
    assert not copied_parts(
        "from jax_simpo.training.step import run_step\n"
        "params, state, metrics = run_step(functions, params, state, batch)\n"
        "memory = functions.accumulate.lower(params, so_far, rows, ones).compile()\n"
        "so_far = jax.eval_shape(self.functions.accumulate, params, None, rows, ones)\n"
        "programs = functions.update._cache_size()\n"
        "values.update(metrics)\n"
    )


def test_parity_compiles_the_forward_pass_that_scoring_and_training_sum_up() -> None:
    forward = Forward(tiny_model(), "dense", 64)
    runner: Any = Runner(None, None, mesh_of((1, 1, 1)), forward, OBJECTIVE)  # type: ignore[arg-type]
    assert runner.target_logps.__wrapped__ == forward.target_logps
    assert runner.sum_responses.__wrapped__ == forward.sum_responses

    class Ones(Forward):
        def target_logps(self, params: Params, rows: Any) -> jax.Array:
            return jnp.ones(rows["target_token"].shape)

    pairs, mesh = some_pairs(6), mesh_of((1, 1, 1))
    rows = put_rows(build_step(plan_of(pairs, mesh, batch=6), pairs, 0).micro_batches[0].arrays(), mesh)
    summed = Ones(forward.model, "dense", 64).response_logps({}, rows)
    assert (np.asarray(summed.length) > 0).sum() >= 2
    np.testing.assert_array_equal(summed.sum, summed.length)


def test_parity_divides_every_micro_batch_by_the_pairs_and_chosen_tokens_of_the_whole_step() -> None:
    pairs, mesh = some_pairs(20), mesh_of((1, 1, 1))
    whole_step = build_step(plan_of(pairs, mesh, batch=20), pairs, 0)
    batches = RIGHT.micro_batches(whole_step, OBJECTIVE)
    assert len(batches) == len(whole_step.micro_batches) > 1
    for batch, right in zip(batches, step.split_step(whole_step, OBJECTIVE), strict=True):
        assert batch.rows is right.rows and batch.row_count == right.row_count
        assert [float(x) for x in batch.denominators] == [20, whole_step.chosen_tokens]
