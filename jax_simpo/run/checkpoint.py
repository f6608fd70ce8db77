"""Checkpoints of a run: parameters, optimizer state and the run's identity, in `checkpoints/STEP/` (Orbax).

A step holds three items. `params` (those that are trained) and `optimizer` are saved and restored shard by shard; `run`
is a small JSON object, the run's identity. No iterator state is needed: the step number determines the batches that
follow.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from jax.sharding import Sharding

from jax_simpo.config import TrainConfig
from jax_simpo.errors import CheckpointError
from jax_simpo.run import files
from jax_simpo.run.resume import check_trainer, choose_step


class Checkpoints:
    """The checkpoints of one output directory; closes when used as a context manager.

    Args:
        directory: the folder of the steps; made if it is missing and `read_only` is false.
        keep: how many to keep, the newest, besides a step that `save` is told to keep; None keeps all.
        read_only: promise not to write.
    """

    def __init__(self, directory: Path, *, keep: int | None = None, read_only: bool = False) -> None:
        self.directory, self._keep = directory.absolute(), keep
        options = ocp.CheckpointManagerOptions(
            # The rest of a killed save is no checkpoint; it is removed, never restored.
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            read_only=read_only,
            # A background save would read buffers that the next update takes for itself.
            enable_async_checkpointing=False,
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._manager.close()

    def steps(self) -> list[int]:
        """The finished steps, oldest first."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int:
        """The newest step.

        Raises:
            CheckpointError: there is none.
        """
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"{self.directory} holds no checkpoint")
        return steps[-1]

    def save(
        self, step: int, params: Any, optimizer: Any, run: Mapping[str, Any], *, keep_step: int | None = None
    ) -> None:
        """Writes a step whole or not at all, and then removes the oldest ones. One of the same number goes first.

        Args:
            step: optimizer steps done.
            params: the trained parameters.
            optimizer: the optimizer state.
            run: the run's identity.
            keep_step: a step that is not to be removed, however old it is.
        """
        if step in self._manager.all_steps():
            self._manager.delete(step)
        self._manager.save(
            step,
            force=True,  # a run that went back to an earlier step saves below the newest one
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params),
                optimizer=ocp.args.StandardSave(optimizer),
                run=ocp.args.JsonSave(dict(run)),
            ),
        )
        self._manager.wait_until_finished()
        for old in self.steps()[: -self._keep] if self._keep else []:
            if old not in (step, keep_step):
                self._manager.delete(old)

    def run(self, step: int) -> dict[str, Any]:
        """The identity of the run that saved a step."""
        return self._restore(step, run=ocp.args.JsonRestore())["run"]

    def params(self, step: int, abstract: Any) -> Any:
        """The parameters of a step, straight to the shardings that the abstract arrays carry."""
        return self._restore(step, params=ocp.args.StandardRestore(abstract))["params"]

    def optimizer(self, step: int, abstract: Any) -> Any:
        """The optimizer state of a step, straight to the shardings that the abstract arrays carry."""
        return self._restore(step, optimizer=ocp.args.StandardRestore(abstract))["optimizer"]

    def _restore(self, step: int, **items: Any) -> Any:
        if step not in self._manager.all_steps():
            steps = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(f"{self.directory}: there is no checkpoint of step {step}; there are: {steps}")
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, FileNotFoundError, TypeError) as error:
            raise CheckpointError(
                f"{self.directory / str(step)}: cannot be restored: {error}. It is damaged, or belongs to another "
                "model; remove it, or train into another `output_dir`"
            ) from error


def abstract_state(shapes: Any, shardings: Any) -> Any:
    """Joins shapes and shardings to the abstract arrays that `Checkpoints.params` and `.optimizer` take."""

    def abstract_array(leaf: Any, sharding: Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(abstract_array, shapes, shardings)


def starting_point(config: TrainConfig, output: Path) -> tuple[int, dict[str, Any]]:
    """Returns the step to continue from, and the identity of the run that saved it; step 0 starts afresh.

    Raises:
        CheckpointError: there is no step such as `resume_from_checkpoint` asks for, or the PyTorch reference wrote it.
        ConfigError: the value of `resume_from_checkpoint` is none that the key may have.
    """
    folder = output / files.CHECKPOINTS
    if config.overwrite_output_dir or not folder.is_dir():
        return choose_step(config.resume_from_checkpoint, [], output), {}
    check_trainer(output, "jax-simpo train")
    with Checkpoints(folder, read_only=True) as checkpoints:
        step = choose_step(config.resume_from_checkpoint, checkpoints.steps(), output)
        return (step, checkpoints.run(step)) if step else (0, {})
