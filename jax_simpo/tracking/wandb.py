"""Weights & Biases: a run of a wandb project, online, or offline with WANDB_MODE=offline and `wandb sync` later."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import wandb

from jax_simpo.redact import redact
from jax_simpo.tracking.tracker import PROJECT, Ending, Start

rewinds = False


def check(output: Path) -> None:
    """Makes sure that a key is there and that the server takes it. Offline, none is needed."""
    if _offline():
        return
    wandb.setup(settings=wandb.Settings(silent=True))
    if not wandb.login(prompt=False, verify=True):
        raise PermissionError("nobody is logged in; run `wandb login`, or set WANDB_MODE=offline and sync later")


def _offline() -> bool:
    return os.environ.get("WANDB_MODE", "online") in ("offline", "dryrun", "disabled")


class WeightsAndBiases:
    """Logs records, one row a step. It takes nothing from the terminal and reads no code."""

    def __init__(self, start: Start) -> None:
        self._run = wandb.init(
            project=start.project or os.environ.get("WANDB_PROJECT") or PROJECT,
            name=start.name,
            id=start.run,
            resume="allow" if start.run and not _offline() else None,
            config=dict(start.config),
            reinit="create_new",  # a run of the user's own goes on beside it
            settings=wandb.Settings(silent=True, console="off", disable_code=True, allow_val_change=True),
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self.run = self._run.id
        folder = Path(self._run.dir).parent
        self.place = f"wandb sync {folder}" if _offline() else redact(str(self._run.url))

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        # A row holds all that is logged under its number, so an evaluation stands beside the training of its step.
        self._run.log({"step": step, **figures}, step=step)

    def flush(self) -> None:
        """Does nothing: wandb's own process has what was logged, and outlives this one."""

    def attach(self, attached: Mapping[str, Path]) -> None:
        # In a folder, because wandb has a config.yaml of its own. Copies, because it would link to the files, which a
        # run that goes on replaces.
        folder = Path(self._run.dir) / "jax-simpo"
        folder.mkdir(exist_ok=True)
        for path in attached.values():
            self._run.save(str(shutil.copy(path, folder)), base_path=self._run.dir, policy="now")

    def close(self, ending: Ending) -> None:
        if ending == "stopped" and not _offline():
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if ending == "finished" else 1)


begin = WeightsAndBiases
