"""TensorBoard: event files in the folder `tensorboard` of the output directory, written by tensorboardX."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from jax_simpo.run import files
from jax_simpo.run.manifest import check_free, claim
from jax_simpo.run.whole import remove
from jax_simpo.tracking.tracker import Ending, Start

rewinds = True


def check(output: Path) -> None:
    """Makes sure that the folder of the event files is this run's.

    Raises:
        CheckpointError: there is one that no run wrote.
    """
    check_free(output, (files.TENSORBOARD,))


class TensorBoard:
    """Writes scalars, and at the end the config, the model card and the curves."""

    run = files.TENSORBOARD

    def __init__(self, start: Start) -> None:
        claim(start.output, files.TENSORBOARD)
        folder = start.output / files.TENSORBOARD
        if start.run is None:
            remove(folder)
        self.place = f"tensorboard --logdir {folder}"
        self._writer = SummaryWriter(
            str(folder),
            # Readers forget what earlier files say of this step and later ones.
            purge_step=start.next_step if start.run is not None else None,
            # Names end in the second; a run that goes on within the same one would write over its own file.
            filename_suffix=f".{start.next_step:08d}",
        )
        self._last = max(0, start.next_step - 1)
        self._writer.add_text("config", f"```yaml\n{start.config_text}```", self._last)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step, display_name=name)
        self._last = step

    def flush(self) -> None:
        self._writer.flush()

    def attach(self, attached: Mapping[str, Path]) -> None:
        if "card" in attached:  # TensorBoard shows Markdown and no HTML: the card says what the report does
            card = attached["card"].read_text(encoding="utf-8")
            self._writer.add_text("report", card.partition("\n---\n")[2], self._last)
        if "curves" in attached:
            self._writer.add_image("curves", _pixels(attached["curves"]), self._last, dataformats="HWC")

    def close(self, ending: Ending) -> None:
        self._writer.close()


begin = TensorBoard


def _pixels(picture: Path) -> Any:
    """Returns the colours of a PNG, [height, width, 3], from 0 to 1."""
    from matplotlib import image

    return image.imread(picture)[:, :, :3]
