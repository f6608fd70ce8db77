"""The trainers whose files are converted, and how a file is known to be one of theirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax_simpo.config.convert.axolotl import AXOLOTL
from jax_simpo.config.convert.llama_factory import LLAMA_FACTORY
from jax_simpo.config.convert.open_instruct import OPEN_INSTRUCT
from jax_simpo.config.convert.rules import Keep, Trainer, meaning
from jax_simpo.config.convert.trl import TRL

TRAINERS: tuple[Trainer, ...] = (TRL, LLAMA_FACTORY, AXOLOTL, OPEN_INSTRUCT)

# `--from` -> the trainer, and the method where its files do not say it.
CHOICES: dict[str, tuple[Trainer, str | None]] = {
    "trl-cpo": (TRL, "cpo"),
    "trl-dpo": (TRL, "dpo"),
    "trl-orpo": (TRL, "orpo"),
    **{trainer.name: (trainer, None) for trainer in TRAINERS if trainer is not TRL},
}


def recognise(values: Mapping[str, Any]) -> tuple[Trainer, list[str]] | None:
    """Finds the trainer that a file is for by the keys that only it has; returns it with these keys."""
    found = [(trainer, keys) for trainer in TRAINERS if (keys := trainer.known_by(values))]
    # TRL's marker `dataset_name` is a key of open-instruct too. With as many markers, whoever knows more keys counts.
    known = {trainer.name: sum(trainer.rule_of(key) is not None for key in values) for trainer, _ in found}
    return max(found, key=lambda entry: (len(entry[1]), known[entry[0].name]), default=None)


def known_elsewhere(key: str) -> str:
    """Says what another trainer's key is here, as a sentence; empty if no trainer that is known has it.

    Of several trainers that have the key, one counts whose key becomes one of ours.
    """
    rules = [(trainer, rule) for trainer in TRAINERS if (rule := trainer.rule_of(key)) is not None]
    if not rules:
        return ""
    trainer, rule = next((entry for entry in rules if not isinstance(entry[1], Keep) or entry[1].key != key), rules[0])
    return f"It is a key of {trainer.title}: {meaning(rule)}. `jax-simpo convert FILE` converts whole files."
