"""Checks the keys of a config against one another, once every single value is known to be valid."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from jax_simpo.config import objectives, schedules

_STEPS = (2**31 - 1, "the optimizer counts steps in 32 bits")
# Key -> the largest number that can work, and the reason.
_MOST: dict[str, tuple[int, str]] = {
    "seed": (2**63 - 1, "a seed has 64 bits"),
    "max_steps": _STEPS,
    "warmup_steps": _STEPS,
    "lora_r": (2**16, "no layer is as wide, and a rank above a layer's width adds nothing"),
    "rows_per_device": (2**16, "no device holds more rows at a time"),
    "logprob_chunk": (2**20, "the logits of all its states are in memory at once"),
    "sample_tokens": (2**16, "no report shows longer answers"),
    "preprocessing_num_workers": (2**12, "no machine runs more threads at a time"),
}


class Contradictions(ValueError):
    """Holds all that is wrong with the keys of a config beside one another.

    Attributes:
        mistakes: a sentence or two for each.
    """

    def __init__(self, mistakes: Sequence[str]) -> None:
        super().__init__("\n".join(mistakes))
        self.mistakes = tuple(mistakes)


def check(config: Any) -> None:
    """Checks the keys of a `TrainConfig` against one another.

    Raises:
        Contradictions: with every mistake, in the words that the user reads.
    """
    if mistakes := list(_mistakes(config)):
        raise Contradictions(mistakes)


def _mistakes(config: Any) -> Iterator[str]:
    """Yields what is wrong with the keys beside one another, a mistake at a time."""
    for key, (most, why) in _MOST.items():
        if isinstance(number := getattr(config, key), int) and number > most:
            yield f"`{key}` is {number}; expected at most {most}: {why}"
    if config.model_name_or_path is not None and config.new_model_config is not None:
        yield (
            "`model_name_or_path` (a model to start from) and `model_config` (a new model) contradict each other; "
            "give one. A new model with an existing tokenizer: `model_config` and `tokenizer_name_or_path`"
        )
    if config.model_name_or_path is None:
        if config.new_model_config is None:
            yield (
                "no model: give `model_name_or_path` (a hub id, a folder or a GGUF file), or `model_config` together "
                "with `tokenizer_name_or_path` for a new one"
            )
        elif config.tokenizer_name_or_path is None:
            yield "`model_config` makes a new model, which has no tokenizer: give `tokenizer_name_or_path`"
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in config.run_name or ""):
        yield (
            f"`run_name` {config.run_name!r} holds a control character, such as a line end; give a name of visible "
            "characters. Without the key it is the name of the config file"
        )
    if config.dataset_mixer and not any(config.dataset_mixer.values()):
        yield "`dataset_mixer` takes nothing: give at least one source a fraction above 0"
    for source, fraction in config.dataset_mixer.items():
        if not 0 <= fraction <= 1:
            yield f"`dataset_mixer`: the fraction of {source} is {fraction}; expected 0 to 1"
    configs = config.dataset_configs
    if config.dataset_mixer and configs is not None and len(configs) != len(config.dataset_mixer):
        yield (
            f"`dataset_configs` has {len(configs)} entries and `dataset_mixer` "
            f"{len(config.dataset_mixer)}; give one name for each source, null for none"
        )
    if twice := [split for split, count in Counter(config.dataset_splits).items() if count > 1]:
        yield f"`dataset_splits` names {', '.join(twice)} more than once; keep one of each"
    if not config.train_splits:
        yield (
            f"`dataset_splits` {config.dataset_splits} has nothing to train on: training splits have `train` in "
            "their name"
        )
    yield from _data_mistakes(config)
    if config.max_prompt_length >= config.max_length:
        yield (
            f"`max_prompt_length` ({config.max_prompt_length}) leaves no room for a response within `max_length` "
            f"({config.max_length}); lower the first or raise the second"
        )
    if mistake := objectives.check(config.objective) or objectives.check_keys(config.objective, config.__dict__):
        yield mistake
    if config.row_length != "auto" and (not 128 <= config.row_length < 2**31 or config.row_length % 128):
        near = min(max(128, (config.row_length + 64) // 128 * 128), 2**31 - 128)  # a place in a row has 32 bits
        yield f"`row_length` is {config.row_length}; expected auto or a multiple of 128, such as {near}"
    if mistake := schedules.check(config.lr_scheduler_type, config.lr_scheduler_kwargs, config.learning_rate):
        yield mistake
    if config.optim == "adafactor" and config.adam_mu_dtype != "float32":
        yield "`adam_mu_dtype` has no effect with `optim: adafactor`, which keeps no mean; remove it"
    if config.optim == "muon" and config.use_peft:
        yield "`optim: muon` is for whole weight matrices, of which `use_peft` trains none; use `optim: adamw`"
    yield from _best_mistakes(config)
    if config.generate_during_eval and not config.do_eval:
        yield "`generate_during_eval` needs evaluations; set `eval_strategy`, or `do_eval: true`"
    if config.generate_during_eval and not config.sample_prompts:
        yield "`generate_during_eval` needs prompts, and `sample_prompts` is 0; raise it, or remove one key"
    if config.max_steps == 0:
        yield "`max_steps` is 0; expected a positive number, or -1 for `num_train_epochs`"
    if config.load_in_4bit and config.load_in_8bit:
        yield "`load_in_4bit` and `load_in_8bit` contradict each other; keep one of them"


def _data_mistakes(config: Any) -> Iterator[str]:
    """Yields the mistakes of how rows are chosen and read; what only the data shows is found where it is read."""
    named = [split for split in config.dataset_splits if "train" not in split]
    if config.test_size is not None and named:
        yield (
            f"`test_size` holds rows of the training splits out, and `dataset_splits` names {', '.join(named)} to "
            "evaluate on; keep one of the two"
        )
    if config.test_size is not None and config.test_size > 1 and not config.test_size.is_integer():
        yield f"`test_size` is {config.test_size:g}; expected a share below 1, or from 1 on a whole number of rows"
    columns = config.dataset_columns or {}
    if len({isinstance(value, dict) for value in columns.values()}) > 1:
        yield "`dataset_columns` mixes columns of all sources with columns of single sources; use one form"


def _best_mistakes(config: Any) -> Iterator[str]:
    """Yields the mistakes of the keys that choose the best of the evaluations."""
    asked = "load_best_model_at_end" if config.load_best_model_at_end else "early_stopping_patience"
    if not config.load_best_model_at_end and config.early_stopping_patience is None:
        return
    if config.eval_strategy == "no" or not config.do_eval:
        yield f"`{asked}` needs evaluations to compare; set `eval_strategy: steps` or `epoch`"
    if config.load_best_model_at_end and config.save_strategy == "no":
        yield (
            "`load_best_model_at_end` reads the best step from its checkpoint, and `save_strategy` is no; set it "
            "to steps or epoch"
        )
