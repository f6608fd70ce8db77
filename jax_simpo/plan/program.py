"""Compiles the step of a config for devices that compute nothing, and reads from the programs what they take.

What is on a device, and when (P parameters, O optimizer state, G the step's sum of gradients):

* first micro-batch of a step: P and O, and it makes G;
* every later one: P, O and G, and beside them its own gradient before it is added;
* the update: P, O and G, of which P and O are replaced in place.

O is no argument of the first two programs but stays where it is. The largest of the three sums, each with the
program's temporaries, is what the step needs. The first two programs differ by G alone, so only one is compiled: the
later one's, or the first one's where no step has a second micro-batch.
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
from jax_simpo.plan.allocations import compile_and_measure
from jax_simpo.plan.flops import useful_flops, work_of
from jax_simpo.plan.hlo import array_bytes, collectives, loop_states
from jax_simpo.plan.report import Memory, Plan, Traffic
from jax_simpo.plan.topology import Topology
from jax_simpo.sharding import make_mesh, named
from jax_simpo.train.optim import run_optimizer
from jax_simpo.train.pairs import packing_line
from jax_simpo.train.setup import Setup
from jax_simpo.train.step import Accumulated, Denominators, make_train_functions
from jax_simpo.train.trainer import count_steps

_COMPILATIONS = 4  # at most, beside that of the config itself, to find the largest micro-batch
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True)
class PlannedSetup(Setup):
    """A config's setup on a topology instead of the devices that are here."""

    topology: Topology = field(kw_only=True)

    @cached_property
    def mesh(self) -> jax.sharding.Mesh:
        return make_mesh(**self.config.mesh.model_dump(), devices=self.topology.devices())

    @cached_property
    def device_memory(self) -> int:
        return self.topology.memory


@dataclass(frozen=True)
class Compiled:
    """One program on one device.

    Attributes:
        bytes: its arguments, results and temporaries and the program itself; what is both argument and result once.
        kept: of its temporaries, what the layers' forward pass keeps for their backward pass.
        traffic: how often each kind of collective runs and the bytes of its arrays; None where the compiler refused
            the program for its size.
    """

    bytes: int
    kept: int
    traffic: dict[str, tuple[int, int]] | None


class Programs:
    """The programs of a config's steps. Nothing of their arrays is ever made."""

    def __init__(self, setup: Setup, plan: StepPlan, *, several: bool) -> None:
        self._setup, self._plan, self._several = setup, plan, several
        mesh, model = setup.mesh, setup.model
        _, optimizer = run_optimizer(setup.config, count_steps(setup.config, plan))
        self._functions: Any = make_train_functions(setup.training_forward, setup.objective, optimizer, mesh)
        self._params: Any = _placed(model.abstract, model.shardings(mesh))
        state = jax.eval_shape(self._functions.init_optimizer, model.abstract)
        self._state = _placed(state, self._functions.optimizer_shardings)
        accumulate = self._functions.accumulate
        started = self._lower(accumulate, self._params, None, self._rows(1), self._denominators).out_info
        # Gradients lie where their parameters do; there are none of parameters that are frozen.
        where = dict(jax.tree_util.tree_leaves_with_path(self._params))
        gradients = jax.tree_util.tree_map_with_path(lambda path, _: where[path], started.gradients)
        everywhere = NamedSharding(mesh, P())
        metrics = {name: _array(info, everywhere) for name, info in started.metrics.items()}
        self._so_far = Accumulated(gradients, metrics)

    @property
    def parameters(self) -> int:
        """Bytes of parameters on each device."""
        return _local_bytes(self._params)

    @property
    def optimizer(self) -> int:
        """Bytes of optimizer state on each device."""
        return _local_bytes(self._state)

    @property
    def gradients(self) -> int:
        """Bytes of the step's gradients on each device."""
        return _local_bytes(self._so_far.gradients)

    def rows(self, rows_per_device: int) -> int:
        """Bytes of a micro-batch's arrays on each device."""
        return _local_bytes(self._rows(rows_per_device))

    def micro_batch(self, rows_per_device: int) -> Compiled:
        """The program of a micro-batch of so many rows a device."""
        so_far = self._so_far if self._several else None
        arguments = (self._params, so_far, self._rows(rows_per_device), self._denominators)
        return self._compile(self._functions.accumulate, *arguments, rows_per_device=rows_per_device)

    def update(self) -> Compiled:
        """The program that ends a step."""
        return self._compile(self._functions.update, self._params, self._state, self._so_far.gradients)

    def memory(self, micro_batch: Compiled, rows_per_device: int, update: Compiled) -> Memory:
        """What is on a device when most is."""
        rows = self.rows(rows_per_device)
        in_micro_batch = micro_batch.bytes + self.optimizer
        held = self.parameters + self.optimizer + self.gradients
        kept = micro_batch.kept if in_micro_batch >= update.bytes else 0
        working = max(in_micro_batch, update.bytes) - held - rows - kept
        return Memory(self.parameters, self.optimizer, rows, self.gradients, kept, max(0, working))

    def _rows(self, rows_per_device: int) -> dict[str, jax.ShapeDtypeStruct]:
        empty = RowBatch.empty(rows_per_device * self._setup.data_parallel, self._plan.shape).arrays()
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
            return Compiled(_refused(error), 0, None)
        text = program.as_text()
        counts: Counter[str] = Counter()
        sizes: Counter[str] = Counter()
        for collective in collectives(text):
            counts[collective.kind] += collective.times
            sizes[collective.kind] += collective.times * collective.bytes
        kept = 0 if rows_per_device is None else self._kept(text, rows_per_device)
        return Compiled(size, kept, {kind: (counts[kind], sizes[kind]) for kind in counts})

    def _lower(self, function: Any, *arguments: Any) -> Any:
        with jax.set_mesh(self._setup.mesh):
            return function.lower(*arguments)

    def _kept(self, text: str, rows_per_device: int) -> int:
        """The layers are a loop, and what it keeps of each layer is stacked: [layers, rows, length, ...]."""
        rows = (rows_per_device, self._plan.shape.length)
        model = self._setup.model.config
        layers = {n for n in range(1, model.num_layers + 1) if model.num_layers % n == 0}

        loops = (
            sum(
                array_bytes(dtype, shape)
                for dtype, shape in arrays
                if len(shape) > 3 and shape[0] == times in layers and shape[1:3] == rows
            )
            for times, arrays in loop_states(text)
        )
        return max(loops, default=0)


def plan_step(setup: PlannedSetup, console: Console, *, search: bool, keep: Callable[[Plan], None]) -> None:
    """Compiles a config's step for its topology and measures it.

    Args:
        setup: the config's things.
        console: where progress goes.
        search: look for the largest micro-batch that fits.
        keep: is given the plan; with `search` first one without what is searched for, for a compiler may break off.
    """
    config, model, mesh = setup.config, setup.model, setup.mesh
    model.shardings(mesh)  # a mesh that does not divide the model is told before the pairs are tokenised
    pairs = setup.train_pairs()
    steps = setup.step_plan(pairs, batch=setup.global_batch_size(), seed=config.seed)
    report = measure(steps)
    console.print(packing_line("training", steps, report))
    micro_batches = report.rows / steps.rows_per_micro_batch
    rows = config.rows_per_device
    needed = math.ceil(report.rows * (1 - report.empty_rows) / setup.data_parallel)
    most = max(rows, needed)

    programs = Programs(setup, steps, several=micro_batches > 1)
    update = programs.update()
    compiled: dict[int, Compiled] = {}

    def memory(rows_per_device: int) -> Memory:
        if rows_per_device not in compiled:
            console.print(f"compiling a micro-batch of {rows_per_device} row(s) a device for {setup.topology}")
            compiled[rows_per_device] = programs.micro_batch(rows_per_device)
        return programs.memory(compiled[rows_per_device], rows_per_device, update)

    found = memory(rows)
    capacity = setup.device_memory
    lengths, step_pairs = steps.lengths, min(steps.global_batch_size, len(steps.lengths))
    tokens = {
        name: round(float(lengths.row_tokens(sharing).mean()) * step_pairs)
        for name, sharing in (("separate", False), ("shared", True))
    }
    work = work_of(lengths, config.prefix_sharing)
    traffic = compiled[rows].traffic
    notes = []
    if traffic is None:
        notes.append("the compiler gave no program, for it would not fit: no collectives can be read from it")
    plan = Plan(
        topology=str(setup.topology),
        devices=mesh.size,
        device_kind=mesh.devices.flat[0].device_kind,
        mesh=dict(mesh.shape),
        attention=setup.attention,
        row=vars(steps.shape),
        rows_per_device=rows,
        micro_batches_per_step=micro_batches,
        pairs_per_step=step_pairs,
        longest_pair=-(-int(lengths.row_tokens(config.prefix_sharing).max()) // ROW_MULTIPLE) * ROW_MULTIPLE,
        settings={name: getattr(config, name) for name in ("remat", "dtype", "prefix_sharing", "max_length")},
        capacity=capacity,
        memory=found,
        flops_per_step=useful_flops(model.config, work) * step_pairs / len(lengths),
        collectives={} if traffic is None else _of_a_step(traffic, micro_batches, update.traffic or {}),
        tokens_per_step=tokens,
        largest_rows_per_device=None,
        most_rows_per_device=most,
        notes=notes,
    )
    if search:
        keep(replace(plan, notes=[*notes, "the compiler broke off while the largest micro-batch was looked for"]))
        plan = replace(plan, largest_rows_per_device=_largest(lambda n: memory(n).total, rows, most, capacity))
    keep(plan)


def _refused(error: Exception) -> int:
    """Bytes of a program that a TPU's compiler refused because it takes more than the chip has, as its message says."""
    says = r"Ran out of memory (?:in memory space hbm\. Used |on HBM, .*? for HLO temporaries \()([\d.]+)([KMGT])"
    used = re.search(says, str(error))
    if used is None:
        raise error
    return int(float(used[1]) * _UNITS[used[2]])


def _of_a_step(
    micro_batch: Mapping[str, tuple[int, int]], times: float, update: Mapping[str, tuple[int, int]]
) -> dict[str, Traffic]:
    none = (0, 0)
    kinds = dict.fromkeys([*micro_batch, *update])
    return {
        kind: Traffic(
            *(round(times * a + b) for a, b in zip(micro_batch.get(kind, none), update.get(kind, none), strict=True))
        )
        for kind in kinds
    }


def _largest(total: Callable[[int], int], start: int, most: int, capacity: int) -> int:
    """The largest number of rows whose total fits, of those that were tried: nothing is claimed that was not compiled.

    Memory grows by the same amount with every row, nearly: the next number to try is where the line through the two
    nearest sizes known meets the capacity.
    """
    known = {start: total(start)}
    for _ in range(_COMPILATIONS):
        fitting = [n for n, size in known.items() if size <= capacity]
        low = max(fitting, default=0)
        high = min((n for n in known if n not in fitting), default=most + 1)
        if high - low <= 1:
            break
        if len(known) == 1:
            guess = 2 * start if fitting else 1
        else:
            (a, size_a), (b, size_b) = sorted(known.items(), key=lambda item: abs(item[1] - capacity))[:2]
            slope = max(1.0, (size_b - size_a) / (b - a))
            guess = a + math.floor((capacity - size_a) / slope)
        guess = min(max(guess, low + 1), high - 1)
        known[guess] = total(guess)
    return max((n for n, size in known.items() if size <= capacity), default=0)


def _array(like: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=sharding)


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(_array, tree, shardings)


def _local_bytes(tree: Any) -> int:
    """Bytes of a tree's arrays on each device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
