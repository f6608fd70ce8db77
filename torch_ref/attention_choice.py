"""Which attention implementation a run uses, and why another is refused."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from jax_simpo.config import TrainConfig
from jax_simpo.errors import ConfigError
from torch_ref.attention import ROW_ATTENTION

# Our name -> transformers' own implementation, for pairs that are stacked along the batch.
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
    """An implementation.

    Attributes:
        name: as in the config.
        registered: its name in transformers' registry.
        why: why this one, for the log.
    """

    name: str
    registered: str
    why: str


def uses_rows(config: TrainConfig) -> bool:
    """Whether pairs are laid out in rows. Otherwise chosen and rejected are stacked, as in the original."""
    return config.prefix_sharing or config.packing


def choose_attention(config: TrainConfig, model_config: Any, device: torch.device) -> AttentionChoice:
    """Picks the implementation that `torch_attention` asks for, or the fastest that can do the job.

    Args:
        config: the run's settings.
        model_config: the model's transformers configuration.
        device: where it runs.

    Raises:
        ConfigError: the implementation asked for cannot do it here.
    """
    rows, wanted = uses_rows(config), config.torch_attention
    capped = getattr(model_config, "attn_logit_softcapping", None) is not None
    names = ROW_ATTENTION if rows else STACKED_ATTENTION
    if wanted == "auto":
        name, why = _best(rows, capped, device, config.dtype)
    else:
        _check(wanted, rows, capped, device, config.dtype)
        name, why = wanted, "as `torch_attention` says"
    return AttentionChoice(name, names[name], why)


def _best(rows: bool, capped: bool, device: torch.device, dtype: str) -> tuple[str, str]:
    if rows and device.type == "cuda":
        return "flex", "rows on a GPU"
    if not rows and device.type == "cuda" and dtype == "bfloat16":
        for name in ("flash_attention_3", "flash_attention_2"):
            if _is_installed(name) and (name != "flash_attention_3" or _is_hopper(device)):
                return name, "installed, and the GPU can run it"
    if capped:
        return "dense", "the model caps its attention scores, which sdpa cannot"
    return "sdpa", "rows on a CPU" if rows else "part of PyTorch"


def _check(wanted: str, rows: bool, capped: bool, device: torch.device, dtype: str) -> None:
    where = f"`torch_attention: {wanted}`"
    if wanted in FLASH_PACKAGES or wanted == "flex":
        if device.type != "cuda":
            raise ConfigError(f"{where} needs a CUDA GPU, and PyTorch finds none. Use sdpa, dense or auto")
    if wanted in FLASH_PACKAGES:
        if rows:
            raise ConfigError(
                f"{where} knows no masks of rows. Use flex or auto, or set `prefix_sharing` and `packing` to false"
            )
        if not _is_installed(wanted):
            raise ConfigError(
                f"{where}: the package `{FLASH_PACKAGES[wanted]}` is not installed. Install it (`pip install "
                "flash-attn --no-build-isolation`; version 3 from its repository's folder `hopper`), or use sdpa"
            )
        if wanted == "flash_attention_3" and not _is_hopper(device):
            raise ConfigError(f"{where} needs a Hopper GPU; use flash_attention_2")
        if dtype != "bfloat16":
            raise ConfigError(f"{where} computes in 16 bits only; set `dtype: bfloat16`, or use sdpa")
    if wanted == "sdpa" and capped:
        raise ConfigError(f"{where}: this model caps its attention scores, which sdpa cannot; use dense or auto")


def _is_installed(name: str) -> bool:
    return find_spec(FLASH_PACKAGES[name]) is not None


def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9
