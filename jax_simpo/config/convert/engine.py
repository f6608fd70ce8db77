"""Converts a file of another trainer to a config of ours, each line with a comment that says where it comes from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax_simpo.config import effects, foreign, help, yaml_files
from jax_simpo.config.convert.rules import (
    CannotKeepError,
    Do,
    Draft,
    Drop,
    Keep,
    Options,
    Part,
    Refuse,
    Trainer,
    shown_pair,
)
from jax_simpo.config.convert.trainers import CHOICES, TRAINERS, recognise
from jax_simpo.config.schema import TrainConfig, checked_config
from jax_simpo.errors import ConfigError

_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")


@dataclass(frozen=True)
class Converted:
    """A converted file.

    Attributes:
        text: our file.
        config: what it says.
        trainer: whose file it was.
        notes: what the user should know of it.
    """

    text: str
    config: TrainConfig
    trainer: str
    notes: tuple[str, ...]


def convert(path: str | Path, origin: str | None = None, options: Options | None = None) -> Converted:
    """Converts a config file of another trainer.

    Args:
        path: the YAML file.
        origin: one of `CHOICES`; None finds the trainer by the keys of the file.
        options: what is to be known besides the file.

    Raises:
        ConfigError: with everything that cannot be kept, and every value that is wrong.
    """
    options = options or Options()
    values, lines = yaml_files.read_file(path)
    trainer, method = _find_trainer(str(path), values, origin)
    draft = Draft(
        values,
        lambda key: f"{path}, line {lines[key]}" if key in lines else str(path),
        Options(method or options.method, options.data, options.devices, options.drop),
        str(Path(path).parent),
    )
    if unknown := [key for key in options.drop if key not in values]:
        raise ConfigError(f"--drop {unknown[0]}: the file has no such key")
    try:
        for key, value in values.items():
            _convert_key(draft, trainer, key, value)
        trainer.together(draft)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise ConfigError(
            f"{path}: a value is not of the kind that {trainer.title} takes, such as a list in place of text ({error})"
        ) from error
    for key, value in trainer.defaults.items():
        if key not in draft.ours:
            draft.set(key, value, f"{trainer.title}'s default")
    _set_batch(draft)
    _leave_out_adapter(draft)
    _leave_out_evaluation(draft)
    _name_the_unread(draft, trainer)
    config = _check(draft, str(path), lines)
    return Converted("\n".join(_write(draft, trainer, Path(path).name)), config, trainer.title, tuple(_notes(draft)))


def _find_trainer(path: str, values: dict[str, Any], origin: str | None) -> tuple[Trainer, str | None]:
    if origin is not None:
        if origin not in CHOICES:
            raise ConfigError(f"--from {origin}: expected one of {', '.join(CHOICES)}")
        return CHOICES[origin]
    found = recognise(values)
    if found is not None:
        return found[0], None
    if values.keys() <= help.keys_of(TrainConfig).keys() | foreign.KEYS:
        raise ConfigError(
            f"{path}: every key of it is known here, so it may need no conversion. `objective` is simpo unless the "
            "file says otherwise; if it is for another trainer of TRL or the alignment handbook, add --from trl-dpo, "
            "--from trl-cpo or --from trl-orpo"
        )
    names = ", ".join(trainer.title for trainer in TRAINERS)
    raise ConfigError(f"{path}: not known to be a file of {names}; say with --from what it is: {', '.join(CHOICES)}")


def _convert_key(draft: Draft, trainer: Trainer, key: str, value: Any) -> None:
    rule = trainer.rule_of(key)
    if key in draft.options.drop:
        draft.dropped[key] = "left out, as --drop asks"
    elif rule is None:
        draft.errors.append(
            f"{draft.place(key)}: `{key}` is not known to be a key of {trainer.title}; if it does not matter, add "
            f"--drop {key}"
        )
    elif isinstance(rule, Drop):
        draft.dropped[key] = rule.why
    elif isinstance(rule, Refuse):
        if foreign.asks_for_nothing(value) or value in rule.unless:
            draft.dropped[key] = "it asks for what is done anyway"
        else:
            draft.refuse(key, rule.why)
    elif value is None and not isinstance(rule, Part):
        draft.dropped[key] = "null asks for nothing"
    elif isinstance(rule, Keep | Do):
        try:
            if isinstance(rule, Do):
                rule.act(draft, key, value)
            else:
                read = value if rule.read is None else rule.read(value)
                draft.set(rule.key, read, shown_pair(key, value), rule.note, of=key)
        except CannotKeepError as error:
            draft.refuse(key, str(error))


def _set_batch(draft: Draft) -> None:
    """With a number of devices, writes the batch that they had together."""
    if draft.options.devices is None:
        return
    sizes = [draft.ours[key].value if key in draft.ours else help.default_of(TrainConfig, key) for key in _BATCH]
    if not all(isinstance(size, int) for size in sizes):
        return  # the check below says so
    for key in _BATCH:
        draft.ours.pop(key, None)
    batch = sizes[0] * sizes[1] * draft.options.devices
    draft.set("global_batch_size", batch, f"{sizes[0]} pairs x {sizes[1]} x {draft.options.devices} devices")


def _leave_out_adapter(draft: Draft) -> None:
    """Leaves the keys of an adapter out where there is none."""
    if "use_peft" in draft.ours and draft.ours["use_peft"].value is True:
        return
    for key in [key for key in draft.ours if key.startswith("lora_")]:
        del draft.ours[key]
        draft.dropped[draft.names.get(key, key)] = "there is no adapter"


def _name_the_unread(draft: Draft, trainer: Trainer) -> None:
    """Says of keys that are read together with others, and of which nothing came, that they had no effect."""
    said = " ".join([*(line.origin for line in draft.ours.values()), *draft.names.values(), *draft.errors])
    words = set(re.findall(r"\w+", said))
    for key, value in draft.theirs.items():
        if isinstance(trainer.rule_of(key), Part) and key not in draft.dropped and key not in words:
            nothing = foreign.asks_for_nothing(value)
            draft.dropped[key] = "it asks for nothing" if nothing else "beside the other keys it has no effect"


def _leave_out_evaluation(draft: Draft) -> None:
    """Leaves evaluation out where there are no rows for it."""
    splits = draft.ours["dataset_splits"].value if "dataset_splits" in draft.ours else []
    evaluated = any("train" not in str(split) for split in splits) if isinstance(splits, list) else True
    if evaluated or "test_size" in draft.ours or "dataset_mixer" not in draft.ours:
        return
    keys = ("eval_strategy", "do_eval", "eval_steps", "load_best_model_at_end", "metric_for_best_model")
    for key in (*keys, "greater_is_better", "early_stopping_patience"):
        if key in draft.ours:
            del draft.ours[key]
            draft.dropped[draft.names.get(key, key)] = "there are no rows to evaluate on; `test_size` holds some out"


def _check(draft: Draft, path: str, lines: dict[str, int]) -> TrainConfig:
    """Builds the config; raises all mistakes together."""
    values = {key: line.value for key, line in draft.ours.items()}
    values.setdefault("run_name", Path(path).stem)
    places = {ours: f"{path}, line {lines[theirs]}" for ours, theirs in draft.names.items() if theirs in lines}
    errors = list(draft.errors)
    config = None
    try:
        config = checked_config(values, (), places, draft.names, path)
    except ConfigError as error:
        # What the whole lacks is of interest once everything else is mended.
        errors += [line for line in str(error).splitlines() if not errors or "no model: give" not in line]
    if config is not None:
        drop = {key: draft.names.get(key, key) for key in effects.torch_only(config)}
        errors += [
            f"{places.get(key, path)}: {why}. (--drop {drop[key]} goes without it)"
            for key, why in effects.torch_only(config).items()
        ]
    if errors:
        head = f"{path}: {len(errors)} thing(s) cannot be kept; --drop KEY goes without a key\n" if draft.errors else ""
        raise ConfigError(head + "\n".join(dict.fromkeys(errors)))
    assert config is not None
    return config


def _write(draft: Draft, trainer: Trainer, name: str) -> Iterator[str]:
    """Yields the lines of our file."""
    yield f"# Made from the {trainer.title} file {name} by `jax-simpo convert`; comments say where lines come from."
    yield ""
    for key in help.keys_of(TrainConfig):
        if key not in draft.ours:
            continue
        line = draft.ours[key]
        origin = "as it was" if line.origin == shown_pair(key, line.value) else line.origin
        comment = "; ".join(filter(None, [origin, line.note]))
        text = yaml_files.dump({key: line.value}).rstrip("\n")
        if "\n" in text:
            yield f"# {comment}"
            yield text
        else:
            yield f"{text}  # {comment}"
    if draft.dropped:
        yield ""
        yield "# Not needed here:"
        given = [key for key in draft.dropped if key in draft.theirs]
        nulls = [key for key in given if draft.theirs[key] is None]
        for key in given:
            if key not in nulls:
                yield f"#   {shown_pair(key, draft.theirs[key])} -- {draft.dropped[key]}"
        if nulls:
            yield f"#   null, which asks for nothing: {', '.join(nulls)}"
    yield ""


def _notes(draft: Draft) -> Iterator[str]:
    """Yields what is not exactly as it was."""
    for key, line in draft.ours.items():
        if line.note:
            yield f"`{key}`: {line.note}"
    if "global_batch_size" not in draft.ours:
        sizes = [draft.ours[key].value if key in draft.ours else help.default_of(TrainConfig, key) for key in _BATCH]
        yield (
            f"the batch is {sizes[0]} x {sizes[1]} pairs times the devices of your run; --devices N writes the batch "
            "that N devices had"
        )
    if "template" in draft.dropped or "chat_template" in draft.dropped:
        yield "`chat_template`: the tokenizer's own is used"
