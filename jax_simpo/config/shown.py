"""Shortens the texts of users that a message quotes: keys and values may be of any length and hold any character."""

from __future__ import annotations

from typing import Any

from jax_simpo.redact import redact

_SECRET = frozenset({"hub_token", "hf_token", "hf_hub_token", "token", "wandb_api_key", "swanlab_api_key", "api_key"})

_READ = 5000  # characters of a text of any length, of which far fewer are shown


def one_line(text: str, most: int = 120) -> str:
    """Returns a text without secrets, line ends and other characters that do not print, cut to `most` characters."""
    text = redact(text[:_READ])
    cut = text if len(text) <= most else text[: most - 3] + "..."
    return cut if cut.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in cut)


def value(of: Any, most: int = 80) -> str:
    """Returns a value as YAML has it where it is null, true or false, and else as Python writes it."""
    if of is None:
        return "null"
    return str(of).lower() if isinstance(of, bool) else one_line(repr(of), most)


def is_secret(key: str) -> bool:
    """Returns True for the key of a token or password, whose value no message and no file may repeat."""
    return key.lstrip("-").replace("-", "_").lower() in _SECRET
