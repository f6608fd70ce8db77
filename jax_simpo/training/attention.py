"""Decides which attention backend a run takes: by trying them on the accelerator at hand, once per machine.

`auto` tries every candidate (`ops.attention.evidence`), passes over those that fail or compute wrong numbers, and takes
the fastest of the others. A backend that the config names is tried too, and refused if its numbers are wrong. What was
seen is kept in the user's cache folder (`verdicts.py`). On a CPU nothing is tried: there the tests compare the same
programs with the same oracle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import jax
from jax.sharding import Mesh

from jax_simpo.config import TrainConfig
from jax_simpo.data.packing import StepPlan
from jax_simpo.errors import ConfigError
from jax_simpo.models.transformer import Model
from jax_simpo.ops.attention.choice import candidates, choose, place_of
from jax_simpo.ops.attention.evidence import Shape, Verdict
from jax_simpo.ops.attention.mask import Room
from jax_simpo.processes import distributed
from jax_simpo.training import verdicts
from jax_simpo.training.capacity import least_rows

# The backends that need no trial on a kind of device: those that every change to this program is tested with there.
_KNOWN = {("CPU", "blockwise"), ("CPU", "dense")}
_TYPICAL_ROW = 8192  # tokens; rows to time backends on where there is no step plan and `row_length` is `auto`
_CLEARLY_FASTER = 0.97  # a backend that is less preferred must take less than this share of the time


@dataclass(frozen=True)
class AttentionChoice:
    """The backend of a run.

    Attributes:
        backend: its name.
        reason: why it was chosen, a phrase for the log.
        warnings: sentences about backends that were passed over.
    """

    backend: str
    reason: str
    warnings: Sequence[str] = ()


def shape_of(config: TrainConfig, model: Model, mesh: Mesh, longest_row: int, plan: StepPlan | None = None) -> Shape:
    """Returns the part of a run's shapes that its attention depends on.

    Lengths are rounded to powers of two, rows down and what is in them up, so that runs on similar data share what was
    seen.

    Args:
        config: the settings of the run.
        model: the model.
        mesh: the mesh, over whose `tensor` axis heads are split.
        longest_row: the longest row that fits into memory.
        plan: the step plan whose rows are computed; None takes typical ones.
    """
    sizes, tensor = model.config, mesh.shape["tensor"]
    if plan is None:
        rows, room = least_rows(config), None
        length = min(_TYPICAL_ROW, longest_row) if config.row_length == "auto" else config.row_length
    else:
        rows = plan.rows_per_micro_batch // (mesh.shape["data"] * mesh.shape["fsdp"])
        length = plan.shape.length
    length = max(128, 1 << max(length, 1).bit_length() - 1)
    if plan is not None:
        longest, span = (min(length, 1 << (n - 1).bit_length()) for n in (plan.longest, plan.span))
        room = Room(1 << (plan.shape.responses - 1).bit_length(), longest, span)
    return Shape(
        dtype=model.dtype.name,
        heads=sizes.num_heads // tensor,
        kv_heads=sizes.num_kv_heads // tensor,
        head_dim=sizes.head_dim,
        windows=sizes.windows,
        scale=sizes.query_pre_attn_scalar**-0.5,
        softcap=sizes.attention_softcap,
        rows=rows,
        row_length=length,
        room=room,
    )


def choose_attention(config: TrainConfig, shape: Shape, device: jax.Device) -> AttentionChoice:
    """Chooses the backend for a run. In a run of several processes all call it, and the first one tries for all.

    Args:
        config: the settings of the run; of them `attention` and `attention_check` count.
        shape: of `shape_of`.
        device: a device of this process in the run's mesh.

    Raises:
        ConfigError: the backend that the config names cannot run there, or computes wrong numbers there; or no backend
            computes right ones.
    """
    place = place_of(device, dtype=shape.dtype, head_dim=shape.head_dim, softcap=shape.softcap)
    backend, reason = choose(config.attention, place)
    if not config.attention_check:
        return AttentionChoice(backend, f"{reason}; not tried here, `attention_check` is false")
    if (place.kind, backend) in _KNOWN:
        return AttentionChoice(backend, reason)
    names = [backend] if config.attention != "auto" else list(candidates(place).reasons)
    tried = None
    if distributed.is_first():
        timed = config.attention == "auto"  # one that is named need not be timed, and the timed rows may be too long
        tried = [asdict(verdict) for verdict in verdicts.of_backends(names, shape, device, timed=timed)]
    found = [verdicts.from_json(verdict) for verdict in distributed.collect("attention", tried)[0] or []]
    if config.attention != "auto":
        return _named(found[0], device)
    return choose_fastest(found, shape, device)


def fastest(found: Sequence[Verdict]) -> Verdict | None:
    """Returns the fastest that is right; of nearly equal ones the first. None if none is right."""
    best: Verdict | None = None
    for verdict in found:
        if verdict.speed is None:
            continue
        if best is None or best.speed is None or verdict.speed.seconds < _CLEARLY_FASTER * best.speed.seconds:
            best = verdict
    return best


def _named(verdict: Verdict, device: jax.Device) -> AttentionChoice:
    if verdict.problem is not None:
        raise ConfigError(
            f"`attention: {verdict.backend}` {verdict.problem}, on {device.device_kind} with jax {jax.__version__}. "
            "Choose `attention: auto`, which takes a backend that is right here; `jax-simpo doctor` shows them all. "
            "`attention_check: false` would take this one all the same"
        )
    return AttentionChoice(verdict.backend, f"as configured, and right on {device.device_kind}")


def choose_fastest(found: Sequence[Verdict], shape: Shape, device: jax.Device) -> AttentionChoice:
    """Chooses the fastest backend that is right; of nearly equal ones that which comes first.

    Args:
        found: verdicts, in the order of preference.
        shape: that they were timed on.
        device: that they were tried on.

    Raises:
        ConfigError: none of them is right.
    """
    warnings = [
        f"warning: attention backend {verdict.backend!r} is passed over: it {verdict.problem}"
        for verdict in found
        if verdict.problem is not None
    ]
    best = fastest(found)
    if best is None:
        raise ConfigError(
            f"`attention: auto`: no backend computes right numbers on {device.device_kind} with jax {jax.__version__}. "
            + "; ".join(f"{verdict.backend} {verdict.problem}" for verdict in found)
            + ". Try another version of jax; `jax-simpo doctor` shows more"
        )
    times = ", ".join(f"{v.backend} {1e3 * v.speed.seconds:.3g} ms" for v in found if v.speed is not None)
    rows = f"{shape.rows} x {shape.row_length} tokens"
    reason = f"auto: the fastest right one on {device.device_kind}; {times} for {rows}, forward and backward"
    return AttentionChoice(best.backend, reason, warnings)
