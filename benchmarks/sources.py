"""Finds the source files that a script runs, so that its measurements outlast changes to the others.

Everything is read from the syntax of this project's own files, and nothing is imported: the imports at a file's top and
inside its functions, those for type checkers left out; and dotted names in strings, such as the modules of workers
(`python -m NAME`) and the registries of backends. A name that is put together from parts is not found.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


@cache
def code_digest(module: str, root: Path = ROOT) -> str:
    """Returns a short checksum of a script's own source and of all that it imports of the project, also without git.

    Args:
        module: the script. Of one that is not part of the project there is no more than its name.
        root: the folder of the project's packages.
    """
    digest = hashlib.sha256(module.encode())
    for path in sorted(source_files(module, root)):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def source_files(module: str, root: Path = ROOT) -> set[Path]:
    """Returns the file of a module, those of everything that it imports of the project, and of what these import."""
    found: set[tuple[Path, bool]] = set()
    waiting = [module]
    while waiting:
        for file in _files(waiting.pop(), root) - found:
            found.add(file)
            waiting.extend(_names(*file, root))
    return {path for path, _ in found}


def _files(name: str, root: Path) -> set[tuple[Path, bool]]:
    """Returns the file that a dotted name stands for, or the longest part of it, and those of the packages around it.

    With each comes True if all of it counts. Of a package around it only the imports do, unless something in the
    package is asked for that is no module: it may import that when it is asked, from a module that it names in a string
    or for type checkers. A name that does not begin with a package of the project stands for nothing.
    """
    packages: list[Path] = []
    folder = root
    for part in name.split("."):
        if (folder / part / "__init__.py").exists():
            folder /= part
            packages.append(folder / "__init__.py")
        elif packages and (folder / f"{part}.py").exists():
            return {(package, False) for package in packages} | {(folder / f"{part}.py", True)}
        else:
            break
    return {(package, package == packages[-1]) for package in packages}


@cache
def _names(path: Path, whole: bool, root: Path) -> frozenset[str]:
    """Returns the dotted names that a file imports; if all of it counts, also those that it has as strings."""
    package = ".".join(path.relative_to(root).parent.parts)
    skipped = () if whole and path.name == "__init__.py" else ("TYPE_CHECKING",)
    return frozenset(_names_in(ast.parse(path.read_bytes()), package, whole, skipped))


def _names_in(node: ast.AST, package: str, strings: bool, skipped: tuple[str, ...]) -> Iterator[str]:
    match node:
        case ast.If(test=ast.Name(id=name)) if name in skipped:
            children: list[ast.AST] = list(node.orelse)
        case ast.Import():
            yield from (alias.name for alias in node.names)
            return
        case ast.ImportFrom():
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)  # a module, or something in it
            return
        case ast.Constant(value=str(text)) if strings and _DOTTED.fullmatch(text):
            yield text
            return
        case _:
            children = list(ast.iter_child_nodes(node))
    for child in children:
        yield from _names_in(child, package, strings, skipped)
