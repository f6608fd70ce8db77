"""Reads and writes the YAML of a config file, without YAML's traps.

Plain PyYAML reads `5e-7` as text, `no` as false, `1:30` as 90 and lets a key that stands twice win silently. Here
numbers are what Python calls numbers, only `true` and `false` are booleans, and a doubled key is an error.

PyYAML also has no limits: a short text of aliases may stand for billions of values, or for itself. So there are limits
here, far above any config, and whatever is wrong with a text is a `yaml.YAMLError`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from jax_simpo.config import shown
from jax_simpo.errors import ConfigError

_MOST_BYTES = 1_000_000
_MOST_VALUES = 100_000  # those that aliases stand for included
_MOST_LEVELS = 50
_MOST_DIGITS = 4300  # Python's own limit, above which it refuses to write or read a whole number

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


_TAGS = {tag: pattern for tag, pattern, _ in _SCALARS}
_TEXT, _INT, _MERGE = (f"tag:yaml.org,2002:{name}" for name in ("str", "int", "merge"))
_COLLECTIONS = {yaml.SequenceNode: "tag:yaml.org,2002:seq", yaml.MappingNode: "tag:yaml.org,2002:map"}


class _Loader(yaml.SafeLoader):
    """A safe loader that knows the scalars above and refuses doubled keys, and texts beyond the limits."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._values = self._levels = 0
        self._values_of: dict[str, int] = {}  # anchor -> how many it stands for; none as long as it is open

    def compose_node(self, parent: yaml.Node | None, index: Any) -> Any:
        """Composes the next value; counts what aliases stand for before anything is made of them."""
        event = self.peek_event()
        anchor, before = event.anchor, self._values
        if not isinstance(event, yaml.AliasEvent):
            self._values += 1
        elif anchor in self.anchors and anchor not in self._values_of:
            raise _error(f"`*{anchor}` stands inside of what it stands for", event)
        else:
            self._values += self._values_of.get(anchor, 0)
        if self._values > _MOST_VALUES:
            raise _error(f"more than {_MOST_VALUES:,} values, or aliases that stand for as many", event)
        if self._levels == _MOST_LEVELS:
            raise _error(f"more than {_MOST_LEVELS} levels of lists and mappings", event)
        self._levels += 1
        node = super().compose_node(parent, index)
        self._levels -= 1
        if anchor is not None:
            self._values_of.setdefault(anchor, self._values - before)
        _check_tag(node)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Composes a mapping whose keys are text, each of them once."""
        node = super().compose_mapping_node(anchor)
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if key.tag == _MERGE:
                continue
            if not isinstance(key, yaml.ScalarNode):
                raise _error("a key is text, not a list or a mapping", key)
            if key.value in seen:
                raise _error(f"the key `{key.value}` stands twice, first in line {seen[key.value]}", key)
            seen[key.value] = key.start_mark.line + 1
        return node


def _check_tag(node: Any) -> None:
    """Refuses values of a kind that is not known here, and those that are not of the kind that they are said to be."""
    if not isinstance(node, yaml.ScalarNode):
        wrong = node.tag != _COLLECTIONS[type(node)]
    else:
        wrong = node.tag != _TEXT and not (node.tag in _TAGS and _TAGS[node.tag].match(node.value))
        if node.tag == _INT and len(node.value) > _MOST_DIGITS:
            raise _error(f"a number of {len(node.value):,} digits", node)
        try:
            node.value.encode()
        except UnicodeEncodeError:
            raise _error("the text holds half of a Unicode surrogate pair", node) from None
    if wrong:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise _error(f"`{tag}` cannot be read here; leave it out, or put text in quotes", node)


def _error(problem: str, place: Any) -> yaml.MarkedYAMLError:
    """Makes the error of an event or of a node."""
    return yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)


class _Dumper(yaml.SafeDumper):
    """A safe dumper that quotes all text that this loader, or a plain YAML reader, would not take for text."""


# An own table, without PyYAML's: the dumper keeps that too, and so quotes what either would not read as text.
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in _SCALARS:
    # The empty scalar has no first character; PyYAML looks it up under "".
    _characters = ["" if c == "\0" else c for c in _first]
    _Loader.add_implicit_resolver(_tag, _pattern, _characters)
    _Dumper.add_implicit_resolver(_tag, _pattern, _characters)
_Loader.add_constructor(_MERGE, lambda _, node: node.value)  # where it is no key


def parse_value(text: str) -> Any:
    """Reads one value as YAML. Raises `yaml.YAMLError` if it is not YAML, or beyond the limits."""
    return _parse(text)[1]


def _parse(text: str) -> tuple[yaml.Node | None, Any]:
    """Returns the root node of a text and its value."""
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:  # it knows the place of a character, and not its line
        mark = yaml.Mark("", error.position, text.count("\n", 0, error.position), 0, None, 0)
        code = f"{error.character:04x}"
        problem = f"the character U+{code} cannot stand here; in double quotes write \\u{code}"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark) from None
    try:
        node = loader.get_single_node()
        return node, None if node is None else loader.construct_document(node)
    except (ValueError, OverflowError) as error:  # PyYAML checks neither the codes of characters nor its directives
        raise yaml.MarkedYAMLError(problem=str(error), problem_mark=loader.get_mark()) from None


def dump(values: dict[str, Any]) -> str:
    """Writes a mapping as YAML, keys in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def read_file(path: str | Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Reads a config file; returns its keys and values, and the line of each top-level key.

    Raises:
        ConfigError: the file is missing, is not text, or is not a YAML mapping.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise ConfigError(f"{path} is a folder; name the YAML file in it")
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        near = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        there = f"; {path.absolute().parent} has {', '.join(near[:12])}" if near else f" in {path.absolute().parent}"
        raise ConfigError(f"{path}: no such config file{there}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    if len(content) > _MOST_BYTES:
        raise ConfigError(f"{path}: longer than {_MOST_BYTES:,} bytes, which no config is; is this a file of data?")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file in UTF-8 ({error.reason} at byte {error.start})") from None
    try:
        node, values = _parse(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        context = f"{error.context}: " if error.context else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {shown.one_line(f'{context}{error.problem}')}") from None
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
            raise ConfigError(f"{path}, line {lines.get(str(key), '?')}: the key {shown.value(key)} is not text")
    return values, lines


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list) else f"the single value {shown.value(value)}"
