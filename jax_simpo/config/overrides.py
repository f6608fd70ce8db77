"""Applies `--key=value` arguments of the command line to the values of a config file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_origin

import yaml
from pydantic import BaseModel

from jax_simpo.config import foreign, help, shown, yaml_files
from jax_simpo.errors import ConfigError
from jax_simpo.redact import HIDDEN

_MOST_LEVELS = 50


@dataclass
class Values:
    """The values of a run before they are checked, and the place that each comes from.

    `places` holds for each key the file and line, or the override, that set it; `names` holds the key that the user
    wrote where it is not ours.
    """

    values: dict[str, Any]
    notices: list[str]
    places: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)


def apply(overrides: Sequence[str], to: Values, model: type[BaseModel]) -> None:
    """Applies overrides in order; a later one replaces an earlier one.

    Raises:
        ConfigError: with every override that is not of the form `--key=value`, or whose dotted key leads nowhere.
    """
    mistakes = []
    for override in overrides:
        try:
            _apply(override, to, model)
        except ConfigError as error:
            mistakes.append(str(error))
    if mistakes:
        raise ConfigError("\n".join(mistakes))


def _apply(override: str, to: Values, model: type[BaseModel]) -> None:
    key, equals, text = override.removeprefix("--").partition("=")
    place = f"--{key}={HIDDEN}" if shown.is_secret(key) else shown.one_line(override)
    if not override.startswith("--") or not equals or not key:
        form = shown.one_line(f"--{key.lstrip('-') or 'key'}={text or 'VALUE'}")
        raise ConfigError(f"{place}: not an override; write `--key=value` as one argument, here `{form}`")
    top, dot, rest = key.partition(".")
    top = top.replace("-", "_")
    if dot and top == "dataset_mixer":
        # A source may be a path with dots and even `=`; its fraction never holds one.
        rest, _, text = override.partition(".")[2].rpartition("=")
        path = [rest]
    else:
        path = rest.split(".") if dot else []
    if not all(path):
        raise ConfigError(f"{place}: the key `{shown.one_line(key)}` ends in a dot or has two in a row")
    if len(path) > _MOST_LEVELS:
        raise ConfigError(f"{place}: the key has {len(path):,} dots; no key is below more than {_MOST_LEVELS} others")
    value = _read_value(top, path, text, place, model)
    if not path:
        translated, notices, origin = foreign.translate({top: value}, lambda _: place)
        for one, other in (("gamma", "gamma_beta_ratio"), ("gamma_beta_ratio", "gamma")):
            if one in translated:  # two names of one setting, of which the last one counts
                to.values.pop(other, None)
        to.values.update(translated)
        to.notices.extend(notices)
        for ours in translated:
            to.places[ours] = place
            to.names[ours] = origin.get(ours, ours)
    elif top in foreign.KEYS:
        to.notices.extend(foreign.translate({top: {rest: value}}, lambda _: place)[1])
    else:
        _check_nested(top, place, model)
        to.places[top] = place
        to.values[top] = _with(to.values.get(top), path, value, remove=top == "dataset_mixer" and value is None)


def _with(old: Any, path: list[str], value: Any, remove: bool) -> dict[str, Any]:
    """Returns a copy of a mapping in which one nested key is set, or removed."""
    copy = dict(old) if isinstance(old, dict) else {}
    if len(path) > 1:
        copy[path[0]] = _with(copy.get(path[0]), path[1:], value, remove)
    elif remove:
        copy.pop(path[0], None)
    else:
        copy[path[0]] = value
    return copy


def _read_value(top: str, path: list[str], text: str, place: str, model: type[BaseModel]) -> Any:
    """Reads a value as YAML; for a key that holds text, returns the text as it is."""
    key = help.keys_of(model).get(top)
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if key is not None and not path and help.members(key.annotation) == [str] and not quoted:
        return None if text in ("", "~", "null") else text
    try:
        return yaml_files.parse_value(text)
    except yaml.MarkedYAMLError as error:
        problem = shown.one_line(str(error.problem))
        raise ConfigError(f"{place}: the value is not valid YAML ({problem}); text may be put in quotes") from None


def _check_nested(top: str, place: str, model: type[BaseModel]) -> None:
    """Raises for a dotted key whose first part has no keys below it."""
    key = help.keys_of(model).get(top)
    if key is None:
        raise ConfigError(f"{place}: unknown key `{shown.one_line(top)}`.{help.did_you_mean(top, model)}")
    if not help.nested(key) and not any(get_origin(m) is dict for m in help.members(key.annotation)):
        raise ConfigError(f"{place}: `{top}` has no keys below it; write `--{top}=VALUE`")
