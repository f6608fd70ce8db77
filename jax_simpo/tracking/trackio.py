"""trackio: a run in its local store (`trackio show`), or where TRACKIO_SPACE_ID or TRACKIO_SERVER_URL says."""

from __future__ import annotations

import io
import os
import re
import secrets
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path

import trackio

from jax_simpo.tracking.tracker import PROJECT, Ending, Start

rewinds = False


def check(output: Path) -> None:
    """Finds nothing wrong: the store is local, or trackio itself keeps what its server does not take."""


class Trackio:
    """Logs records, and at the end the model card as Markdown and the files as an artifact."""

    def __init__(self, start: Start) -> None:
        project = start.project or os.environ.get("TRACKIO_PROJECT") or PROJECT
        # trackio finds a run by its name alone, so the name of a run must be its own.
        self.run = start.run or f"{start.name}-{secrets.token_hex(3)}"
        self.place = f"trackio show --project {project} (run {self.run})"
        with redirect_stdout(io.StringIO()):  # it prints, and stdout is for results
            self._run = trackio.init(
                project,
                name=self.run,
                config=dict(start.config),
                resume="allow",
                embed=False,
            )
        trackio.context_vars.current_run.set(None)  # else it is finished once more, with a print, when Python ends
        self._last = start.next_step

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)
        self._last = step

    def flush(self) -> None:
        """Does nothing: a thread of trackio's writes to its store twice a second."""

    def attach(self, attached: Mapping[str, Path]) -> None:
        if "card" in attached:
            card = attached["card"].read_text(encoding="utf-8")
            self._run.log({"report": trackio.Markdown(card.partition("\n---\n")[2])}, step=self._last)
        with redirect_stdout(io.StringIO()):
            artifact = trackio.Artifact(name=re.sub(r"[^A-Za-z0-9._-]", "-", f"{self.run}-files"), type="run")
            for path in attached.values():
                artifact.add_file(path)
            self._run.log_artifact(artifact)

    def close(self, ending: Ending) -> None:
        with redirect_stdout(io.StringIO()):
            self._run.finish()


begin = Trackio
