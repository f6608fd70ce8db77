"""Reads and writes the YAML of a config file, without YAML's traps.

Plain PyYAML reads `5e-7` as text, `no` as false, `1:30` as 90 and lets a key that stands twice win silently. Here
numbers are what Python calls numbers, only `true` and `false` are booleans, and a doubled key is an error.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from jax_simpo.errors import ConfigError

# Tag, pattern and possible first characters of the scalars that are not text.
_SCALARS: tuple[tuple[str, re.Pattern[str], str], ...] = (
    ("tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    ("tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$"), "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        re.compile(
            r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
        ),
        "-+.0123456789",
    ),
    ("tag:yaml.org,2002:null", re.compile(r"(?:~|null|Null|NULL|)$"), "~nN\0"),
    ("tag:yaml.org,2002:merge", re.compile(r"<<$"), "<"),
)


class _Loader(yaml.SafeLoader):
    """A safe loader that knows the scalars above and refuses doubled keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key is text, not a list or a mapping", key.start_mark
                )
            line = key.start_mark.line + 1
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key `{key.value}` stands twice, first in line {seen[key.value]}", key.start_mark
                )
            seen[key.value] = line
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """A safe dumper that quotes all text that this loader, or a plain YAML reader, would not take for text."""


# An own table, without PyYAML's: the dumper keeps that too, and so quotes what either would not read as text.
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in _SCALARS:
    # The empty scalar has no first character; PyYAML looks it up under "".
    _characters = ["" if c == "\0" else c for c in _first]
    _Loader.add_implicit_resolver(_tag, _pattern, _characters)
    _Dumper.add_implicit_resolver(_tag, _pattern, _characters)


def parse_value(text: str) -> Any:
    """Reads one value as YAML. Raises `yaml.YAMLError` if it is not YAML."""
    return yaml.load(text, _Loader)


def dump(values: dict[str, Any]) -> str:
    """Writes a mapping as YAML, keys in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def read_file(path: str | Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Reads a config file; returns its keys and values, and the line of each top-level key.

    Raises:
        ConfigError: the file is missing, is not text, or is not a YAML mapping.
    """
    path = Path(path)
    if not path.exists():
        near = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        there = f"; {path.absolute().parent} has {', '.join(near[:12])}" if near else f" in {path.absolute().parent}"
        raise ConfigError(f"{path}: no such config file{there}")
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name the YAML file in it")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file in UTF-8 ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        values = None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        context = f"{error.context}: " if error.context else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {context}{error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if values is None:
        raise ConfigError(f"{path}: the file is empty; a config needs at least a model and a `dataset_mixer`")
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected lines of `key: value`, got {_kind(values)}")
    lines = {}
    assert node is not None
    for key_node, _ in node.value:
        lines[str(key_node.value)] = key_node.start_mark.line + 1
    for key in values:
        if not isinstance(key, str):
            raise ConfigError(f"{path}, line {lines.get(str(key), '?')}: the key {key!r} is not text")
    return values, lines


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list) else f"the single value {value!r}"
