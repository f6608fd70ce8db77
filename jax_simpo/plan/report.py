"""Holds a hardware plan, and shows it as JSON, as tables, and as advice if the step does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

_GIB = 1 << 30


@dataclass(frozen=True)
class Memory:
    """Bytes on each device at the peak of a step.

    Attributes:
        parameters: float32 master weights.
        optimizer: AdamW's moments.
        rows: the arrays of a micro-batch.
        gradients: the step's sum of gradients.
        activations: values that the layers' forward pass keeps for the backward pass.
        working: everything else: gathered parameters, the micro-batch's own gradient, logits, workspace, the program.
    """

    parameters: int
    optimizer: int
    rows: int
    gradients: int
    activations: int
    working: int

    @property
    def arguments(self) -> int:
        """Bytes that a step starts with: parameters, optimizer state, rows."""
        return self.parameters + self.optimizer + self.rows

    @property
    def temporaries(self) -> int:
        """Bytes that exist only during a step."""
        return self.gradients + self.activations + self.working

    @property
    def total(self) -> int:
        """All bytes."""
        return self.arguments + self.temporaries


@dataclass(frozen=True)
class Traffic:
    """The collectives of one kind that each device takes part in during one step.

    Attributes:
        count: how many collectives run.
        bytes: bytes of their complete arrays, see `jax_simpo.plan.hlo.Collective`.
    """

    count: int
    bytes: int


@dataclass(frozen=True)
class HardwarePlan:
    """The memory, collectives and operations of a config's step on a topology.

    Attributes:
        topology: the topology's name, such as `v5p:2x2x4`.
        devices: number of devices of the topology.
        device_kind: the devices' name in jax.
        mesh: number of devices along each axis.
        attention: the implementation that the config resolves to on these devices.
        row: length, targets and responses of a row.
        rows_per_device: rows of a micro-batch on each device, as configured or chosen.
        micro_batches_per_step: mean over the first epoch's steps.
        pairs_per_step: pairs of a step.
        longest_pair: tokens of the longest pair, rounded up to a row length.
        settings: the config's settings that memory depends on.
        capacity: bytes of memory a program may use on each device.
        memory: bytes used on each device.
        flops_per_step: useful floating-point operations, over all devices.
        collectives: collectives of a step by kind; empty if the compiler refused the program because of its size.
        tokens_per_step: input tokens of a step's pairs, `separate` and with `shared` prefixes.
        largest_rows_per_device: rows of the largest micro-batch that fits; 0 if none fits, None without search.
        most_rows_per_device: the rows with which the whole step is one micro-batch.
        notes: sentences for the user.
    """

    topology: str
    devices: int
    device_kind: str
    mesh: dict[str, int]
    attention: str
    row: dict[str, int]
    rows_per_device: int
    micro_batches_per_step: float
    pairs_per_step: float
    longest_pair: int
    settings: dict[str, Any]
    capacity: int
    memory: Memory
    flops_per_step: float
    collectives: dict[str, Traffic]
    tokens_per_step: dict[str, int]
    largest_rows_per_device: int | None
    most_rows_per_device: int
    notes: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """True if the step as configured fits each device."""
        return self.memory.total <= self.capacity

    def to_json(self) -> dict[str, Any]:
        """Returns all values in a form that JSON can hold; `from_json` reads it back."""
        memory = self.memory
        return {
            **asdict(self),
            "fits": self.fits,
            "bytes_per_device": {
                "arguments": memory.arguments,
                "temporaries": memory.temporaries,
                "total": memory.total,
                "capacity": self.capacity,
            },
            "advice": self.advice(),
        }

    @staticmethod
    def from_json(values: dict[str, Any]) -> HardwarePlan:
        """Makes a hardware plan from the result of `to_json`."""
        fields = {name: value for name, value in values.items() if name in HardwarePlan.__dataclass_fields__}
        fields["memory"] = Memory(**fields["memory"])
        fields["collectives"] = {kind: Traffic(**traffic) for kind, traffic in fields["collectives"].items()}
        return HardwarePlan(**fields)

    def advice(self) -> list[str]:
        """Returns the settings to change, the most effective first; an empty list if the step fits."""
        return [] if self.fits else list(self._advice())

    def _advice(self) -> Iterator[str]:
        memory, settings, mesh = self.memory, self.settings, self.mesh
        state = memory.parameters + memory.optimizer + memory.gradients
        shards = mesh["fsdp"] * mesh["tensor"]
        if state > self.capacity:
            yield (
                f"parameters, optimizer state and gradients alone take {gib(state)} of the {gib(self.capacity)} of a "
                f"device: split them over more devices than {shards} (`mesh.fsdp`, `mesh.tensor`)"
                f"{'; move devices there from `mesh.data`' if mesh['data'] > 1 else ', on a larger topology'}"
            )
        elif mesh["data"] > 1:
            saved = state - state * shards // self.devices
            yield f"`mesh.data: 1` and the devices on `mesh.fsdp`: saves {gib(saved)} of state on each device"
        elif state > self.capacity // 2:
            yield (
                f"a larger topology: parameters, optimizer state and gradients, split over {shards} devices, take "
                f"{gib(state)} of each"
            )
        if self.largest_rows_per_device:
            yield f"`rows_per_device: {self.largest_rows_per_device}` instead of {self.rows_per_device}: compiled, fits"
        elif self.rows_per_device > 1:
            yield f"`rows_per_device: 1` instead of {self.rows_per_device}: the same step in more micro-batches"
        if settings["remat"] != "full":
            yield f"`remat: full` instead of {settings['remat']}: keeps one activation a layer, computes forward twice"
        if self.longest_pair < self.row["length"]:
            yield (
                f"`row_length: {self.longest_pair}` instead of {self.row['length']}: the longest pair needs no more; "
                "activations shrink in proportion"
            )
        if settings["dtype"] == "float32":
            yield "`dtype: bfloat16`: halves activations and gathered parameters"
        if mesh["tensor"] == 1:
            yield "`mesh.tensor: 2` or more: splits heads, feed-forward width and vocabulary of every row too"
        if state > self.capacity // 2:
            yield "`use_peft: true`: only adapters have gradients and optimizer state"
        if self.longest_pair >= self.row["length"]:
            yield f"a lower `max_length` than {settings['max_length']}: the longest pair sets the length of the rows"


def gib(size: float) -> str:
    """Formats bytes as GiB, or as MiB if they are few."""
    return f"{size / _GIB:.2f} GiB" if size >= _GIB / 100 else f"{size / (1 << 20):.2f} MiB"


def show(plan: HardwarePlan, console: Console) -> None:
    """Prints a hardware plan as tables, with advice if the step does not fit."""
    shape = " x ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    title = f"{plan.topology}: {plan.devices} x {plan.device_kind}, {shape}"
    console.print(Rule(Text(title, style="bold"), align="left", style="dim"))
    _show_memory(plan, console)
    _show_step(plan, console)
    if plan.collectives:
        _show_collectives(plan, console)
    for note in plan.notes:
        console.print(Text(f"note: {note}", style="yellow"))
    verdict = f"fits: {gib(plan.memory.total)} of {gib(plan.capacity)} on each device"
    if plan.fits:
        console.print(Text(verdict, style="bold green"))
        return
    verdict = f"does not fit: {gib(plan.memory.total)} needed, {gib(plan.capacity)} available"
    console.print(Text(verdict, style="bold red"))
    for advice in plan.advice():
        console.print(Text(f"  - {advice}"))


def _show_memory(plan: HardwarePlan, console: Console) -> None:
    memory = plan.memory
    table = _table("memory of a device", "", "share")
    parts = {
        "parameters": memory.parameters,
        "optimizer state": memory.optimizer,
        "rows": memory.rows,
        "gradients": memory.gradients,
        "activations kept for the backward pass": memory.activations,
        "other temporaries": memory.working,
    }
    for name, size in parts.items():
        table.add_row(name, gib(size), f"{size / plan.capacity:.1%}")
    table.add_section()
    table.add_row("total", gib(memory.total), f"{memory.total / plan.capacity:.1%}", style="bold")
    table.add_row("available", gib(plan.capacity), "")
    console.print(table)


def _show_step(plan: HardwarePlan, console: Console) -> None:
    tokens = plan.tokens_per_step
    saved = 1 - tokens["shared"] / tokens["separate"]
    off = "" if plan.settings["prefix_sharing"] else " (`prefix_sharing` is off in this config)"
    row = plan.row
    facts = {
        "step": f"{plan.pairs_per_step:.4g} pairs in {plan.micro_batches_per_step:.3g} micro-batch(es) of "
        f"{plan.rows_per_device} row(s) a device",
        "row": f"{row['length']} tokens, {row['targets']} targets, {row['responses']} responses; "
        f"attention: {plan.attention}, remat: {plan.settings['remat']}",
        "tokens of a step": f"{tokens['separate']:,} separate, {tokens['shared']:,} shared: sharing saves "
        f"{saved:.1%}{off}",
        "FLOPs of a step": f"{plan.flops_per_step:.4g} useful (no padding, no recomputation), "
        f"{plan.flops_per_step / plan.devices:.4g} a device",
        "largest micro-batch": _largest(plan),
    }
    grid = Table.grid(padding=(0, 2))
    for label, value in facts.items():
        grid.add_row(Text(label, style="dim"), Text(value))
    console.print(grid)


def _largest(plan: HardwarePlan) -> str:
    rows = plan.largest_rows_per_device
    if rows is None:
        return "not looked for (--no-search)"
    if rows == 0:
        return "none fits"
    suffix = ": the whole step in one micro-batch" if rows >= plan.most_rows_per_device else ""
    return f"{rows} row(s) of {plan.row['length']} tokens a device (`rows_per_device: {rows}`){suffix}"


def _show_collectives(plan: HardwarePlan, console: Console) -> None:
    table = _table("collectives of a step", "count", "bytes")
    for kind, traffic in sorted(plan.collectives.items(), key=lambda item: -item[1].bytes):
        table.add_row(kind, f"{traffic.count:,}", gib(traffic.bytes))
    console.print(table)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table
