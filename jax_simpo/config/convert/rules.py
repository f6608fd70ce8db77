"""Defines what can become of a key of another trainer's file, and holds the file while it is converted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from jax_simpo.config import shown
from jax_simpo.redact import HIDDEN


class CannotKeepError(Exception):
    """A value that cannot be kept; its text says why and what to do."""


@dataclass(frozen=True)
class Keep:
    """The key becomes `key` of ours; `read` converts its value, or raises `CannotKeepError`."""

    key: str
    read: Callable[[Any], Any] | None = None
    note: str = ""


@dataclass(frozen=True)
class Drop:
    """The key has no part in what is trained, or asks for what is done anyway; `why` says so."""

    why: str


@dataclass(frozen=True)
class Refuse:
    """The key changes what is trained and cannot be kept, unless its value asks for nothing or is in `unless`."""

    why: str
    unless: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Part:
    """The key is read together with others by the trainer's own function; `ours` says for what, in a few words."""

    ours: str


@dataclass(frozen=True)
class Do:
    """A function of the draft, the key and its value; `ours` says what it sets, in a few words."""

    act: Callable[[Draft, str, Any], None]
    ours: str


Rule = Keep | Drop | Refuse | Part | Do


@dataclass(frozen=True)
class Options:
    """Holds what the user says besides the file.

    Attributes:
        method: for files of TRL: `cpo`, `dpo` or `orpo`; None finds it.
        data: the sources to train on, where the file cannot say.
        devices: the devices that the file was made for; None writes the batch keys as they are.
        drop: keys that are to be left out.
    """

    method: str | None = None
    data: tuple[str, ...] = ()
    devices: int | None = None
    drop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Line:
    """A line of our file: a value, where it comes from, and what else is to be known of it."""

    value: Any
    origin: str
    note: str = ""


@dataclass
class Draft:
    """A file while it is converted.

    Attributes:
        theirs: the keys and values of the file.
        place: names the place of a key.
        options: what the user says.
        folder: the folder of the file.
        ours: our keys.
        names: our key -> their key, for messages about its value.
        dropped: their keys that are not needed, with the reasons.
        errors: what cannot be kept.
    """

    theirs: Mapping[str, Any]
    place: Callable[[str], str]
    options: Options
    folder: str = "."
    ours: dict[str, Line] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    def get(self, key: str, default: Any = None) -> Any:
        """Returns the value of one of their keys; the default where it is missing or null."""
        value = None if key in self.options.drop else self.theirs.get(key)
        return default if value is None else value

    def set(self, key: str, value: Any, origin: str, note: str = "", of: str | None = None) -> None:
        """Sets a key of ours. `origin` says what it comes from, and `of` is the key of theirs that messages name."""
        self.ours[key] = Line(value, origin, note)
        if of is not None:
            self.names[key] = of

    def refuse(self, key: str, why: str) -> None:
        """Notes that a key of theirs cannot be kept."""
        self.errors.append(f"{self.place(key)}: `{shown_pair(key, self.theirs.get(key))}` cannot be kept: {why}")

    def pairs(self, *keys: str) -> str:
        """Returns those of some keys that the file gives, as it gives them, in one line."""
        given = [shown_pair(key, self.theirs[key]) for key in keys if key in self.theirs]
        return ", ".join(given)


def shown_pair(key: str, value: Any) -> str:
    """Returns a key and its value in one short line."""
    return f"{shown.one_line(key)}: {HIDDEN if shown.is_secret(key) and value else shown_value(value)}"


def shown_value(value: Any) -> str:
    """Returns a value as YAML would have it, in one short line."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return shown.one_line(str(value))


@dataclass(frozen=True)
class Trainer:
    """A trainer whose files are read.

    Attributes:
        name: what `--from` calls it.
        title: what it is called in sentences.
        markers: keys by which its files are known: no config of ours has them, nor one of another trainer.
        rules: its keys.
        together: sets the keys of ours that come from several of theirs: objective and data.
        defaults: our key -> what it trains with where its file says nothing.
        prefixes: the beginnings of keys that all have one rule.
    """

    name: str
    title: str
    markers: frozenset[str]
    rules: Mapping[str, Rule]
    together: Callable[[Draft], None]
    defaults: Mapping[str, Any]
    prefixes: Mapping[str, Rule] = field(default_factory=dict)

    def rule_of(self, key: str) -> Rule | None:
        """Returns the rule of a key; None for a key that is not known."""
        by_prefix = (rule for prefix, rule in self.prefixes.items() if key.startswith(prefix))
        return self.rules[key] if key in self.rules else next(by_prefix, None)

    def known_by(self, values: Mapping[str, Any]) -> list[str]:
        """Returns the keys of a file by which it is known to be this trainer's."""
        return [key for key in values if key in self.markers]


def meaning(rule: Rule) -> str:
    """Says in a few words what becomes of a key: `sft_weight`, or why there is none."""
    if isinstance(rule, Keep):
        return f"here it is `{rule.key}`"
    if isinstance(rule, Part | Do):
        return f"here it is {rule.ours}"
    return f"here it is not needed: {rule.why}" if isinstance(rule, Drop) else f"it cannot be kept here: {rule.why}"


def merged(*tables: Mapping[str, Rule]) -> dict[str, Rule]:
    """Joins tables of rules; of a key that stands in several, the last one counts."""
    return {key: rule for table in tables for key, rule in table.items()}


def each(names: str, rule: Rule) -> Iterator[tuple[str, Rule]]:
    """Yields a rule for each of some names that are separated by blanks."""
    return ((name, rule) for name in names.split())
