"""Chooses the rows of a run: how many of each source, and which of them are held out for evaluation."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from jax_simpo.data.detection import Reading
from jax_simpo.errors import DataError

HELD_OUT = "held_out"
"""The name of the split that `test_size` takes from the training pairs."""

SPLIT_SEED = 42
"""Draws the rows that are held out where the config gives no `shuffle_seed`."""


@dataclass(frozen=True)
class Selection:
    """Which rows of the sources a run takes, and how their columns are read; see the config keys of these names.

    Attributes:
        dataset_configs: the configuration of each source that is a data set on the hub.
        dataset_format: the format of all sources, or of each by its name; None finds it.
        dataset_columns: role -> column for all sources, or such a mapping of each by its name.
        max_samples: most rows of each split of a source.
        shuffle_seed: draws the rows where only some are taken; None takes the first.
        test_size: how many of the training rows are held out, a share of them if it is below 1.
    """

    dataset_configs: Sequence[str | None] | None = None
    dataset_format: str | Mapping[str, str] | None = None
    dataset_columns: Mapping[str, Any] | None = None
    max_samples: int | None = None
    shuffle_seed: int | None = None
    test_size: float | None = None

    @classmethod
    def of(cls, config: Any) -> Selection:
        """Returns the selection of a config, which has keys of the same names."""
        return cls(**{name: getattr(config, name) for name in cls.__dataclass_fields__})

    def reading(self, source: str, weights: str | None = None) -> Reading:
        """Returns what is said of the columns of a source.

        Raises:
            DataError: a format or a role is not known.
        """
        chosen, columns = self.dataset_format, self.dataset_columns
        if isinstance(chosen, Mapping):
            chosen = chosen.get(source)
        if columns and any(isinstance(value, Mapping) for value in columns.values()):
            columns = columns.get(source)
        return Reading(chosen, columns, weights)

    def check_names(self, dataset_mixer: Mapping[str, float]) -> None:
        """Raises DataError where a format or columns are given for a source that is not there."""
        for key in ("dataset_format", "dataset_columns"):
            value = getattr(self, key)
            by_source = isinstance(value, Mapping) and (
                key == "dataset_format" or any(isinstance(item, Mapping) for item in value.values())
            )
            for name in value if by_source else ():
                if name not in dataset_mixer:
                    raise DataError(
                        f"`{key}` names {name}, which is no source of `dataset_mixer`; it has "
                        f"{', '.join(dataset_mixer)}"
                    )


def choose_rows(table: pa.Table, count: int, seed: int | None) -> pa.Table:
    """Returns `count` rows of a table, in their order: the first, or with a seed drawn ones."""
    if count >= table.num_rows:
        return table
    if seed is None:
        return table.slice(0, count)
    return table.take(np.sort(np.random.default_rng(seed).permutation(table.num_rows)[:count]))


def held_out_count(test_size: float, rows: int) -> int:
    """Returns how many of some rows `test_size` asks for: a number below 1 is a share of them."""
    return round(test_size * rows) if test_size < 1 else int(test_size)


def hold_out(keys: Sequence[Hashable], count: int, seed: int | None) -> np.ndarray:
    """Draws rows to be held out: whole prompts at random, until they are at least `count` rows.

    All rows of a prompt are on the same side, so that no prompt is both trained on and evaluated. Which prompts are
    drawn depends on the prompts in order of their first rows, and on the seed.

    Args:
        keys: what stands for the prompt of each row.
        count: the rows to hold out, at least.
        seed: the seed; None takes `SPLIT_SEED`.

    Returns:
        bool [rows], True for rows that are held out.
    """
    numbers: dict[Hashable, int] = {}
    prompt_of_row = np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)
    sizes = np.bincount(prompt_of_row, minlength=len(numbers))
    order = np.random.default_rng(SPLIT_SEED if seed is None else seed).permutation(len(numbers))
    before = np.cumsum(sizes[order]) - sizes[order]
    drawn = np.zeros(len(numbers), bool)
    drawn[order[before < count]] = True
    return drawn[prompt_of_row]


def plain_text(value: object) -> object:
    """Takes capitals and runs of white space out of all text of a value, so that prompts that read the same are one."""
    if isinstance(value, str):
        return " ".join(value.lower().split())
    if isinstance(value, dict):
        return {key: plain_text(item) for key, item in value.items()}
    return [plain_text(item) for item in value] if isinstance(value, list) else value
