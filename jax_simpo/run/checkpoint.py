"""Checkpoints of a run: parameters, optimizer state and the run's identity, in `checkpoints/STEP/` (Orbax).

A step holds three items. `params` (those that are trained) and `optimizer` are saved and restored shard by shard; `run`
is a small JSON object, the run's identity. Beside them lies the step's seal. No iterator state is needed: the step
number determines the batches that follow.

Training waits only until a step's arrays are copied. They are written, summed and sealed in a thread of their own.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from jax.sharding import Sharding

from jax_simpo.config import TrainConfig
from jax_simpo.errors import CheckpointError, ConfigError
from jax_simpo.processes import distributed
from jax_simpo.run.quiet import quieten, quieten_saves
from jax_simpo.run.resume import Resume, check_trainer, choose_step
from jax_simpo.run.seal import Seal, file_names, find_damage
from jax_simpo.run.steps import StepFolders
from jax_simpo.run.sums import Sum, sums_of

_LONGEST_SECONDS = 24 * 3600  # that a process waits for the others' files: a dead one is detected by its heartbeats
_MEMORY, _CONTAINER = Path("/proc/meminfo"), Path("/sys/fs/cgroup")

quieten()


class Checkpoints:
    """The checkpoints of one output directory; closes when used as a context manager.

    Nothing is read from a step before its files are known to be those that were saved. A step is whole when `save` has
    been followed by `wait`, by another `save`, or by the end of the context. All processes of a run call the methods
    together, except for `steps`, `latest`, `saving`, `raise_failed`, `check_room` and `thin_out`.

    Args:
        directory: the folder of the steps; `save` makes it if it is missing.
        keep: how many to keep, the newest, besides a step that `save` is told to keep; None keeps all.
    """

    def __init__(self, directory: Path, *, keep: int | None = None) -> None:
        self.directory, self._keep = directory.absolute(), keep
        self.folders = StepFolders(self.directory)
        self._whole: set[int] = set()
        patient = ocp.options.AsyncOptions(timeout_secs=_LONGEST_SECONDS)
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=patient)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saving")
        self._saving: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and distributed.count() > 1:
            self._thread.shutdown(wait=False)  # the other processes may never write their part; the run ends with them
            return
        self._thread.shutdown()
        try:
            if error is None:
                self.wait()
        finally:
            self._orbax.close()

    def steps(self) -> list[int]:
        """The steps, oldest first."""
        return self.folders.all()

    def latest(self) -> int:
        """The newest step.

        Raises:
            CheckpointError: there is none.
        """
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"{self.directory} holds no checkpoint")
        return steps[-1]

    def damage(self, step: int) -> str | None:
        """Returns what is wrong with a step in a line that begins with a file's name; None if it is as it was saved."""
        if step in self._whole:
            return None
        share, shares = distributed.number(), distributed.count()
        found = distributed.collect("damage", find_damage(self.folders[step], step, share=share, shares=shares))
        damage = next(filter(None, found), None)
        if damage is None:
            self._whole.add(step)
        return damage

    def save(
        self,
        step: int,
        params: Any,
        optimizer: Any,
        run: Mapping[str, Any],
        metrics: Sum,
        *,
        keep_step: int | None = None,
    ) -> None:
        """Writes a step whole or not at all, and then removes the oldest ones. One of the same number goes.

        Returns as soon as the arrays may change. Where a CPU's memory has no room for a copy of them, that is when the
        step is whole.

        Args:
            step: optimizer steps done.
            params: the trained parameters.
            optimizer: the optimizer state.
            run: the run's identity.
            metrics: the sum of the run's records so far, on the first process.
            keep_step: a step that is not to be removed, however old it is.

        Raises:
            CheckpointError: the disk has no room, or this step or the one before cannot be written; the former steps
                are as they were.
        """
        self.wait()
        quieten_saves()

        def begin() -> None:
            self.folders.begin()
            self.check_room(params, optimizer)

        distributed.on_first("step begins", begin)
        writing = self.folders.writing(step)
        arrays, copied = _safe_from_updates((params, optimizer))
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(arrays[0]),
            optimizer=ocp.args.StandardSave(arrays[1]),
            run=ocp.args.JsonSave(dict(run)),
        )
        try:
            self._orbax.save(writing, args=args)
        except (OSError, ValueError) as error:
            raise self._not_saved(step, error) from error
        self._saving = self._thread.submit(self._finish, step, metrics, keep_step)
        if not copied:
            self.wait()

    def wait(self) -> None:
        """Waits until the step that is being saved is whole.

        Raises:
            CheckpointError: it cannot be written; the former steps are as they were.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    @property
    def saving(self) -> bool:
        """True while a step is being written."""
        return self._saving is not None and not self._saving.done()

    def raise_failed(self) -> None:
        """Raises what `wait` would raise if the step that was being saved has failed; does not wait."""
        if not self.saving:
            self.wait()

    def _finish(self, step: int, metrics: Sum, keep_step: int | None) -> None:
        """Waits until a step is written, sums its files, seals it and moves it to its place."""
        with distributed.own_line("saving"):
            self._seal(step, metrics)
            distributed.on_first("step is whole", lambda: self.thin_out(step, keep_step))

    def _seal(self, step: int, metrics: Sum) -> None:
        writing = self.folders.writing(step)
        try:
            self._orbax.wait_until_finished()
            names = distributed.collect("files", file_names(writing))[0]
            own = sums_of(writing, names[distributed.number() :: distributed.count()], to_disk=True)
        except (OSError, ValueError) as error:  # a full disk, a quota, a folder that is gone
            if isinstance(error.__cause__, jax.errors.JaxRuntimeError):  # a barrier failed: another process has died
                raise error.__cause__ from None
            raise self._not_saved(step, error) from error
        parts = distributed.collect("sums", {name: found.to_json() for name, found in own.items()})
        sums = {name: Sum(*values) for part in parts for name, values in part.items()}

        def finish() -> None:
            try:
                Seal(step, metrics, sums).write(writing)
                self.folders.finish(step)
            except (OSError, ConfigError) as error:
                raise self._not_saved(step, error) from error

        distributed.on_first("step is sealed", finish)

    def thin_out(self, *besides: int | None) -> None:
        """Removes the oldest steps, as many as are too many, but none of `besides`. One process calls it."""
        self.folders.thin_out(self._keep, besides=besides)

    def check_room(self, params: Any, optimizer: Any) -> None:
        """Makes sure that the disk has room for a step of these arrays.

        Raises:
            CheckpointError: it has not.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        size = sum(array.size * array.dtype.itemsize for array in jax.tree.leaves((params, optimizer)))
        disk = shutil.disk_usage(self.directory)
        free = disk.free
        if free < size and disk.total:  # some file systems say that they have nothing at all
            raise CheckpointError(
                f"{self.directory}: a step takes up to {size / 1e9:.3g} GB, but the disk has {free / 1e9:.3g} GB left. "
                f"{self._outlook()}"
            )

    def _not_saved(self, step: int, error: Exception) -> CheckpointError:
        """Returns the error for a step that cannot be written. A run of one process removes what there is of it."""
        if distributed.count() == 1:
            shutil.rmtree(self.folders.writing(step), ignore_errors=True)
            self.folders.clean()
        text = (str(error).splitlines() or [type(error).__name__])[0]
        reason = error.strerror if isinstance(error, OSError) and error.strerror else text.rpartition(": ")[2]
        reason = reason.partition(" [")[0]  # TensorStore adds the number of the error
        return CheckpointError(f"{self.directory}: step {step} cannot be saved: {reason}. {self._outlook()}")

    def _outlook(self) -> str:
        steps = self.steps()
        where = f"step {steps[-1]}" if steps else "its beginning"
        return f"Make room and start the same command again: the run goes on from {where}"

    def run(self, step: int) -> dict[str, Any]:
        """The identity of the run that saved a step."""
        return self._restore(step, run=ocp.args.JsonRestore())["run"]

    def metrics(self, step: int) -> Sum:
        """The sum of the run's records up to a step."""
        self._check_whole(step)
        return Seal.read(self.folders[step]).metrics

    def params(self, step: int, abstract: Any) -> Any:
        """The parameters of a step, straight to the shardings that the abstract arrays carry."""
        return self._restore(step, params=ocp.args.StandardRestore(abstract))["params"]

    def optimizer(self, step: int, abstract: Any) -> Any:
        """The optimizer state of a step, straight to the shardings that the abstract arrays carry."""
        return self._restore(step, optimizer=ocp.args.StandardRestore(abstract))["optimizer"]

    def _restore(self, step: int, **items: Any) -> Any:
        self._check_whole(step)
        try:
            return self._orbax.restore(self.folders[step], args=ocp.args.Composite(**items))
        except (ValueError, KeyError, FileNotFoundError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(
                f"{self.folders[step]}: cannot be restored: {reason}. It belongs to another model, or to another "
                "version of the program; train into another `output_dir`"
            ) from error

    def _check_whole(self, step: int) -> None:
        self.wait()
        if step not in self.steps():
            steps = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(f"{self.directory}: there is no checkpoint of step {step}; there are: {steps}")
        if damage := self.damage(step):
            others = ", ".join(str(other) for other in self.steps() if other != step) or "none"
            raise CheckpointError(f"{self.folders[step]}: {damage}. Take another step; there are: {others}")


def _safe_from_updates(arrays: Any) -> tuple[Any, bool]:
    """Returns arrays that a save may read while the run goes on, and True; or the same ones and False.

    Orbax itself copies the arrays of an accelerator to the host. From a CPU device it would read the run's own buffers,
    which the next update takes for itself. So they are copied, if twice their size is left of the memory.
    """
    leaves = jax.tree.leaves(arrays)
    if all(device.platform != "cpu" for leaf in leaves for device in leaf.sharding.device_set):
        return arrays, True
    size = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
    if 2 * size > _memory_left():
        return arrays, False
    return jax.tree.map(lambda array: array.copy(), arrays), True


def _memory_left() -> int:
    """Returns this process's share of the memory that its machine and its container can still give, in bytes.

    It is 0 on a system that does not say. Where all processes of a run have machines of their own, it is too little.
    """
    try:
        lines = _MEMORY.read_text().splitlines()
    except OSError:
        return 0
    left = next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), 0)
    try:
        limit, used = ((_CONTAINER / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:  # no container, or one of another kind
        limit, used = "max", "0"
    if limit != "max":
        left = min(left, int(limit) - int(used))
    return left // distributed.count()


def abstract_state(shapes: Any, shardings: Any) -> Any:
    """Joins shapes and shardings to the abstract arrays that `Checkpoints.params` and `.optimizer` take."""

    def abstract_array(leaf: Any, sharding: Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(abstract_array, shapes, shardings)


def starting_point(config: TrainConfig, output: Path, checkpoints: Checkpoints) -> tuple[Resume, dict[str, Any]]:
    """Returns where a run continues, and the identity of the run that saved that step; step 0 starts afresh.

    Args:
        config: the settings of the run.
        output: its output directory.
        checkpoints: the checkpoints there.

    Raises:
        CheckpointError: there is no whole step such as `resume_from_checkpoint` asks for, or the PyTorch reference
            wrote it.
        ConfigError: the value of `resume_from_checkpoint` is none that the key may have.
    """
    if config.overwrite_output_dir:
        return choose_step(config.resume_from_checkpoint, [], output, checkpoints.damage), {}
    check_trainer(output, "jax-simpo train")
    distributed.on_first("unfinished steps", checkpoints.folders.clean)
    steps = distributed.collect("steps", checkpoints.steps())[0]  # whatever file systems show to the other processes
    resume = choose_step(config.resume_from_checkpoint, steps, output, checkpoints.damage)
    return resume, checkpoints.run(resume.step) if resume.step else {}
