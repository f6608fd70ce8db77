"""Describes Qwen 2 and 2.5: a Llama with biases on q, k and v, and optional windows in its upper layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jax_simpo.hf.families import llama
from jax_simpo.hf.families.family import Family
from jax_simpo.hf.fields import Fields

if TYPE_CHECKING:
    from jax_simpo.models.config import ModelConfig


def read_windows(fields: Fields) -> tuple[int | None, ...]:
    """Reads the window of each layer. Files name a size even where `use_sliding_window` switches windows off."""
    layers, first = fields.size("num_hidden_layers"), fields.size("max_window_layers", least=0)
    window = fields.size_or_none("sliding_window") if fields.flag("use_sliding_window", False) else None
    fields.ignore("sliding_window")
    return fields.windows(window, [window is not None and i >= first for i in range(layers)])


def write_windows(config: ModelConfig) -> dict[str, Any]:
    """Returns the fields that `read_windows` reads; `max_window_layers` serves programs without `layer_types`."""
    windowed = [i for i, window in enumerate(config.layer_windows) if window]
    return {
        "use_sliding_window": bool(windowed),
        "sliding_window": config.layer_windows[windowed[0]] if windowed else None,
        "max_window_layers": windowed[0] if windowed else config.num_layers,
        "layer_types": config.layer_types,
    }


def _read(fields: Fields) -> dict[str, Any]:
    fields.require("hidden_act", "silu")
    return {"qkv_bias": True, "layer_windows": read_windows(fields)}


def _write(config: ModelConfig) -> dict[str, Any]:
    return {"hidden_act": "silu", **write_windows(config)}


ABSENT = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
QWEN2 = Family("Qwen2ForCausalLM", llama.NAMES, _read, _write, ABSENT)
