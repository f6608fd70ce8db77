"""Defines a tracker: the few things that a run asks of TensorBoard, wandb, trackio and mlflow alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

PROJECT = "jax-simpo"
"""The project of runs whose config and environment name none."""

# finished: all steps are done. stopped: by a signal or a callback, and the same command goes on. failed: by an error.
Ending = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True)
class Start:
    """Holds what a tracker needs to begin a run, or to go on with one.

    Attributes:
        output: the output directory.
        name: the run's name, for people.
        project: what the config says that runs are gathered under; None where it says nothing.
        config: the resolved config, as its keys and values.
        config_text: the same as YAML.
        run: the tracker's own name of the run to go on with; None begins a new one.
        next_step: the first step that is sent now; what a tracker that rewinds has from there on is dropped.
    """

    output: Path
    name: str
    project: str | None
    config: Mapping[str, Any]
    config_text: str
    run: str | None
    next_step: int


class Tracker(Protocol):
    """A run in a tracker.

    The figures of a record keep their names, and `step` is the axis. All methods may raise whatever the library does.

    Attributes:
        run: the tracker's own name of the run, by which it can be continued.
        place: where the user finds it, in words.
    """

    run: str
    place: str

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Sends the figures of a record."""

    def flush(self) -> None:
        """Brings what was sent to the disk, where the library does so only now and then."""

    def attach(self, attached: Mapping[str, Path]) -> None:
        """Attaches the run's files: `config`, `report`, `card` and `curves`, those that there are."""

    def close(self, ending: Ending) -> None:
        """Ends the run in the tracker."""


class Library(Protocol):
    """A kind of tracker.

    Attributes:
        rewinds: what was sent of a step can be taken back, so that a resumed run sends it again.
    """

    rewinds: bool

    def check(self, output: Path) -> None:
        """Makes sure that a run could begin now: the user is logged in, the server answers.

        Raises:
            Exception: with what is wrong.
        """

    def begin(self, start: Start) -> Tracker:
        """Begins a run in the tracker, or goes on with one."""
