"""The supported model families, one module each: the fields of its configuration and the names of its tensors."""

from __future__ import annotations

from jax_simpo.hf.families.family import Family
from jax_simpo.hf.families.gemma2 import GEMMA2
from jax_simpo.hf.families.llama import LLAMA
from jax_simpo.hf.families.mistral import MISTRAL
from jax_simpo.hf.families.qwen2 import QWEN2
from jax_simpo.hf.families.qwen3 import QWEN3

FAMILIES: dict[str, Family] = {  # by the `model_type` of config.json
    "llama": LLAMA,
    "mistral": MISTRAL,
    "gemma2": GEMMA2,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
}
