"""Finds a model, a folder or a GGUF file, on the disk or on the hub, and reads its configuration."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from jax_simpo.errors import ModelError
from jax_simpo.gguf_files import find_builtin, gguf_parts, is_gguf
from jax_simpo.hf.config import read_model_config
from jax_simpo.hf.gguf_models import read_gguf_config
from jax_simpo.models.config import ModelConfig

_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt"]


def resolve_model_folder(name_or_path: str | Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """Returns the folder of a model: the path itself, or the local copy of a hub id, downloaded if it is missing.

    A model in a single file has no folder, and the path of the GGUF file is returned.

    Args:
        name_or_path: a folder, a GGUF file, a hub id, or a name such as `builtin:smollm2`.
        revision: branch, tag or commit of a hub model.
        weights: download the weights too; False takes the configuration and the tokenizer only.

    Raises:
        ModelError: there is no such folder, and no such model on a hub that can be reached.
    """
    name = str(name_or_path)
    if name.startswith("builtin:"):
        return find_builtin(name)
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    if is_gguf(folder):
        return gguf_parts(folder)[0]
    if folder.exists():
        raise ModelError(
            f"{name}: is a file; a model is a folder with config.json and safetensors files, or a .gguf file"
        )
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise ModelError(f"{name}: no such folder; a model is a folder, or a hub id such as meta-llama/Llama-3.1-8B")
    import huggingface_hub  # slow to import, and a local folder does not need it

    try:
        # "*/*": some repositories keep a second copy of the weights in a subfolder.
        path = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            allow_patterns=_HUB_FILES,
            ignore_patterns=["*/*"] if weights else ["*/*", "*.safetensors"],
        )
    except Exception as error:  # not found, gated, offline, interrupted: two libraries raise a dozen types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{name}: no such folder, and the hub gave no such model ({type(error).__name__}: {reason}). Check the "
            "spelling and the network; for a gated model accept its terms and run `hf auth login`"
        ) from error
    return Path(path)


def load_model_config(folder: str | Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Reads `config.json` of a model folder; returns it as a `ModelConfig` and as the parsed file.

    For a GGUF file, its metadata take the place of `config.json`.

    Raises:
        ModelError: the file is missing, is not JSON, or describes a model that is not supported.
    """
    if is_gguf(folder):
        raw = read_gguf_config(Path(folder))
        return read_model_config(raw, source=str(folder)), raw
    path = Path(folder) / "config.json"
    if not path.is_file():
        adapter = (path.parent / "adapter_config.json").is_file()
        hint = ". This is an adapter; `jax-simpo export --merge` makes a model of it and its base" if adapter else ""
        raise ModelError(f"{path}: no such file; a model folder has a config.json{hint}")
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:  # also a number of thousands of digits
        raise ModelError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(raw, dict):
        raise ModelError(f"{path}: expected a JSON object, got {type(raw).__name__}")
    return read_model_config(raw, source=str(path)), raw


def load_end_ids(folder: str | Path) -> tuple[int, ...]:
    """Reads the tokens that end an answer from a model folder's `generation_config.json`; empty where it names none.

    Raises:
        ModelError: the file is not JSON, or what it names are no token ids.
    """
    config = load_generation_config(folder)
    named = config.get("eos_token_id") if isinstance(config, dict) else None
    ids = named if isinstance(named, list) else [] if named is None else [named]
    if any(isinstance(token, bool) or not isinstance(token, int) or token < 0 for token in ids):
        raise ModelError(
            f"{Path(folder) / 'generation_config.json'}: eos_token_id={named!r}, expected a token id or a list of them"
        )
    return tuple(ids)


def load_generation_config(folder: str | Path) -> dict[str, Any] | None:
    """Reads `generation_config.json` of a model folder, for `save_model`; returns None where there is no such file.

    Raises:
        ModelError: the file is not JSON.
    """
    path = Path(folder) / "generation_config.json"
    try:
        return json.loads(path.read_text()) if path.is_file() else None
    except json.JSONDecodeError as error:
        raise ModelError(f"{path}: not valid JSON ({error})") from error
