"""The kinds of values that config keys take: whole numbers, numbers, text, and names of files or models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field


def _no_bool(value: Any) -> Any:
    """Refuses true and false, which Python would take for 1 and 0."""
    if isinstance(value, bool):
        raise ValueError  # without a reason: the message says that a number is expected
    return value


def _whole(value: Any) -> Any:
    """Reads 1e6 and 12.0 as the whole numbers they are."""
    value = _no_bool(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def text(value: Any) -> Any:
    """Refuses text that names nothing and that no file of a run can hold."""
    if isinstance(value, str) and "\0" in value:
        raise ValueError("holds the character NUL; remove it")
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("holds bytes that are not UTF-8, or half of a surrogate pair; write it in Unicode")
    return value


def name(value: Any) -> Any:
    """Refuses text that is no path, nor a name on the hub."""
    if isinstance(text(value), str):
        if not value.strip():
            raise ValueError("is empty; give a name or a path, or leave the key out")
        if len(value.encode()) > 4095 or any(len(part.encode()) > 255 for part in value.split("/")):
            raise ValueError("is too long; a path has at most 4095 bytes, and 255 between two slashes")
        try:
            Path(value).expanduser()
        except RuntimeError:
            raise ValueError("begins with the home folder of a user who has none here") from None
    return value


Whole = Annotated[int, BeforeValidator(_whole)]
Number = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
Text = Annotated[str, AfterValidator(text)]
Name = Annotated[str, AfterValidator(name)]
