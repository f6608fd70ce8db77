"""One module per model family: how the tensors of its Hugging Face checkpoints are called."""

from __future__ import annotations

from types import ModuleType

from jax_simpo.models.families import llama

_BY_MODEL_TYPE: dict[str, ModuleType] = {"llama": llama}


def of(model_type: str) -> ModuleType:
    """The family's module, with `NAMES` (our path -> Hugging Face name) and `IGNORED` (patterns of spare tensors)."""
    return _BY_MODEL_TYPE[model_type]
