"""Compiles the step of a config for devices that cannot compute, and reads memory and collectives from the programs.

A step runs three programs. With P the parameters, O the optimizer state and G the step's sum of gradients, a device
holds these arrays while they run:

* first micro-batch of a step: P and O; the program makes G;
* every later micro-batch: P, O and G, and its own gradient until it is added;
* the update: P, O and G; it replaces P and O in place.

O is not an argument of the first two programs, but it stays on the device. The step needs the largest of the three
sums, each with the program's temporaries. The first two programs differ only by G, so one of them is compiled: that of
the later micro-batches, or that of the first one if no step has a second micro-batch.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console

from jax_simpo.data.packing import ROW_MULTIPLE, StepPlan, measure
from jax_simpo.data.rows import RowBatch
from jax_simpo.ops.attention import choose, place_of
from jax_simpo.ops.loss_head import choice as head_choice
from jax_simpo.plan.allocations import compile_and_measure
from jax_simpo.plan.flops import useful_flops, work_of
from jax_simpo.plan.hlo import array_bytes, collectives, loop_states
from jax_simpo.plan.report import HardwarePlan, Memory, Traffic
from jax_simpo.plan.topology import Topology
from jax_simpo.run.cadence import count_steps
from jax_simpo.sharding import make_mesh, named
from jax_simpo.training import loss_head
from jax_simpo.training.backend_choice import BackendChoice
from jax_simpo.training.optim import run_optimizer
from jax_simpo.training.setup import Setup
from jax_simpo.training.step import Accumulated, Denominators, make_train_functions

_COMPILATIONS = 4  # most compilations to find the largest micro-batch, besides that of the configured one
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True)
class TopologySetup(Setup):
    """A config's setup on the devices of a topology instead of those of this machine."""

    topology: Topology = field(kw_only=True)

    @cached_property
    def mesh(self) -> jax.sharding.Mesh:
        """The config's mesh over the topology's devices."""
        return make_mesh(**self.config.mesh.model_dump(), devices=self.topology.devices())

    def _attention_choice(self, plan: StepPlan | None) -> BackendChoice:
        """Returns the backend that is preferred there: none can be tried on devices that are not here."""
        shape = self.attention_shape(plan)
        place = place_of(self.mesh.devices.flat[0], dtype=shape.dtype, head_dim=shape.head_dim, softcap=shape.softcap)
        return BackendChoice(*choose(self.config.attention, place))

    def _loss_head_choice(self, plan: StepPlan | None) -> BackendChoice:
        """Returns `xla`, or the backend that the config names: none can be tried on devices that are not here."""
        shape = loss_head.shape_of(self.model, self.mesh, plan)
        place = loss_head.head_place(shape, self.mesh.devices.flat[0])
        return BackendChoice(*head_choice.choose(self.config.loss_head, place, shape.width))

    @cached_property
    def device_memory(self) -> int:
        """The bytes of memory that a program may use on each device of the topology."""
        return self.topology.memory


@dataclass(frozen=True)
class Compiled:
    """The figures of one program on one device.

    Attributes:
        bytes: bytes of arguments, results, temporaries and the program itself; a donated argument counts once.
        activations: bytes of the temporaries that the layers' forward pass keeps for the backward pass.
        traffic: kind of collective -> how often it runs and the bytes of its arrays; None if the compiler refused the
            program because of its size.
    """

    bytes: int
    activations: int
    traffic: dict[str, tuple[int, int]] | None


class Programs:
    """Compiles the programs of a config's steps, from the shapes of their arrays alone.

    Args:
        setup: the config's setup.
        step_plan: the step plan of the training pairs.
        accumulates: True if a step has several micro-batches.
    """

    def __init__(self, setup: Setup, step_plan: StepPlan, *, accumulates: bool) -> None:
        self._setup, self._step_plan, self._accumulates = setup, step_plan, accumulates
        mesh, model = setup.mesh, setup.model
        _, optimizer = run_optimizer(setup.config, count_steps(setup.config, step_plan.steps_per_epoch))
        self._functions: Any = make_train_functions(
            setup.training_forward_of(step_plan), setup.objective, optimizer, mesh
        )
        self._params: Any = _placed(model.abstract, model.shardings(mesh))
        state = jax.eval_shape(self._functions.init_optimizer, model.abstract)
        self._state = _placed(state, self._functions.optimizer_shardings)
        accumulate = self._functions.accumulate
        first_output = self._lower(accumulate, self._params, None, self._rows(1), self._denominators).out_info
        # Gradients have the shardings of their parameters; frozen parameters have none.
        params_at = dict(jax.tree_util.tree_leaves_with_path(self._params))
        gradients = jax.tree_util.tree_map_with_path(lambda path, _: params_at[path], first_output.gradients)
        replicated = NamedSharding(mesh, P())
        metrics = {name: _array(info, replicated) for name, info in first_output.metrics.items()}
        self._accumulated = Accumulated(gradients, metrics)

    @property
    def parameters(self) -> int:
        """The bytes of parameters on each device."""
        return _local_bytes(self._params)

    @property
    def optimizer(self) -> int:
        """The bytes of optimizer state on each device."""
        return _local_bytes(self._state)

    @property
    def gradients(self) -> int:
        """The bytes of the step's gradients on each device."""
        return _local_bytes(self._accumulated.gradients)

    def rows(self, rows_per_device: int) -> int:
        """Returns the bytes of a micro-batch's arrays on each device."""
        return _local_bytes(self._rows(rows_per_device))

    def micro_batch(self, rows_per_device: int) -> Compiled:
        """Compiles the program of a micro-batch with `rows_per_device` rows on each device."""
        accumulated = self._accumulated if self._accumulates else None
        arguments = (self._params, accumulated, self._rows(rows_per_device), self._denominators)
        return self._compile(self._functions.accumulate, *arguments, rows_per_device=rows_per_device)

    def update(self) -> Compiled:
        """Compiles the program that ends a step."""
        return self._compile(self._functions.update, self._params, self._state, self._accumulated.gradients)

    def memory(self, micro_batch: Compiled, rows_per_device: int, update: Compiled) -> Memory:
        """Returns the memory of a device at the peak of a step."""
        rows = self.rows(rows_per_device)
        in_micro_batch = micro_batch.bytes + self.optimizer
        state = self.parameters + self.optimizer + self.gradients
        activations = micro_batch.activations if in_micro_batch >= update.bytes else 0
        working = max(in_micro_batch, update.bytes) - state - rows - activations
        return Memory(self.parameters, self.optimizer, rows, self.gradients, activations, max(0, working))

    def _rows(self, rows_per_device: int) -> dict[str, jax.ShapeDtypeStruct]:
        empty = RowBatch.empty(rows_per_device * self._setup.data_parallel, self._step_plan.shape).arrays()
        sharding = named(self._setup.mesh, "batch", None)
        return {name: _array(array, sharding) for name, array in empty.items()}

    @property
    def _denominators(self) -> Denominators:
        number = jax.ShapeDtypeStruct((), jnp.float32)  # made on the host, as in the training loop
        return Denominators(number, number)  # type: ignore[arg-type]

    def _compile(self, function: Any, *arguments: Any, rows_per_device: int | None = None) -> Compiled:
        lowered = self._lower(function, *arguments)
        try:
            program, size = compile_and_measure(lowered, self._setup.mesh.devices.flat[0].platform)
        except jax.errors.JaxRuntimeError as error:
            return Compiled(_bytes_refused(error), 0, None)
        text = program.as_text()
        counts: Counter[str] = Counter()
        sizes: Counter[str] = Counter()
        for collective in collectives(text):
            counts[collective.kind] += collective.times
            sizes[collective.kind] += collective.times * collective.bytes
        activations = 0 if rows_per_device is None else self._activation_bytes(text, rows_per_device)
        return Compiled(size, activations, {kind: (counts[kind], sizes[kind]) for kind in counts})

    def _lower(self, function: Any, *arguments: Any) -> Any:
        with jax.set_mesh(self._setup.mesh):
            return function.lower(*arguments)

    def _activation_bytes(self, text: str, rows_per_device: int) -> int:
        """Returns the bytes that the layers' forward pass keeps.

        The layers are a loop, which keeps its values in stacked arrays: [layers, rows, length, ...]. A compiler may let
        a round of the loop compute several layers.
        """
        rows = (rows_per_device, self._step_plan.shape.length)
        model = self._setup.model.config
        layers = {n for n in range(1, model.num_layers + 1) if model.num_layers % n == 0}

        loops = (
            sum(
                array_bytes(dtype, shape)
                for dtype, shape in arrays
                if len(shape) > 3 and 0 < times <= shape[0] in layers and shape[1:3] == rows
            )
            for times, arrays in loop_states(text)
        )
        return max(loops, default=0)


def measure_step(setup: TopologySetup, console: Console, *, search: bool, save: Callable[[HardwarePlan], None]) -> None:
    """Compiles a config's step for its topology and measures it.

    Args:
        setup: the config's setup on the topology.
        console: the console for progress.
        search: look for the largest micro-batch that fits.
        save: called with the hardware plan. With `search` it is first called with a plan that lacks the largest
            micro-batch, because the compiler may break off during the search.
    """
    config, model, mesh = setup.config, setup.model, setup.mesh
    model.shardings(mesh)  # raises for a mesh that does not divide the model, before the pairs are tokenised
    pairs = setup.train_pairs()
    step_plan = setup.step_plan(pairs, batch=setup.global_batch_size(), seed=config.seed)
    packing = measure(step_plan)
    console.print(setup.packing_lines("training", step_plan, packing))
    micro_batches = packing.rows / step_plan.rows_per_micro_batch
    rows = step_plan.rows_per_micro_batch // setup.data_parallel
    rows_of_a_step = math.ceil(packing.rows * (1 - packing.empty_rows) / setup.data_parallel)
    most = max(rows, rows_of_a_step)

    programs = Programs(setup, step_plan, accumulates=micro_batches > 1)
    update = programs.update()
    compiled: dict[int, Compiled] = {}

    def memory(rows_per_device: int) -> Memory:
        if rows_per_device not in compiled:
            console.print(f"compiling a micro-batch of {rows_per_device} row(s) a device for {setup.topology}")
            compiled[rows_per_device] = programs.micro_batch(rows_per_device)
        return programs.memory(compiled[rows_per_device], rows_per_device, update)

    configured_memory = memory(rows)
    capacity = setup.device_memory
    lengths, step_pairs = step_plan.lengths, min(step_plan.global_batch_size, len(step_plan.lengths))
    tokens = {
        name: round(float(lengths.row_tokens(sharing).mean()) * step_pairs)
        for name, sharing in (("separate", False), ("shared", True))
    }
    work = work_of(lengths, config.prefix_sharing)
    traffic = compiled[rows].traffic
    notes = []
    if traffic is None:
        notes.append("the compiler refused the program because it does not fit, so its collectives cannot be read")
    plan = HardwarePlan(
        topology=str(setup.topology),
        devices=mesh.size,
        device_kind=mesh.devices.flat[0].device_kind,
        mesh=dict(mesh.shape),
        attention=setup.attention,
        row=vars(step_plan.shape),
        rows_per_device=rows,
        micro_batches_per_step=micro_batches,
        pairs_per_step=step_pairs,
        longest_pair=-(-int(lengths.row_tokens(config.prefix_sharing).max()) // ROW_MULTIPLE) * ROW_MULTIPLE,
        settings={name: getattr(config, name) for name in ("remat", "dtype", "prefix_sharing", "max_length")},
        capacity=capacity,
        memory=configured_memory,
        flops_per_step=useful_flops(model.config, work) * step_pairs / len(lengths),
        collectives={} if traffic is None else _step_traffic(traffic, micro_batches, update.traffic or {}),
        tokens_per_step=tokens,
        largest_rows_per_device=None,
        most_rows_per_device=most,
        notes=notes,
    )
    if search:
        save(replace(plan, notes=[*notes, "the compiler broke off while the largest micro-batch was looked for"]))
        plan = replace(plan, largest_rows_per_device=_largest(lambda n: memory(n).total, rows, most, capacity))
    save(plan)


def _bytes_refused(error: Exception) -> int:
    """Reads the bytes of a program from the message with which a TPU's compiler refused it for its size."""
    pattern = r"Ran out of memory (?:in memory space hbm\. Used |on HBM, .*? for HLO temporaries \()([\d.]+)([KMGT])"
    used = re.search(pattern, str(error))
    if used is None:
        raise error
    return int(float(used[1]) * _UNITS[used[2]])


def _step_traffic(
    micro_batch: Mapping[str, tuple[int, int]], times: float, update: Mapping[str, tuple[int, int]]
) -> dict[str, Traffic]:
    """Adds up the collectives of `times` micro-batches and an update, by kind."""
    none = (0, 0)
    kinds = dict.fromkeys([*micro_batch, *update])
    return {
        kind: Traffic(
            *(round(times * a + b) for a, b in zip(micro_batch.get(kind, none), update.get(kind, none), strict=True))
        )
        for kind in kinds
    }


def _largest(total: Callable[[int], int], start: int, most: int, capacity: int) -> int:
    """Returns the largest number of rows that was tried and fits; 0 if none fits.

    Each try is a compilation, so the result is never extrapolated. Memory grows by almost the same amount with every
    row, so the next number to try is where the line through the two sizes nearest to the capacity meets it.

    Args:
        total: returns the bytes of a micro-batch of so many rows per device.
        start: the first number of rows to try.
        most: the largest useful number of rows.
        capacity: bytes of memory per device.
    """
    sizes = {start: total(start)}
    for _ in range(_COMPILATIONS):
        fitting = [n for n, size in sizes.items() if size <= capacity]
        low = max(fitting, default=0)
        high = min((n for n in sizes if n not in fitting), default=most + 1)
        if high - low <= 1:
            break
        if len(sizes) == 1:
            guess = 2 * start if fitting else 1
        else:
            (a, size_a), (b, size_b) = sorted(sizes.items(), key=lambda item: abs(item[1] - capacity))[:2]
            slope = max(1.0, (size_b - size_a) / (b - a))
            guess = a + math.floor((capacity - size_a) / slope)
        guess = min(max(guess, low + 1), high - 1)
        sizes[guess] = total(guess)
    return max((n for n, size in sizes.items() if size <= capacity), default=0)


def _array(like: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=sharding)


def _placed(tree: Any, shardings: Any) -> Any:
    """Describes the arrays of a tree with their shardings."""
    return jax.tree.map(_array, tree, shardings)


def _local_bytes(tree: Any) -> int:
    """Returns the bytes of a tree's arrays on each device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
