"""Writes the messages for wrong config keys and values, and the reference page of all keys."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from jax_simpo.config import foreign, shown, yaml_files
from jax_simpo.config.checks import Contradictions
from jax_simpo.config.convert.trainers import known_elsewhere
from jax_simpo.config.objectives import OwnObjective
from jax_simpo.pages import SITE
from jax_simpo.redact import HIDDEN

_SIGNS = {annotated_types.Gt: "gt", annotated_types.Ge: "ge", annotated_types.Lt: "lt", annotated_types.Le: "le"}
_SYMBOLS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
_MOST_MISTAKES = 50
_LONGEST_REASON = 1000


def keys_of(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Returns the keys of a config as users write them."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def members(annotation: Any) -> list[Any]:
    """Lists the types that a key takes, without wrappers and without None."""
    if get_origin(annotation) is Annotated:
        return members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [m for a in get_args(annotation) if a is not type(None) for m in members(a)]
    return [annotation]


def default_of(model: type[BaseModel], key: str) -> Any:
    """Returns the default of a key."""
    return keys_of(model)[key].get_default(call_default_factory=True, validated_data={})


def nested(field: FieldInfo) -> type[BaseModel] | None:
    """Returns the class of a nested config; None for a key that has no keys below it."""
    for member in members(field.annotation):
        if isinstance(member, type) and issubclass(member, BaseModel):
            return member
    return None


def expected(field: FieldInfo) -> str:
    """Says in a user's words which values a key takes."""
    kinds = members(field.annotation)
    words = []
    for kind in kinds:
        if get_origin(kind) is Literal:
            words += [str(choice) for choice in get_args(kind)]
        elif get_origin(kind) is dict:
            words.append("a mapping" if get_args(kind)[1] is Any else f"a mapping from {extras(field)['entries']}")
        elif get_origin(kind) is list:
            words.append(f"a list of {_items(kind)}")
        elif kind is OwnObjective:
            words.append("an objective of your own")
        elif issubclass(kind, BaseModel):
            words.append("a mapping with " + ", ".join(kind.model_fields))
        else:
            words.append({int: "a whole number", float: "a number", str: "text", bool: "true or false"}[kind])
    choice = len(words) > 1 and all(get_origin(kind) is Literal for kind in kinds)
    text = "one of " + ", ".join(words) if choice else " or ".join(words)
    limits = [
        f"{_SYMBOLS[_SIGNS[type(limit)]]} {getattr(limit, _SIGNS[type(limit)])}"
        for limit in field.metadata
        if type(limit) in _SIGNS
    ]
    return f"{text} {' and '.join(limits)}" if limits else text


def _items(kind: Any) -> str:
    """Says which entries a list takes."""
    (item,) = get_args(kind)
    return "text or null" if type(None) in get_args(item) else "text"


def explain_all(
    error: ValidationError,
    model: type[BaseModel],
    values: Mapping[str, Any],
    places: Mapping[str, str],
    names: Mapping[str, str],
    source: str,
) -> str:
    """Words the mistakes that pydantic has found, a line each. The arguments are those of `explain`."""
    lines = []
    for detail in error.errors()[:_MOST_MISTAKES]:
        found = detail.get("ctx", {}).get("error")
        if isinstance(found, Contradictions):
            lines += [f"{_place_of_check(each, places, source)}: {_reason(each)}" for each in found.mistakes]
        else:
            lines.append(explain(detail, model, values, places, names, source))
    if error.error_count() > _MOST_MISTAKES:
        lines.append(f"{source}: these are the first of {error.error_count():,} mistakes")
    return "\n".join(dict.fromkeys(lines))  # a key that may be one of two types complains once for each


def explain(
    error: ErrorDetails,
    model: type[BaseModel],
    values: Mapping[str, Any],
    places: Mapping[str, str],
    names: Mapping[str, str],
    path: str,
) -> str:
    """Words one mistake in a line: the place, the key, its value, the values it takes, and the nearest valid key.

    Args:
        error: one of pydantic's.
        model: the config class.
        values: what was validated.
        places: key -> the file and line or the override that set it.
        names: our key -> the key the user wrote.
        path: the config file.
    """
    location = [str(part) for part in error["loc"]]
    reason = str(error.get("ctx", {}).get("error", "")) if error["type"] == "value_error" else ""
    reason = _reason(reason)
    if not location:
        return f"{path}: {reason or error['msg']}"
    top = location[0]
    place = places.get(top, path)
    if error["type"] == "extra_forbidden":
        dotted = shown.one_line(".".join(location))
        said = HIDDEN if shown.is_secret(location[-1]) else shown.value(error["input"])
        return f"{place}: unknown key `{dotted}` (value {said}).{did_you_mean(dotted, model)}"
    if error["type"] == "missing":
        return f"{path}: the key `{top}` is required"
    if "`" in reason:
        return f"{place}: {reason}"
    field = keys_of(model)[top]
    key, value, wanted = names.get(top, top), values.get(top), expected(field)
    kinds = members(field.annotation)
    if len(location) > 1 and isinstance(value, Mapping) and location[1] in value:
        below = nested(field)
        key, value = f"{key}.{shown.one_line(location[1])}", value[location[1]]
        if below:
            wanted, kinds = (
                expected(below.model_fields[location[1]]),
                members(below.model_fields[location[1]].annotation),
            )
        else:
            kinds = [m for k in kinds if get_origin(k) is dict for m in members(get_args(k)[1])]
            wanted = "a number from 0 to 1" if kinds == [float] else "text" if kinds == [str] else "text or a mapping"
    elif len(location) > 1 and isinstance(value, list) and location[1].isdigit():
        value = value[int(location[1])]
        key, wanted = f"{key}[{location[1]}]", wanted.removeprefix("a list of ")
    if reason:
        return f"{place}: `{key}` {reason}"
    return f"{place}: `{key}` is {shown.value(value)}; expected {wanted}{_hint(field, key, value, wanted, kinds)}"


def _hint(field: FieldInfo, key: str, value: Any, wanted: str, kinds: list[Any]) -> str:
    """Says what to write instead, where that can be guessed; otherwise an empty text."""
    if value is None and not field.is_required():
        return f". For the default ({show_default(field)}) leave the key out"
    if (meant := _meant(value, kinds)) is not None:
        return f". Write {meant} without quotes" if meant == value else f". Write {meant}"
    choices = [str(c) for kind in kinds if get_origin(kind) is Literal for c in get_args(kind)]
    text = shown.one_line(str(value))
    if near := difflib.get_close_matches(text.lower(), choices, 1, 0.6):
        return f". Did you mean `{near[0]}`?"
    if key == "dataset_mixer" and isinstance(value, str):
        return f". Write `dataset_mixer: {{{text}: 1.0}}`"
    if wanted.startswith("text") and isinstance(value, int | float):
        return ". Put it in quotes"
    if wanted.startswith("a list of text") and isinstance(value, str):
        return f". Write `{key}: [{text}]`"
    return ""


_TRUTH = {"yes": "true", "on": "true", "1": "true", "no": "false", "off": "false", "0": "false"}


def _meant(value: Any, kinds: list[Any]) -> str | None:
    """Returns the YAML for a number in quotes, or for a truth value in another spelling; None for other values."""
    text = str(value).strip().lower()
    if bool in kinds:
        return text if text in ("true", "false") else _TRUTH.get(text)
    if isinstance(value, str) and not {int, float}.isdisjoint(kinds):
        number = yaml_files.parse_value(text) if re.fullmatch(r"[-+]?\.?\w[-+.\w]{0,50}", text) else None
        return text if isinstance(number, int | float) and not isinstance(number, bool) else None
    return None


def _reason(text: str) -> str:
    """Returns a reason as it is shown: in one line, which is not too long."""
    return shown.one_line(text, _LONGEST_REASON)


def _place_of_check(reason: str, places: Mapping[str, str], path: str) -> str:
    """Names the place where a check of several keys failed: the override that took part, if one did, else the file."""
    mentioned = [places.get(key, "") for key in re.findall(r"`([a-z_0-9]+)", reason)]
    return next((place for place in mentioned if place.startswith("--")), path)


def did_you_mean(key: str, model: type[BaseModel]) -> str:
    """Returns the nearest valid key, as a sentence with a leading space."""
    below = [f"{name}.{inner}" for name, f in keys_of(model).items() if (m := nested(f)) for inner in m.model_fields]
    plain = key.replace("-", "_").lower()
    for dotted in below:
        if dotted.endswith(f".{plain}"):
            return f" Did you mean `{dotted}`?"
    if elsewhere := known_elsewhere(plain):
        return f" {elsewhere}"
    own = [*keys_of(model), *below]
    near = difflib.get_close_matches(plain, own, 5, 0.7) + difflib.get_close_matches(plain, foreign.KEYS, 5, 0.8)
    alike = next((key for key in near if _is_slip(plain, key)), None)
    return f" Did you mean `{alike}`?" if alike else " `python -m jax_simpo.config` lists all keys."


def _is_slip(key: str, meant: str) -> bool:
    """Returns True if a key is another one misspelt: every word of each is like one of the other.

    Keys that merely look alike as a whole, such as `cpo_alpha` and `lora_alpha`, are about different things.
    """
    sides = [re.split(r"[._]", text) for text in (key, meant)]

    def like(a: str, b: str) -> bool:
        return a in b or b in a or difflib.SequenceMatcher(None, a, b).ratio() >= 0.6

    return all(any(like(a, b) for b in there) for here, there in (sides, sides[::-1]) for a in here)


def show_default(field: FieldInfo) -> str:
    """Returns a key's default as it would be written in YAML."""
    default = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(default, BaseModel):
        default = default.model_dump()
    if default is None or isinstance(default, bool):
        return "null" if default is None else str(default).lower()
    return str(default).replace("'", "")


def reference_page(model: type[BaseModel]) -> str:
    """Returns the reference page of all keys, as Markdown."""
    lines = [
        "# Config keys",
        "",
        "<!-- Made by `python -m jax_simpo.config` from jax_simpo/config/schema.py; do not edit. -->",
        "",
        "A config file is YAML with these keys. On the command line any of them can be set with `--key=value`, dotted",
        "for nested keys (`--mesh.fsdp=8`, `--dataset_mixer.pairs.jsonl=1.0`). Keys marked with * define the",
        "mathematics of a run: it can only be resumed with the same values. (Where the learning rate does not depend",
        "on the length of the run, `constant` or `constant_with_warmup` with `warmup_steps`, it may be made longer.)",
        "`jax-simpo configs --schema` prints a JSON schema of them, for editors.",
    ]
    tables: list[tuple[str, type[BaseModel]]] = []
    for name, field in keys_of(model).items():
        extra = extras(field)
        if extra["section"]:
            lines += ["", f"## {extra['section']}", "", "| key | value | default | meaning |", "|---|---|---|---|"]
        if below := nested(field):
            tables.append((name, below))
        default = "required" if field.is_required() else f"`{show_default(field)}`"
        star = "*" if extra["identity"] else ""
        lines.append(f"| `{name}`{star} | {expected(field)} | {default} | {field.description} |")
    for name, below in tables:
        lines += ["", f"## `{name}`", "", f"{below.__doc__}", "", "| key | default | meaning |", "|---|---|---|"]
        lines += [f"| `{name}.{n}` | `{show_default(f)}` | {f.description} |" for n, f in below.model_fields.items()]
    renamed = {k: f"`{ours}`" for k, (ours, _) in foreign.RENAMED.items()}
    renamed["gamma"] = "`gamma_beta_ratio`, which is gamma / beta"
    lines += ["", "## Keys of the Hugging Face trainer and of the original SimPO files"]
    for title, column, table in (
        ("Read under another name:", "here", renamed),
        ("Without effect here (a notice says so when they ask for something):", "instead", foreign.WITHOUT_MEANING),
        ("Errors, unless they ask for nothing (false, null, 0):", "why", foreign.NOT_SUPPORTED),
    ):
        lines += ["", title, "", f"| key | {column} |", "|---|---|", *(f"| `{k}` | {v} |" for k, v in table.items())]
    # The page lies beside those that it names, so it reads well in a clone and on the site.
    return re.sub(rf"{re.escape(SITE)}([\w/-]+)\.html", r"[\1.md](\1.md)", "\n".join(lines)) + "\n"


def extras(field: FieldInfo) -> dict[str, Any]:
    """Returns what the schema notes of a key besides its type: `section` and `identity`."""
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
