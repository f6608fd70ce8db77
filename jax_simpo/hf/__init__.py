"""Reads and writes Hugging Face's formats: configurations, weights, adapters. Reads GGUF files too.

The mathematics of the models is in `jax_simpo.models`, which imports nothing from here. Adapter folders have a module
of their own, `jax_simpo.hf.adapters`.
"""

from __future__ import annotations

from jax_simpo.hf.config import read_model_config, write_model_config
from jax_simpo.hf.folders import load_end_ids, load_generation_config, load_model_config, resolve_model_folder
from jax_simpo.hf.lora_targets import choose_targets
from jax_simpo.hf.read import check_params, load_params
from jax_simpo.hf.tensors import tensor_shapes
from jax_simpo.hf.write import MAX_SHARD_BYTES, save_model, shard_bytes

__all__ = [
    "MAX_SHARD_BYTES",
    "check_params",
    "choose_targets",
    "load_end_ids",
    "load_generation_config",
    "load_model_config",
    "load_params",
    "read_model_config",
    "resolve_model_folder",
    "save_model",
    "shard_bytes",
    "tensor_shapes",
    "write_model_config",
]
