"""Holds the source to the import directions of the design.

Read from the source, not from `sys.modules`: third-party packages import torch of their own accord where it is there.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
JAX = ("jax", "jaxlib", "flax", "optax", "orbax", "chex")
TORCH = ("torch", "deepspeed", "accelerate", "peft", "trl")

# Modules (a module and all below it) -> what they must not import.
RULES: list[tuple[str, tuple[str, ...]]] = [
    ("jax_simpo", TORCH),
    ("jax_simpo.config", JAX),
    ("jax_simpo.config", ("jax_simpo.data", "jax_simpo.models", "jax_simpo.ops", "jax_simpo.train")),
    ("jax_simpo.data", JAX),
    ("jax_simpo.data", ("jax_simpo.models", "jax_simpo.ops", "jax_simpo.objectives.simpo", "jax_simpo.train")),
    ("jax_simpo.ops", ("jax_simpo.models", "jax_simpo.train")),
    ("jax_simpo.objectives.simpo", ("jax_simpo.models", "jax_simpo.train")),
    ("jax_simpo.models", ("jax_simpo.train", "jax_simpo.objectives.simpo")),
    *((f"jax_simpo.{name}", ("jax_simpo.cli",)) for name in ("config", "data", "ops", "losses", "models", "train")),
    ("torch_ref", JAX),
    # The two sides of a comparison run apart, and what compares them belongs to neither.
    ("parity.jax_side", (*TORCH, "torch_ref")),
    ("parity.torch_side", (*JAX, "jax_simpo.models", "jax_simpo.ops", "jax_simpo.objectives.simpo", "jax_simpo.train")),
    *((f"parity.{name}", (*JAX, *TORCH)) for name in ("cases", "results", "compare", "report", "processes")),
]
# torch_ref shares the config and the data with the program, and nothing else.
TORCH_REF_MAY = ("jax_simpo.config", "jax_simpo.data", "jax_simpo.errors")


def _below(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _inside(module: str, package: str) -> bool:
    """Whether a module is the named one, lies below it, or is one of its parts (`config` and `config_yaml`)."""
    return _below(module, package) or (module.startswith(f"{package}_") and package.startswith("jax_simpo."))


def imports_of(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and full name of everything a module imports, wherever in it; type-checking blocks included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif (
            # importlib.import_module("torch") and __import__("torch")
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield node.lineno, str(node.args[0].value)


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What a module imports and must not."""
    found = []
    for line, imported in imports_of(source, module, is_package):
        for package, forbidden in RULES:
            if _inside(module, package) and any(_below(imported, f) for f in forbidden):
                found.append(f"{module}:{line} imports {imported}, which {package} must not")
        foreign = _below(imported, "jax_simpo") and not any(_inside(imported, allowed) for allowed in TORCH_REF_MAY)
        if _below(module, "torch_ref") and foreign:
            found.append(f"{module}:{line} imports {imported}; of jax_simpo it may import the config and the data only")
    return found


def _modules() -> Iterator[tuple[str, bool, Path]]:
    for package in ("jax_simpo", "torch_ref", "parity"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            yield ".".join(parts[:-1] if is_package else parts), is_package, path


def test_every_package_that_is_imported_is_a_dependency_of_its_own():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["gpu"], *extras["tpu"]]
    listed = {re.split(r"[<>=; \[]", line)[0].lower().replace("_", "-") for line in lines}
    listed.add("pydantic-core")  # a part of pydantic, which pins it
    imported = {
        name.partition(".")[0]
        for module, is_package, path in _modules()
        if _below(module, "jax_simpo")
        for _, name in imports_of(path.read_text(), module, is_package)
    } - sys.stdlib_module_names
    packages = metadata.packages_distributions()
    missing = {
        name
        for name in imported - {"jax_simpo"}
        if listed.isdisjoint(package.lower().replace("_", "-") for package in packages.get(name, [name]))
    }
    assert not missing


def test_every_import_points_the_way_of_the_data():
    modules = list(_modules())
    assert len(modules) > 20
    found = [v for module, is_package, path in modules for v in violations(path.read_text(), module, is_package)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("jax_simpo.data.rows", "import jax.numpy as jnp"),
        ("jax_simpo.data.rows", "def f():\n    from torch import nn"),
        ("jax_simpo.data.rows", "from .. import models"),
        ("jax_simpo.config", "import flax"),
        ("jax_simpo.config.yaml_files", "import jax"),
        ("jax_simpo.train.step", "from importlib import import_module\nt = import_module('torch')"),
        ("jax_simpo.ops.attention", "from jax_simpo.models.config import ModelConfig"),
        ("jax_simpo.ops.attention", "from jax_simpo import models"),
        ("jax_simpo.hf.read", "from jax_simpo.train import step"),
        ("jax_simpo.train.trainer", "from jax_simpo.cli import main"),
        ("torch_ref.model", "import jax"),
        ("torch_ref.model", "from jax_simpo import losses"),
        ("parity.torch_side", "from jax_simpo.objectives.simpo import simpo_losses"),
    ],
)
def test_a_forbidden_import_is_found(module, source):
    assert violations(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("jax_simpo.data.rows", "from jaxtyping import Int\nfrom .pairs import TokenizedPair"),
        ("jax_simpo.train.step", "import jax\nfrom jax_simpo import losses\nfrom jax_simpo.models import transformer"),
        ("torch_ref.model", "import torch\nfrom jax_simpo.data import rows\nfrom jax_simpo.config import load_config"),
    ],
)
def test_an_allowed_import_is_not(module, source):
    assert violations(source, module) == []
