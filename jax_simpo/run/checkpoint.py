"""Checkpoints of a run: parameters, optimizer state, and what the run is, in `checkpoints/STEP/` (Orbax).

A step holds three items. `params` (those that are trained) and `optimizer` are saved and restored shard by shard; `run`
is a small JSON object that says which run this is. No iterator state is needed: the step number determines the batches
that follow.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from jax.sharding import Sharding

from jax_simpo.errors import CheckpointError


class Checkpoints:
    """The checkpoints of one output directory; closes when used as a context manager.

    Args:
        directory: the folder of the steps; made if it is missing and `read_only` is false.
        keep: how many to keep, the newest; None keeps all.
        read_only: promise not to write.
    """

    def __init__(self, directory: Path, *, keep: int | None = None, read_only: bool = False) -> None:
        self.directory = directory.absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            # What a killed save left behind is no checkpoint; it is removed, never restored.
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            read_only=read_only,
            # A background save would read buffers that the next update takes for itself.
            enable_async_checkpointing=False,
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._manager.close()

    def steps(self) -> list[int]:
        """The steps there are, oldest first."""
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

    def save(self, step: int, params: Any, optimizer: Any, run: Mapping[str, Any]) -> None:
        """Writes a step: complete, or not at all. A step of the same number is removed first."""
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

    def run(self, step: int) -> dict[str, Any]:
        """What the run of a step is, as `save` was told."""
        return self._restore(step, run=ocp.args.JsonRestore())["run"]

    def params(self, step: int, abstract: Any) -> Any:
        """The parameters of a step, straight to the shardings that the abstract arrays carry."""
        return self._restore(step, params=ocp.args.StandardRestore(abstract))["params"]

    def optimizer(self, step: int, abstract: Any) -> Any:
        """The optimizer state of a step, straight to the shardings that the abstract arrays carry."""
        return self._restore(step, optimizer=ocp.args.StandardRestore(abstract))["optimizer"]

    def _restore(self, step: int, **items: Any) -> Any:
        if step not in self._manager.all_steps():
            there = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(f"{self.directory}: there is no checkpoint of step {step}; there are: {there}")
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, FileNotFoundError, TypeError) as error:
            raise CheckpointError(
                f"{self.directory / str(step)}: cannot be restored: {error}. It is damaged, or belongs to another "
                "model; remove it, or train into another `output_dir`"
            ) from error


def abstract_state(shapes: Any, shardings: Any) -> Any:
    """Shapes with shardings, as `Checkpoints.params` and `.optimizer` want them."""

    def one(leaf: Any, sharding: Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(one, shapes, shardings)


def check_same_run(saved: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
    """Refuses to continue a run as another one.

    Raises:
        CheckpointError: names every key that differs, with both values, and what to do.
    """
    keys = [key for key in {**saved, **now} if saved.get(key) != now.get(key)]
    if keys:
        differ = "\n".join(f"  {key}: was {saved.get(key)!r}, is {now.get(key)!r}" for key in keys)
        raise CheckpointError(
            f"{where} holds a checkpoint of another run; these settings differ:\n{differ}\nSet them back to continue "
            "it, give another `output_dir`, or set `overwrite_output_dir: true` to remove it and start afresh"
        )
