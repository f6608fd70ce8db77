"""Holds the source to the table of docs/architecture.md: which room may import which, and no circle anywhere.

Imports are read from the source, not from `sys.modules`: third-party packages import torch of their own accord where it
is installed.
"""

from __future__ import annotations

import ast
import graphlib
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import get_args

import pytest

from jax_simpo.config.kinds import Tracker

ROOT = Path(__file__).parents[1]
PACKAGES = ("jax_simpo", "torch_ref", "parity", "benchmarks")
JAX = ("jax", "jaxlib", "flax", "optax", "orbax", "chex")
TORCH = ("torch", "deepspeed", "accelerate", "peft", "trl")
HEADER = ["room", "may import", "jax", "torch"]


@dataclass(frozen=True)
class Room:
    """One line of the table: a module or a package, and what its source may import.

    Attributes:
        name: the module, or the package with everything in it that has no line of its own.
        may: the rooms it may import besides itself.
        libraries: the libraries it must not import.
    """

    name: str
    may: frozenset[str]
    libraries: tuple[str, ...]


def read_table(page: str) -> dict[str, Room]:
    """Reads the rooms of the table whose header is `HEADER`."""
    lines = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in page.splitlines()]
    start = lines.index(HEADER)
    rooms = {}
    for cells in lines[start + 2 :]:
        if len(cells) != len(HEADER):
            break
        name, may, jax, torch = cells
        forbidden = (JAX if jax == "no" else ()) + (TORCH if torch == "no" else ())
        rooms[name.strip("`")] = Room(name.strip("`"), frozenset(re.findall(r"`([\w.]+)`", may)), forbidden)
    return rooms


def room_of(module: str, rooms: Mapping[str, Room]) -> str | None:
    """The most specific line of the table that a module belongs to."""
    parts = module.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((name for name in names if name in rooms), None)


def imports_of(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and full name of everything a module imports, at its top or inside functions; also for type checkers."""
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


@dataclass(frozen=True)
class Source:
    """The text of one module of the repository."""

    module: str
    text: str
    is_package: bool = False

    def imports(self) -> Iterator[tuple[int, str]]:
        return imports_of(self.text, self.module, self.is_package)


def sources() -> dict[str, Source]:
    """Every module of the repository's packages, by name."""
    modules = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if is_package else parts)
            modules[name] = Source(name, path.read_text(), is_package)
    return modules


def resolve(imported: str, modules: Mapping[str, Source]) -> str | None:
    """The module of the repository that an imported name is, or lies in; None for another library's."""
    if imported in modules:
        return imported
    parent = imported.rpartition(".")[0]
    return parent if parent in modules else None


def violations(source: Source, rooms: Mapping[str, Room], modules: Mapping[str, Source]) -> list[str]:
    """The imports of a module that the table does not allow, in words."""
    room_name = room_of(source.module, rooms)
    if room_name is None:
        return [f"{source.module} is in no room of the table"]
    room, found = rooms[room_name], []
    for line, imported in source.imports():
        target = resolve(imported, modules)
        if target is None:
            if imported.partition(".")[0] in room.libraries:
                found.append(f"{source.module}:{line} imports {imported}, which {room_name} must not")
            continue
        other = room_of(target, rooms)
        if other != room_name and other not in room.may:
            found.append(f"{source.module}:{line} imports {target} of {other}, which {room_name} may not import")
    return found


def circle(modules: Mapping[str, Source]) -> list[str]:
    """A circle of modules that import one another, or an empty list."""
    arrows = {
        name: {target for _, imported in source.imports() if (target := resolve(imported, modules)) and target != name}
        for name, source in modules.items()
    }
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as error:
        modules_in_circle: list[str] = error.args[1]
        return modules_in_circle
    return []


@pytest.fixture(scope="module")
def rooms() -> dict[str, Room]:
    return read_table((ROOT / "docs/architecture.md").read_text())


@pytest.fixture(scope="module")
def modules() -> dict[str, Source]:
    return sources()


def test_every_package_that_is_imported_is_a_dependency_of_its_own(modules):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["gpu"], *extras["tpu"], *extras["gguf"]]
    lines += [line for tracker in get_args(Tracker) for line in extras[tracker]]
    listed = {re.split(r"[<>=; \[]", line)[0].lower().replace("_", "-") for line in lines}
    listed.add("pydantic-core")  # a part of pydantic, which pins it
    listed.add("mlflow")  # which mlflow-skinny installs
    listed.add("ipython")  # imported in a notebook only, where it is
    imported = {
        name.partition(".")[0]
        for module, source in modules.items()
        if module.partition(".")[0] == "jax_simpo"
        for _, name in source.imports()
    } - sys.stdlib_module_names
    packages = metadata.packages_distributions()
    missing = {
        name
        for name in imported - {"jax_simpo"}
        if listed.isdisjoint(package.lower().replace("_", "-") for package in packages.get(name, [name]))
    }
    assert not missing


def test_every_import_is_one_that_the_architecture_page_allows(rooms, modules):
    assert len(modules) > 100
    found = [violation for source in modules.values() for violation in violations(source, rooms, modules)]
    assert not found, "\n".join(found)


def test_every_line_of_the_table_is_a_room_that_exists(rooms, modules):
    named = {name for room in rooms.values() for name in (room.name, *room.may)}
    assert named <= modules.keys()
    assert named == rooms.keys()


def test_no_room_imports_one_that_may_import_it(rooms):
    arrows = {room.name: room.may - {room.name} for room in rooms.values()}
    assert set(graphlib.TopologicalSorter(arrows).static_order()) == rooms.keys()  # raises on a circle


def test_no_modules_import_one_another_in_a_circle(modules):
    assert circle(modules) == []


def test_a_circle_is_found(modules):
    planted = {
        **modules,
        "jax_simpo.errors": Source("jax_simpo.errors", "def f():\n    from jax_simpo.data import rows"),
        "jax_simpo.data.groups": Source("jax_simpo.data.groups", "from jax_simpo import errors"),
    }
    assert {"jax_simpo.errors", "jax_simpo.data.rows"} <= set(circle(planted))


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("jax_simpo.data.rows", "import jax.numpy as jnp"),
        ("jax_simpo.data.rows", "def f():\n    from torch import nn"),
        ("jax_simpo.data.rows", "from .. import models"),
        ("jax_simpo.config.schema", "import flax"),
        ("jax_simpo.config.schema", "from jax_simpo.data import rows"),
        ("jax_simpo.run.output", "import jax"),
        ("jax_simpo.run.output", "from jax_simpo.run.checkpoint import Checkpoints"),
        ("jax_simpo.training.step", "from importlib import import_module\nt = import_module('torch')"),
        ("jax_simpo.ops.attention.mask", "from jax_simpo.models.config import ModelConfig"),
        ("jax_simpo.ops.attention.mask", "from jax_simpo import models"),
        ("jax_simpo.models.config", "from jax_simpo.hf import families"),
        ("jax_simpo.models.generate", "from jax_simpo.training.step import make_train_functions"),
        ("jax_simpo.hf.read", "from jax_simpo.training import step"),
        ("jax_simpo.training.trainer", "from jax_simpo.cli import main"),
        ("jax_simpo.training.trainer", "from jax_simpo import api"),
        ("torch_ref.model", "import jax"),
        ("torch_ref.model", "from jax_simpo.objectives import simpo"),
        ("torch_ref.trainer", "from jax_simpo.run.checkpoint import Checkpoints"),
        ("parity.torch_side", "from jax_simpo.objectives.simpo import simpo_losses"),
        ("parity.compare", "import torch"),
        ("jax_simpo.unknown", "import json"),
    ],
)
def test_a_forbidden_import_is_found(module, text, rooms, modules):
    if module == "jax_simpo.unknown":
        rooms = {name: room for name, room in rooms.items() if name != "jax_simpo"}
    assert violations(Source(module, text), rooms, modules)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("jax_simpo.data.rows", "from jaxtyping import Int\nfrom .pairs import Group"),
        ("jax_simpo.training.step", "import jax\nfrom jax_simpo import hf\nfrom jax_simpo.models import policy"),
        ("torch_ref.model", "import torch\nfrom jax_simpo.data import rows\nfrom jax_simpo.run import files"),
    ],
)
def test_an_allowed_import_is_not(module, text, rooms, modules):
    assert violations(Source(module, text), rooms, modules) == []
