"""Chooses among the evaluations of a run: the best step, and the end of a run that gets no better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jax_simpo.run.best import BestRule, evaluations
from torch_ref.distributed import Ranks


@dataclass
class Choice:
    """The evaluations of a run so far, and what follows from them.

    The first rank decides for all of them, so that no rounding error of a figure can lead two ranks different ways.

    Attributes:
        rule: compares the evaluations; None where the config asks for no comparison, and nothing follows.
        ranks: the ranks of the run. All of them call every method.
        best_step: the step of the best evaluation, if its model is the one to export.
        ends: True if the run has gone on for long enough without a better evaluation.
    """

    rule: BestRule | None
    ranks: Ranks
    best_step: int | None = field(default=None, init=False)
    ends: bool = field(default=False, init=False)
    _records: list[Mapping[str, Any]] = field(default_factory=list, init=False, repr=False)

    def resume(self, output: Path, first_step: int, saved: Sequence[int]) -> None:
        """Adds the evaluations of the steps before, as `metrics.jsonl` of the output directory has them.

        Args:
            output: the output directory.
            first_step: the number of steps before.
            saved: the steps that have a checkpoint.

        Raises:
            CheckpointError: the best of these steps has none.
        """
        rule = self.rule
        if rule is not None:
            records = self.ranks.first(lambda: evaluations(output, first_step))
            rule.check_saved(records, saved, output)
            self.add(records)

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Adds evaluation records, and decides anew."""
        rule = self.rule
        if rule is None:
            return
        self._records += records
        self.best_step, self.ends = self.ranks.first(
            lambda: (rule.best_step(self._records) if rule.keep else None, rule.ends(self._records))
        )
