"""Adds LoRA adapters (peft) and quantised weights (bitsandbytes), under the config keys of the original trainer."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from jax_simpo.config import TrainConfig
from jax_simpo.errors import ConfigError, ModelError


def add_adapter(config: TrainConfig, causal_lm: Any) -> Any:
    """Freezes the model and adds trainable low-rank matrices to its linear layers, if `use_peft` is true.

    Raises:
        ConfigError: peft is not installed, or the model has no layers of the given names.
    """
    if not config.use_peft:
        return causal_lm
    if find_spec("peft") is None:
        raise ConfigError("`use_peft: true` needs the package peft: `pip install peft`")
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if config.load_in_4bit or config.load_in_8bit:
        causal_lm = prepare_model_for_kbit_training(causal_lm, use_gradient_checkpointing=False)
    settings = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules or "all-linear",
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        with _quiet():
            adapted = get_peft_model(causal_lm, settings)
    except ValueError as error:
        raise ConfigError(f"`lora_target_modules` {config.lora_target_modules}: {error}") from error
    # Recomputed layers need an input with a gradient, but the frozen embedding gives none. This call makes it do so.
    adapted.enable_input_require_grads()
    return adapted


def base_of_adapter(name: str | None) -> str | None:
    """Returns the base model that an adapter's folder names; None if `name` is no such folder.

    Raises:
        ModelError: the folder's configuration names none.
    """
    file = Path(name or "") / "adapter_config.json"
    if name is None or not file.is_file() or (file.parent / "config.json").exists():
        return None
    try:
        base = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file}: not the configuration of an adapter with a base model ({error!r})") from error
    if not isinstance(base, str):
        raise ModelError(f"{file}: `base_model_name_or_path` is {base!r}; expected a folder or hub id")
    return base


def load_adapter(causal_lm: Any, folder: str) -> Any:
    """Returns the model with a trained adapter, which `train` exported to `folder`."""
    from peft import PeftModel

    with _quiet():
        return PeftModel.from_pretrained(causal_lm, folder)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides the warning that peft uses a deprecated name of transformers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def quantization(config: TrainConfig, device: torch.device, *, partitioned: bool) -> dict[str, Any]:
    """Returns the arguments with which transformers loads 4-bit (NF4) or 8-bit weights; none if the config has neither.

    Args:
        config: the run's settings.
        device: the device of the weights.
        partitioned: True if ZeRO-3 splits the weights.

    Raises:
        ConfigError: there is no GPU, bitsandbytes is not installed, or ZeRO-3 cannot split such weights.
    """
    if not (config.load_in_4bit or config.load_in_8bit):
        return {}
    key = "load_in_4bit" if config.load_in_4bit else "load_in_8bit"
    if device.type != "cuda":
        raise ConfigError(f"`{key}: true` needs a CUDA GPU, and PyTorch finds none. Remove the key")
    if find_spec("bitsandbytes") is None:
        raise ConfigError(f"`{key}: true` needs the package bitsandbytes: `pip install bitsandbytes`")
    if config.load_in_8bit and partitioned:
        raise ConfigError("`load_in_8bit: true`: ZeRO-3 cannot split 8-bit weights; use `load_in_4bit`")
    from transformers import BitsAndBytesConfig

    if config.load_in_8bit:
        settings = BitsAndBytesConfig(load_in_8bit=True)
    else:
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=getattr(torch, config.dtype),
            bnb_4bit_quant_storage=getattr(torch, config.dtype),  # lets ZeRO-3 partition the packed weights
        )
    return {"quantization_config": settings, **({} if partitioned else {"device_map": {"": device}})}
