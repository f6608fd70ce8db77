"""Examines the machine, and shows what was found as tables or as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from jax_simpo.config import TrainConfig
from jax_simpo.doctor.facts import Facts, gather_facts
from jax_simpo.doctor.findings import Finding, find
from jax_simpo.doctor.measure import Peaks, measure_peaks
from jax_simpo.errors import ConfigError
from jax_simpo.ops.attention import BACKENDS
from jax_simpo.ops.attention.backends import load_backend, variants_of
from jax_simpo.ops.attention.choice import candidates, place_of
from jax_simpo.ops.attention.evidence import Shape, Verdict, told
from jax_simpo.ops.loss_head.backends import BACKENDS as HEAD_BACKENDS
from jax_simpo.ops.loss_head.backends import load_backend as load_head_backend
from jax_simpo.ops.loss_head.evidence import HeadShape
from jax_simpo.training import loss_head, verdicts
from jax_simpo.training.attention import work_of
from jax_simpo.training.backend_choice import choose_fastest
from jax_simpo.training.compilation import keep_compiled_programs
from jax_simpo.training.setup import Setup

# What is tried where no config is given: the shapes of an 8B model on an accelerator, small ones on a CPU.
_LARGE = Shape("bfloat16", 32, 8, 128, (None,), 128**-0.5, None, 1, 8192, remainder=128)
_LARGE_HEAD = HeadShape("bfloat16", states=4096, width=4096, vocabulary=128256, softcap=None)
_SMALL = Shape("float32", 8, 2, 64, (None,), 64**-0.5, None, 1, 1024, remainder=128)
_SMALL_HEAD = HeadShape("float32", states=512, width=512, vocabulary=32000, softcap=None)
_CPU_STATES = 128  # of a config's loss head, whose width and dtype stay
_LONGEST_DENSE = 4096  # tokens of a row; `dense` holds all scores at once, and longer rows would not fit


@dataclass(frozen=True)
class Examination:
    """All that an examination found.

    Attributes:
        facts: what is here.
        findings: what to mend, errors first.
        shape: of the attention that was tried.
        shortened: what of the config's shapes was too large to try here, in words; empty if nothing was.
        peaks: the most that the chip did.
        attention: a verdict on every backend that can run here, and on its variants (`pallas+overlap`).
        obstacles: by name of each other backend, why it cannot.
        chosen: the backend that `attention: auto` takes here; None where none is right.
        reason: why it takes that one, or why none.
        head_shape: of the loss head that was tried.
        heads: a verdict on every backend of the loss head that can run here.
        head_obstacles: by name of each other one, why it cannot.
        head_chosen: the backend that `loss_head: auto` takes here; None where none is right.
        head_reason: why it takes that one, or why none.
    """

    facts: Facts
    findings: Sequence[Finding]
    shape: Shape
    shortened: str
    peaks: Peaks
    attention: Sequence[Verdict]
    obstacles: dict[str, str]
    chosen: str | None
    reason: str
    head_shape: HeadShape
    heads: Sequence[Verdict]
    head_obstacles: dict[str, str]
    head_chosen: str | None
    head_reason: str

    @property
    def healthy(self) -> bool:
        """False if something stops a run here or spoils it."""
        errors = any(finding.level == "error" for finding in self.findings)
        return self.chosen is not None and self.head_chosen is not None and not errors

    def to_json(self) -> dict[str, Any]:
        """Returns everything as JSON's types, sizes in bytes and times in seconds; what is not finite is null."""
        content: dict[str, Any] = _finite({**asdict(self), "healthy": self.healthy})
        return content


def _finite(value: Any) -> Any:
    """Replaces numbers that JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def examine_machine(config: TrainConfig | None, console: Console) -> Examination:
    """Examines the machine for a config, or for the shapes of an 8B model (on a CPU: small ones).

    Args:
        config: its model gives the shapes; None takes the default ones.
        console: says what is being measured.
    """
    keep_compiled_programs()
    facts = gather_facts()
    if not facts.devices:
        advice = " ".join(f"{finding.text}. {finding.advice}." for finding in find(facts))
        raise ConfigError(f"JAX cannot use its devices: {facts.device_kind}. {advice}")
    shape, head_shape, shortened = _shapes(config, facts)
    device = jax.local_devices()[0]
    console.print("measuring the peaks of the chip")
    try:
        peaks = measure_peaks(facts.platform, shape.dtype)
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(
            f"a product of two matrices {told(error)}. Another process may hold the device's memory (`nvidia-smi`)"
        ) from error
    place = place_of(device, dtype=shape.dtype, head_dim=shape.head_dim, softcap=shape.softcap)
    obstacles: dict[str, str] = {}
    tried: list[Verdict] = []
    for name in BACKENDS:
        if obstacle := load_backend(name).obstacle(place):
            obstacles[name] = obstacle
            continue
        console.print(f"trying attention: {name}")
        own = shape
        if name == "dense":  # it has no blocks
            own = replace(shape, row_length=min(shape.row_length, _LONGEST_DENSE), remainder=0)
        names = [name, *(f"{name}+{variant}" for variant in variants_of(name))]
        tried += verdicts.of_backends(names, own, device, anew=True)
    heads, head_obstacles = _try_heads(head_shape, device, console)
    preferred = candidates(place).reasons
    in_question = [verdict for verdict in tried if verdict.backend in preferred]
    chosen, reason = _choose("attention", in_question, device, work_of(shape))
    head_chosen, head_reason = _choose("loss_head", heads, device, loss_head.work_of(head_shape))
    findings = [*find(facts), *_of_verdicts(tried, preferred), *_of_heads(heads, head_chosen)]
    return Examination(
        facts,
        findings,
        shape,
        shortened,
        peaks,
        tried,
        obstacles,
        chosen,
        reason,
        head_shape,
        heads,
        head_obstacles,
        head_chosen,
        head_reason,
    )


def _try_heads(shape: HeadShape, device: jax.Device, console: Console) -> tuple[list[Verdict], dict[str, str]]:
    """Tries the backends of the loss head; returns their verdicts, and by name of the others why they cannot run."""
    place = loss_head.head_place(shape, device)
    obstacles = {name: load_head_backend(name).obstacle(place, shape.width) for name in HEAD_BACKENDS}
    tried = []
    for name in [name for name, obstacle in obstacles.items() if obstacle is None]:
        console.print(f"trying the loss head: {name}")
        tried += verdicts.of_loss_heads([name], shape, device, anew=True)
    return tried, {name: obstacle for name, obstacle in obstacles.items() if obstacle is not None}


def _choose(key: str, tried: Sequence[Verdict], device: jax.Device, work: str) -> tuple[str | None, str]:
    """Returns what `auto` takes, and why; None where no backend is right."""
    try:
        choice = choose_fastest(key, tried, device, work)
    except ConfigError as error:
        return None, str(error)
    return choice.backend, choice.reason


def _shapes(config: TrainConfig | None, facts: Facts) -> tuple[Shape, HeadShape, str]:
    """Returns the shapes to try, and what was shortened for a CPU, which would take long for those of a large model."""
    if config is None:
        return *((_SMALL, _SMALL_HEAD) if facts.platform == "cpu" else (_LARGE, _LARGE_HEAD)), ""
    setup = Setup(config, any_mesh=True)
    shape, head = setup.attention_shape(), loss_head.shape_of(setup.model, setup.mesh)
    if facts.platform != "cpu":
        return shape, head, ""
    small = replace(shape, rows=1, row_length=min(shape.row_length, _SMALL.row_length))
    vocabulary = min(head.vocabulary, _SMALL_HEAD.vocabulary)
    small_head = replace(head, states=min(head.states, _CPU_STATES), vocabulary=vocabulary)
    if (small, small_head) == (shape, head):
        return shape, head, ""
    words = (
        f"shortened for a CPU from {shape.rows} x {shape.row_length} tokens, "
        f"the loss head from {head.states} states x {head.vocabulary}"
    )
    return small, small_head, words


def _of_verdicts(tried: Sequence[Verdict], preferred: Mapping[str, str]) -> list[Finding]:
    """Turns what is wrong on the chip into findings."""
    found = []
    for verdict in tried:
        if verdict.problem is None:
            continue
        use = (
            "`attention: auto` passes it over" if verdict.backend in preferred else "No run takes it unless you name it"
        )
        if "RESOURCE_EXHAUSTED" in verdict.problem:
            advice = f"{use}. The device has too little memory for it here"
        else:
            advice = f"{use}. Please report it, with what this command prints with --json"
        found.append(Finding("warning", f"attention: {verdict.backend} {verdict.problem}", advice))
    return found


def _of_heads(tried: Sequence[Verdict], chosen: str | None) -> list[Finding]:
    """Turns what is wrong with the loss head into findings."""
    use = "Try another version of jax" if chosen is None else "`loss_head: auto` passes it over"
    advice = f"{use}. Please report it, with what this command prints with --json"
    return [
        Finding("error" if chosen is None else "warning", f"loss head: {verdict.backend} {verdict.problem}", advice)
        for verdict in tried
        if verdict.problem is not None
    ]


def show(examination: Examination, console: Console) -> None:
    """Prints an examination."""
    facts, shape, peaks = examination.facts, examination.shape, examination.peaks
    memory = "" if facts.device_memory is None else f" with {facts.device_memory / 2**30:.1f} GiB for JAX"
    host = f"{facts.cores} cores, {facts.host_memory / 2**30:.1f} GiB"
    lines = [
        ("device", f"{facts.devices} x {facts.device_kind} ({facts.platform}){memory}"),
        ("host", f"{host}; {facts.cores / facts.devices:.3g} cores a device"),
        ("driver", facts.nvidia_driver or "no NVIDIA driver"),
        ("Python", facts.python),
        ("packages", ", ".join(f"{name} {version}" for name, version in facts.versions.items())),
        ("settings", ", ".join(f"{name}={value}" for name, value in facts.environment.items()) or "none"),
        ("XLA options", ", ".join(f"{name}={value}" for name, value in facts.xla_options.items()) or "none"),
        ("compiled programs", facts.compilation_cache or "not kept"),
        (
            "peaks",
            f"{peaks.tflops:.4g} TFLOP/s of a product in {shape.dtype}, copies {peaks.copy_gb_per_second:.4g} GB/s",
        ),
    ]
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, text in lines:
        table.add_row(name, text)
    console.print(table)
    console.print()
    for line in _shape_lines(shape, examination.shortened):
        console.print(line)
    _show_tried(examination.attention, examination.obstacles, peaks, console)
    _show_chosen("attention", examination.chosen, examination.reason, console)
    head = examination.head_shape
    console.print(f"The loss head, forward and backward, on {head.states} states x {head.width} x {head.vocabulary}")
    console.print(f"({head.dtype}, soft cap: {head.softcap or 'none'}):")
    _show_tried(examination.heads, examination.head_obstacles, peaks, console)
    _show_chosen("loss head", examination.head_chosen, examination.head_reason, console)
    styles = {"error": "red", "warning": "yellow", "note": ""}
    for finding in examination.findings:
        console.print(f"{finding.level}: {finding.text}. {finding.advice}.", style=styles[finding.level])
    if not examination.findings:
        console.print("nothing to mend", style="green")


def _show_tried(tried: Sequence[Verdict], obstacles: Mapping[str, str], peaks: Peaks, console: Console) -> None:
    console.print(_table(tried, peaks))
    for name, obstacle in obstacles.items():
        console.print(f"{name} cannot run here: it {obstacle}")
    console.print()


def _show_chosen(name: str, chosen: str | None, reason: str, console: Console) -> None:
    if chosen is None:
        console.print(reason, style="red")
    else:
        console.print(f"{name}: {chosen} ({reason})")
    console.print()


def _shape_lines(shape: Shape, shortened: str) -> list[str]:
    windows = ", ".join("none" if window is None else str(window) for window in shape.windows)
    return [
        f"Attention of a layer, forward and backward, on {shape.rows} x {shape.row_length} tokens of packed pairs",
        f"({shape.heads}/{shape.kv_heads} heads of {shape.head_dim} in {shape.dtype}, window: {windows}, "
        f"soft cap: {shape.softcap or 'none'}; {shortened or f'dense on at most {_LONGEST_DENSE} tokens'}):",
    ]


def _table(tried: Sequence[Verdict], peaks: Peaks) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("backend", "numbers"):
        table.add_column(heading, style="bold" if heading == "backend" else "", no_wrap=True)
    for heading in ("off by", "forward", "both", "TFLOP/s", "of peak", "memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    for verdict in tried:
        error = max((distance.mean for distance in verdict.distances.values()), default=None)
        numbers = "right" if verdict.problem is None else "not to be used"
        cells = [verdict.backend, numbers, "" if error is None else f"{error:.1e}"]
        if (speed := verdict.speed) is not None:
            cells += [_milliseconds(speed.forward_seconds), _milliseconds(speed.seconds), f"{speed.tflops:.3g}"]
            cells += [f"{100 * speed.tflops / peaks.tflops:.3g} %", f"{speed.temporary_bytes / 2**20:.4g} MiB"]
        table.add_row(*cells)
    return table


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
