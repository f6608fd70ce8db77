"""Takes the attention and the loss head that a run would take: on an accelerator those that are tried there.

It is the run's own choice (`jax_simpo.training.attention`, `loss_head`): candidates are compared with the oracle and
timed on rows of the run's shape, and what was seen is kept in the user's cache folder. On a CPU nothing is tried.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import jax
from jax.sharding import Mesh

from benchmarks.facts import installed
from jax_simpo import config
from jax_simpo.data.packing import StepPlan
from jax_simpo.models.transformer import Model
from jax_simpo.ops.attention import place_of


@dataclass(frozen=True)
class Backends:
    """The backends of a step.

    Attributes:
        attention: of attention.
        loss_head: of the loss head.
        reason: why these, a sentence for a reader.
    """

    attention: str
    loss_head: str
    reason: str

    def as_cell(self) -> dict[str, Any]:
        """Returns the data of a cell that keeps the choice."""
        return asdict(self)


def backends_of_a_run(
    model: Model, plan: StepPlan, mesh: Mesh, attention: str = "auto", loss_head: str = "auto"
) -> Backends:
    """Chooses the backends as a run on these rows would. One that is named is tried too, and refused if it is wrong.

    Args:
        model: the model, with its compute dtype.
        plan: the step plan.
        mesh: the mesh.
        attention: the config key.
        loss_head: the config key.

    Raises:
        ConfigError: no backend computes right numbers here, or the one that is named does not.
    """
    of_attention, of_loss_head = choosers()
    device: jax.Device = mesh.devices.flat[0]
    # A run tries what is named on a CPU too. Here it is a contender of a comparison that may be slow, and tests try it.
    tried = attention == "auto" or place_of(device).platform != "cpu"
    settings: Any = SimpleNamespace(attention=attention, loss_head=loss_head, attention_check=tried)
    shape = of_attention.shape_of(settings, model, mesh, longest_row=plan.shape.length, plan=plan)
    choices = {
        "attention": of_attention.choose_attention(settings, shape, device),
        "loss head": of_loss_head.choose_loss_head(settings, of_loss_head.shape_of(model, mesh, plan), device),
    }
    for warning in (warning for choice in choices.values() for warning in choice.warnings):
        print(warning, flush=True)
    reason = "; ".join(f"{name} {choice.backend} ({choice.reason})" for name, choice in choices.items())
    return Backends(choices["attention"].backend, choices["loss head"].backend, f"{reason}.")


def choosers() -> tuple[Any, Any]:
    """Imports the modules in which a run chooses its attention and its loss head."""
    if not installed("pydantic"):
        # They name `TrainConfig` in annotations alone. Its schema needs pydantic, which is missing where some GPUs are;
        # a name that is there already is not looked up.
        vars(config).setdefault("TrainConfig", SimpleNamespace)
    from jax_simpo.training import attention, loss_head

    return attention, loss_head
