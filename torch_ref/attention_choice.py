"""Chooses the attention implementation of a run, and refuses those that cannot be used."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from jax_simpo.config import TrainConfig
from jax_simpo.errors import ConfigError
from torch_ref.attention import ROW_ATTENTION

# Name in the config -> implementation in transformers, for responses that are stacked along the batch.
STACKED_ATTENTION = {
    "sdpa": "sdpa",
    "dense": "eager",
    "flex": "flex_attention",
    "flash_attention_2": "flash_attention_2",
    "flash_attention_3": "flash_attention_3",
}
FLASH_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


@dataclass(frozen=True)
class AttentionChoice:
    """The attention implementation of a run.

    Attributes:
        name: its name in the config.
        registered: its name in transformers' registry.
        reason: the reason for the choice, for the log.
    """

    name: str
    registered: str
    reason: str


def uses_rows(config: TrainConfig) -> bool:
    """Returns True if groups are laid out in rows, False if their responses are stacked as in the original."""
    return config.prefix_sharing or config.packing


def choose_attention(config: TrainConfig, model_config: Any, device: torch.device) -> AttentionChoice:
    """Returns the implementation that `torch_attention` names, or the fastest one that supports the run.

    Args:
        config: the run's settings.
        model_config: the model's transformers configuration.
        device: the device that computes.

    Raises:
        ConfigError: the named implementation does not support this run or device.
    """
    rows, requested = uses_rows(config), config.torch_attention
    capped = getattr(model_config, "attn_logit_softcapping", None) is not None
    names = ROW_ATTENTION if rows else STACKED_ATTENTION
    if requested == "auto":
        name, reason = _best(rows, capped, device, config.dtype)
    else:
        _check(requested, rows, capped, device, config.dtype)
        name, reason = requested, "as `torch_attention` says"
    return AttentionChoice(name, names[name], reason)


def _best(rows: bool, capped: bool, device: torch.device, dtype: str) -> tuple[str, str]:
    """Returns the fastest implementation and the reason for it."""
    if rows and device.type == "cuda":
        return "flex", "rows on a GPU"
    if not rows and device.type == "cuda" and dtype == "bfloat16":
        for name in ("flash_attention_3", "flash_attention_2"):
            if _is_installed(name) and (name != "flash_attention_3" or _is_hopper(device)):
                return name, "installed, and the GPU can run it"
    if capped:
        return "dense", "the model caps its attention scores, which sdpa cannot"
    return "sdpa", "rows on a CPU" if rows else "part of PyTorch"


def _check(name: str, rows: bool, capped: bool, device: torch.device, dtype: str) -> None:
    """Raises ConfigError unless the named implementation supports the run."""
    setting = f"`torch_attention: {name}`"
    if name in FLASH_PACKAGES or name == "flex":
        if device.type != "cuda":
            raise ConfigError(f"{setting} needs a CUDA GPU, and PyTorch finds none. Use sdpa, dense or auto")
    if name in FLASH_PACKAGES:
        if rows:
            raise ConfigError(
                f"{setting} supports no masks of rows. Use flex or auto, or set `prefix_sharing` and `packing` to false"
            )
        if not _is_installed(name):
            raise ConfigError(
                f"{setting}: the package `{FLASH_PACKAGES[name]}` is not installed. Install it (`pip install "
                "flash-attn --no-build-isolation`; version 3 from its repository's folder `hopper`), or use sdpa"
            )
        if name == "flash_attention_3" and not _is_hopper(device):
            raise ConfigError(f"{setting} needs a Hopper GPU; use flash_attention_2")
        if dtype != "bfloat16":
            raise ConfigError(f"{setting} computes in 16 bits only; set `dtype: bfloat16`, or use sdpa")
    if name == "sdpa" and capped:
        raise ConfigError(f"{setting}: this model caps its attention scores, which sdpa cannot; use dense or auto")


def _is_installed(name: str) -> bool:
    return find_spec(FLASH_PACKAGES[name]) is not None


def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9
