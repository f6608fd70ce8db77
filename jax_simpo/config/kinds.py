"""The kinds of values that config keys take: whole numbers, numbers, text, and names of files or models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

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


Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]


def trackers(value: Any) -> Any:
    """Reads the names of trackers: one, a list, or none."""
    listed = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(listed, list):
        return value
    named = [name for name in dict.fromkeys(map(str, listed)) if name.lower() != "none"]
    known = get_args(Tracker)
    if unknown := [name for name in named if name not in known]:
        raise ValueError(f"names {unknown[0]!r}; there are {', '.join(known)}, and none")
    return named


def hub_strategy(value: Any) -> Any:
    """Refuses those of the Hugging Face trainer's strategies that would upload checkpoints."""
    if value in ("checkpoint", "all_checkpoints"):
        raise ValueError(
            "would upload checkpoints, whose optimizer state has twice the size of the weights and resumes a run of "
            "jax-simpo alone; give end, or every_save for the model of every checkpoint"
        )
    return value


Whole = Annotated[int, BeforeValidator(_whole)]
Number = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
Text = Annotated[str, AfterValidator(text)]
Name = Annotated[str, AfterValidator(name)]
Trackers = Annotated[list[Tracker], BeforeValidator(trackers)]
HubStrategy = Annotated[Literal["end", "every_save"], BeforeValidator(hub_strategy)]
