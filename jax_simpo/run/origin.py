"""Says where the model that a run starts from comes from, for the model card: its name on the hub, and its licence."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax_simpo.errors import ModelError
from jax_simpo.gguf_files import BUILTIN_MODELS, open_gguf
from jax_simpo.run.markdown import one_line

_HUB_PAGE = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+?)(?:\.git|/tree/[\w./-]+)?/?")
# Keys of llama.cpp's converter (gguf-py, `constants.py`), the nearest first: the source of the file, then its own page.
_SOURCES = ("general.source.repo_url", "general.source.url", "general.repo_url", "general.url")
_PARENT = re.compile(r"general\.base_model\.\d+\.repo_url")
# What the hub takes as a licence; it refuses a card with another word. The licences of the supported families are here,
# and common ones. Others are written as `other`, with their name.
_HUB_LICENCES = frozenset(
    "apache-2.0 mit llama2 llama3 llama3.1 llama3.2 llama3.3 gemma openrail bsd-2-clause bsd-3-clause gpl-3.0 agpl-3.0 "
    "lgpl-3.0 mpl-2.0 cc0-1.0 cc-by-4.0 cc-by-sa-4.0 cc-by-nc-4.0 cc-by-nc-sa-4.0 cc-by-nc-nd-4.0 unlicense".split()
)


@dataclass(frozen=True)
class Origin:
    """Names the model that weights come from, in the words of a card's front matter.

    Attributes:
        base_models: hub ids; several of a merged model. Empty where nothing is known.
        license: the licence as the hub calls it, or `other`; None where nothing is known.
        license_name: the name of one that the hub has no word for.
        license_link: where that one can be read.
    """

    base_models: tuple[str, ...] = ()
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None


def gguf_origin(name: str) -> Origin:
    """Returns what is known of a built-in model, or what a GGUF file says of itself.

    Many files name no source, but the models that their own was made from. These stand in for it.
    """
    if (model := BUILTIN_MODELS.get(name)) is not None:
        return Origin((model.hub_id,), model.licence)
    try:
        metadata = open_gguf(Path(name).expanduser()).metadata
    except ModelError:  # moved away since it was read: a card without a licence is no reason to lose a run
        return Origin()
    bases = _hub_ids(metadata, _SOURCES)[:1] or _hub_ids(metadata, filter(_PARENT.fullmatch, metadata))
    return Origin(tuple(bases), *_licence(metadata))


def _text(metadata: Mapping[str, Any], key: str) -> str:
    """Returns a text of the metadata in one line; an empty one where there is none."""
    value = metadata.get(key)
    return one_line(value).strip() if isinstance(value, str) else ""


def _hub_ids(metadata: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """Returns the hub ids of those keys that hold the address of a model on the hub."""
    found = (_HUB_PAGE.fullmatch(_text(metadata, key)) for key in keys)
    return list(dict.fromkeys(match[1] for match in found if match))


def _licence(metadata: Mapping[str, Any]) -> tuple[str | None, str | None, str | None]:
    """Returns `license`, `license_name` and `license_link` of a card."""
    licence, name, link = (_text(metadata, f"general.license{key}") for key in ("", ".name", ".link"))
    if not licence:
        return None, None, None
    if licence.lower() in _HUB_LICENCES:
        return licence.lower(), None, None
    name = name or licence
    return "other", name if name != "other" else None, link if link.startswith("https://") else None
