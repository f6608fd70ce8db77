"""Judges a run record by record, and says each finding once, and again only when it has become much worse."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jax_simpo.run.health.rules import AT_START, DURING, Finding, History, RunTraits

_MUCH_WORSE = 2.0  # times the level at which a finding was last said


class HealthWatch:
    """Looks at every record of a run.

    Everything follows from the traits and the records, so a resumed run that is given its old records again goes on as
    if it had not been interrupted.

    Attributes:
        findings: what has been found so far, oldest first.
    """

    def __init__(self, traits: RunTraits) -> None:
        self._traits, self._history = traits, History()
        self._level: dict[str, float] = {}
        self.findings: list[Finding] = []
        self._add(rule(traits) for rule in AT_START)

    def observe(self, record: Mapping[str, Any]) -> list[Finding]:
        """Returns what a record of `metrics.jsonl` shows that had not been said, or is much worse than when it was."""
        self._history.add(record)
        return self._add(rule(self._traits, self._history) for rule in DURING)

    def _add(self, found: Iterable[Finding | None]) -> list[Finding]:
        news = [one for one in found if one and one.level >= _MUCH_WORSE * self._level.get(one.name, 0.0)]
        self._level |= {one.name: one.level for one in news}
        self.findings += news
        return news
