"""Writes the JSON schema of a config file, by which editors complete keys, show what they mean and mark mistakes."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from jax_simpo.config import foreign, help
from jax_simpo.config.objectives import OwnObjective

_LIMITS = {
    annotated_types.Gt: ("gt", "exclusiveMinimum"),
    annotated_types.Ge: ("ge", "minimum"),
    annotated_types.Lt: ("lt", "exclusiveMaximum"),
    annotated_types.Le: ("le", "maximum"),
}
_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number"}


def schema(model: type[BaseModel]) -> dict[str, Any]:
    """Returns the schema (draft 2020-12) of a config class. It knows the keys of the Hugging Face trainer, too."""
    properties = {key: _property(field) for key, field in help.keys_of(model).items()}
    for key in sorted(foreign.KEYS):
        properties[key] = {"description": _of_foreign(key), "deprecated": True}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "jax-simpo config",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "required": ["dataset_mixer"],
    }


def _of_foreign(key: str) -> str:
    if key == "gamma":
        return "Read as `gamma_beta_ratio`, which is gamma / beta."
    if key in foreign.RENAMED:
        return f"Read as `{foreign.RENAMED[key][0]}`."
    if key in foreign.WITHOUT_MEANING:
        return f"Without effect: {foreign.WITHOUT_MEANING[key]}."
    return f"An error, unless it asks for nothing: {foreign.NOT_SUPPORTED[key]}."


def _property(field: FieldInfo) -> dict[str, Any]:
    """Returns the schema of a key."""
    kinds = [_kind(kind) for kind in help.members(field.annotation) if kind is not OwnObjective]
    limits = {_LIMITS[type(m)][1]: getattr(m, _LIMITS[type(m)][0]) for m in field.metadata if type(m) in _LIMITS}
    kinds = [{**kind, **limits} if kind.get("type") in ("integer", "number") else kind for kind in kinds]
    if type(None) in get_args(field.annotation):
        kinds.append({"type": "null"})
    default = field.get_default(call_default_factory=True, validated_data={})
    shown = default.model_dump() if isinstance(default, BaseModel) else default
    described = {"description": field.description or "", "default": shown}
    return {**described, **(kinds[0] if len(kinds) == 1 else {"anyOf": kinds})}


def _kind(kind: Any) -> dict[str, Any]:
    """Returns the schema of one of the types that a key takes."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _any_of(arguments[1])}
    if origin is list:
        return {"type": "array", "items": _any_of(arguments[0])}
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        inner = {key: _property(field) for key, field in help.keys_of(kind).items()}
        return {"type": "object", "properties": inner, "additionalProperties": False}
    return {"type": _TYPES[kind]}


def _any_of(annotation: Any) -> dict[str, Any]:
    if annotation is Any:
        return {}
    kinds = [_kind(kind) for kind in help.members(annotation)]
    if type(None) in get_args(annotation):
        kinds.append({"type": "null"})
    return kinds[0] if len(kinds) == 1 else {"anyOf": kinds}
