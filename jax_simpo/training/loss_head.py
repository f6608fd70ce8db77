"""Decides which backend of the loss head a run takes: by trying them on the accelerator at hand, once per machine.

It is done as for attention (`training.attention`). `auto` takes `xla` unless a kernel is right on this chip and clearly
faster; nothing else is ever taken untried, but for a backend that the config names with `attention_check: false`. On a
CPU nothing is tried, because there is only `xla`.
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
from jax_simpo.ops.attention.backends import Place
from jax_simpo.ops.attention.choice import place_of
from jax_simpo.ops.attention.evidence import Verdict
from jax_simpo.ops.loss_head.choice import candidates, choose
from jax_simpo.ops.loss_head.evidence import HeadShape
from jax_simpo.processes import distributed
from jax_simpo.training import verdicts
from jax_simpo.training.attention import fastest

_TYPICAL_STATES = 4096  # of a micro-batch, where there is no step plan


@dataclass(frozen=True)
class LossHeadChoice:
    """The loss head's backend of a run.

    Attributes:
        backend: its name.
        reason: why it was chosen, a phrase for the log.
        warnings: sentences about backends that were passed over.
    """

    backend: str
    reason: str
    warnings: Sequence[str] = ()


def shape_of(model: Model, mesh: Mesh, plan: StepPlan | None = None) -> HeadShape:
    """Returns the part of a run's shapes that its loss head depends on.

    The number of states is rounded down to a power of two, so that runs on similar data share what was seen.

    Args:
        model: the model.
        mesh: the mesh, over whose `tensor` axis the vocabulary is split.
        plan: the step plan whose rows are computed; None takes typical ones.
    """
    sizes = model.config
    states = _TYPICAL_STATES
    if plan is not None:
        rows = plan.rows_per_micro_batch // (mesh.shape["data"] * mesh.shape["fsdp"])
        states = max(128, 1 << max(rows * plan.shape.targets, 1).bit_length() - 1)
    return HeadShape(
        dtype=model.dtype.name,
        states=states,
        width=sizes.hidden_size,
        vocabulary=sizes.vocab_size // mesh.shape["tensor"],
        softcap=sizes.logit_softcap,
        frozen=model.lora is not None,
    )


def head_place(shape: HeadShape, device: jax.Device) -> Place:
    """Describes a device and a model to the backends."""
    return place_of(device, dtype=shape.dtype, softcap=shape.softcap)


def choose_loss_head(config: TrainConfig, shape: HeadShape, device: jax.Device) -> LossHeadChoice:
    """Chooses the backend for a run. In a run of several processes all call it, and the first one tries for all.

    Args:
        config: the settings of the run; of them `loss_head` and `attention_check` count.
        shape: of `shape_of`.
        device: a device of this process in the run's mesh.

    Raises:
        ConfigError: the backend that the config names cannot run there, or computes wrong numbers there; or no backend
            computes right ones.
    """
    place = head_place(shape, device)
    backend, reason = choose(config.loss_head, place, shape.width)
    automatic = config.loss_head == "auto"
    names = candidates(place, shape.width) if automatic else [backend]
    if names == ["xla"]:
        return LossHeadChoice("xla", f"auto on a {place.kind}: the only one there" if automatic else reason)
    if not config.attention_check:
        return LossHeadChoice(backend, f"{reason}; nothing is tried here, `attention_check` is false")
    tried = None
    if distributed.is_first():
        tried = [asdict(verdict) for verdict in verdicts.of_loss_heads(names, shape, device, timed=automatic)]
    found = [verdicts.from_json(verdict) for verdict in distributed.collect("loss head", tried)[0] or []]
    return choose_fastest(found, shape, device) if automatic else _named(found[0], device)


def _named(verdict: Verdict, device: jax.Device) -> LossHeadChoice:
    if verdict.problem is not None:
        raise ConfigError(
            f"`loss_head: {verdict.backend}` {verdict.problem}, on {device.device_kind} with jax {jax.__version__}. "
            "Choose `loss_head: auto`, which takes a backend that is right here; `jax-simpo doctor` shows them all. "
            "`attention_check: false` would take this one all the same"
        )
    return LossHeadChoice(verdict.backend, f"as configured, and right on {device.device_kind}")


def choose_fastest(found: Sequence[Verdict], shape: HeadShape, device: jax.Device) -> LossHeadChoice:
    """Chooses the fastest backend that is right; of nearly equal ones that which comes first.

    Args:
        found: verdicts, `xla` first.
        shape: that they were timed on.
        device: that they were tried on.

    Raises:
        ConfigError: none of them is right.
    """
    warnings = [
        f"warning: loss head {verdict.backend!r} is passed over: it {verdict.problem}"
        for verdict in found
        if verdict.problem is not None
    ]
    best = fastest(found)
    if best is None:
        raise ConfigError(
            f"`loss_head: auto`: no backend computes right numbers on {device.device_kind} with jax "
            f"{jax.__version__}. "
            + "; ".join(f"{verdict.backend} {verdict.problem}" for verdict in found)
            + ". Try another version of jax; `jax-simpo doctor` shows more"
        )
    times = ", ".join(f"{v.backend} {1e3 * v.speed.seconds:.3g} ms" for v in found if v.speed is not None)
    sizes = f"{shape.states} states x {shape.width} x {shape.vocabulary}"
    reason = f"auto: the fastest right one on {device.device_kind}; {times} for {sizes}, forward and backward"
    return LossHeadChoice(best.backend, reason, warnings)
