"""Decides which backend of the loss head a run takes: by trying them on the accelerator at hand, once per machine.

It is done as for attention (`training.attention`). `auto` takes `xla` unless a kernel is right on this chip and clearly
faster; nothing else is ever taken untried, but for a backend that the config names with `attention_check: false`. On a
CPU nothing is tried, because there is only `xla`.
"""

from __future__ import annotations

import jax
from jax.sharding import Mesh

from jax_simpo.config import TrainConfig
from jax_simpo.data.packing import StepPlan
from jax_simpo.models.transformer import Model
from jax_simpo.ops.attention.backends import Place
from jax_simpo.ops.attention.choice import place_of
from jax_simpo.ops.loss_head.choice import candidates, choose
from jax_simpo.ops.loss_head.evidence import HeadShape
from jax_simpo.training import verdicts
from jax_simpo.training.backend_choice import BackendChoice, choose_fastest, keep_named, try_on_first

_TYPICAL_STATES = 4096  # of a micro-batch, where there is no step plan


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


def choose_loss_head(config: TrainConfig, shape: HeadShape, device: jax.Device) -> BackendChoice:
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
        return BackendChoice("xla", f"auto on a {place.kind}: the only one there" if automatic else reason)
    if not config.attention_check:
        return BackendChoice(backend, f"{reason}; nothing is tried here, `attention_check` is false")
    found = try_on_first("loss head", lambda: verdicts.of_loss_heads(names, shape, device, timed=automatic))
    if not automatic:
        return keep_named("loss_head", found[0], device)
    return choose_fastest("loss_head", found, device, work_of(shape))


def work_of(shape: HeadShape) -> str:
    """Says on what backends were timed."""
    return f"{shape.states} states x {shape.width} x {shape.vocabulary}"
