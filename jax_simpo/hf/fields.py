"""Reads the fields of a Hugging Face model configuration one by one, and refuses any field that is left unread.

Every field is either read, known to be harmless, or an error: ignoring a field that changes the mathematics would give
a model that runs and is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from jax_simpo.errors import ModelError

# These fields describe files, defaults of generation or the heads of other tasks. Hidden states do not depend on them.
_HARMLESS = frozenset(
    "architectures dtype torch_dtype transformers_version use_cache return_dict output_attentions output_hidden_states "
    "torchscript problem_type finetuning_task task_specific_params tokenizer_class prefix id2label label2id "
    "num_labels classifier_dropout chunk_size_feed_forward use_bfloat16 tf_legacy_loss pretraining_tp name_or_path "
    "attn_implementation experts_implementation max_sequence_length "
    "max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k "
    "top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size "
    "num_return_sequences output_scores return_dict_in_generate remove_invalid_values cache_implementation "
    "unsloth_version unsloth_fixed unsloth_training transformers.js_config tie_last_hidden_states".split()
)
# So do ids of tokens, whatever they are called: unk_token_id, sep_token_id, image_token_id.
_TOKEN_IDS = ("token_id", "token_ids")

# These fields would change the mathematics under any other value than the one given here.
_ONLY: dict[str, Any] = {
    "attention_dropout": 0,
    "is_encoder_decoder": False,
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "partial_rotary_factor": 1,
    "use_sliding_window": False,
    "use_bidirectional_attention": False,
    "use_mrope": False,
}

_LAYER_TYPES = ("full_attention", "sliding_attention")


class Fields:
    """Reads the fields of one configuration and remembers which were read, so that the rest can be refused.

    Each method raises `ModelError` where a field is missing, has the wrong type or has a value that is not supported.

    Args:
        raw: the configuration.
        source: the file or config key that it comes from, for error messages.
    """

    def __init__(self, raw: Mapping[str, Any], source: str) -> None:
        self.raw, self.source = raw, source
        self.read: set[str] = {"model_type"}

    def _get(self, key: str, default: Any) -> Any:
        self.read.add(key)
        value = self.raw.get(key)
        if value is not None:
            return value
        if default is None:
            raise ModelError(f"{self.source}: no field `{key}`; a model cannot be built without it")
        return default

    def size(self, key: str, default: int | None = None, *, least: int = 1, most: int = 2**31 - 1) -> int:
        """Reads a whole number of at least `least` (0 or 1) and at most `most`. Sizes are 32-bit integers."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            kind = "positive whole number" if least else "whole number that is not negative"
            raise ModelError(f"{self.source}: {key}={value!r}, expected a {kind}")
        if value > most:
            raise ModelError(f"{self.source}: {key}={value!r}, expected at most {most:,}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Reads a positive number."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
            raise ModelError(f"{self.source}: {key}={value!r}, expected a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Reads true or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise ModelError(f"{self.source}: {key}={value!r}, expected true or false")
        return value

    def size_or_none(self, key: str) -> int | None:
        """Reads a size; returns None where the field is null or absent."""
        return None if self._is_null(key) else self.size(key)

    def number_or_none(self, key: str) -> float | None:
        """Reads a positive number; returns None where the field is null or absent."""
        return None if self._is_null(key) else self.number(key)

    def _is_null(self, key: str) -> bool:
        self.read.add(key)
        return self.raw.get(key) is None

    def token(self, key: str, or_list: bool = False) -> Any:
        """Reads a token id or null; with `or_list` also a list of ids, which it returns as a tuple."""
        self.read.add(key)
        value = self.raw.get(key)
        ids = value if or_list and isinstance(value, list | tuple) else [value]
        if value is not None and any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
            raise ModelError(f"{self.source}: {key}={value!r}, expected a token id{' or a list of them' * or_list}")
        return tuple(ids) if or_list and isinstance(value, list | tuple) else value

    def windows(self, window: int | None, otherwise: list[bool]) -> tuple[int | None, ...]:
        """Returns the window of each layer, None for a layer with full attention.

        Args:
            window: the size of every window; None if the configuration gives none.
            otherwise: True for each layer that has a window, used where there is no field `layer_types`.

        Raises:
            ModelError: `layer_types` does not give a type for each layer, or a layer has a window without a size.
        """
        windowed = otherwise
        if not self._is_null("layer_types"):
            types = self.raw["layer_types"]
            if not isinstance(types, list | tuple) or any(kind not in _LAYER_TYPES for kind in types):
                raise ModelError(
                    f"{self.source}: layer_types={types!r}, expected a list of {' and '.join(map(repr, _LAYER_TYPES))}"
                )
            if len(types) != len(otherwise):
                raise ModelError(
                    f"{self.source}: layer_types has {len(types)} entries, but num_hidden_layers={len(otherwise)}"
                )
            windowed = [kind == "sliding_attention" for kind in types]
        if window is None and any(windowed):
            raise ModelError(
                f"{self.source}: layers with sliding attention, but no window; set `sliding_window` (and, for a Qwen "
                "model, `use_sliding_window`)"
            )
        return tuple(window if has_window else None for has_window in windowed)

    def ignore(self, *keys: str) -> None:
        """Marks fields as read that this family's model does not use."""
        self.read.update(keys)

    def require(self, key: str, only: Any) -> None:
        """Raises ModelError unless the field is absent or has the only supported value."""
        value = self._get(key, only)
        if value != only:
            raise ModelError(f"{self.source}: {key}={value!r} is not supported; only {only!r} is")

    def refuse_the_rest(self) -> None:
        """Raises ModelError if a field is left that was not read and may change the mathematics."""
        if self.raw.get("quantization_config"):
            raise ModelError(
                f"{self.source}: the weights are quantised (`quantization_config`); training needs the float32, "
                "bfloat16 or float16 weights, so use the unquantised model"
            )
        if self.raw.get("auto_map"):
            raise ModelError(
                f"{self.source}: `auto_map` says that the model runs code of its own, which is not supported; if it is "
                f"a plain {self.raw.get('model_type')} model, remove the field"
            )
        for key in sorted(_ONLY.keys() - self.read):
            self.require(key, _ONLY[key])
        # A null switches a field off, and a leading underscore marks transformers' own notes.
        unknown = [
            key
            for key, value in self.raw.items()
            if key not in self.read | _HARMLESS
            and not key.endswith(_TOKEN_IDS)
            and value not in (None, {}, [])
            and not key.startswith("_")
        ]
        if unknown:
            fields = ", ".join(f"`{key}`={self.raw[key]!r}" for key in unknown)
            raise ModelError(
                f"{self.source}: unknown field(s) {fields}; they may change what the model computes. Remove those that "
                "do not; a model that needs them is not supported"
            )
