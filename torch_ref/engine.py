"""Defines the interface of an engine (a model with its optimizer), and the engine of a single process."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jax_simpo.config import TrainConfig
from jax_simpo.errors import CheckpointError
from torch_ref.batches import Batch
from torch_ref.model import DTYPES, Policy
from torch_ref.optim import make_adamw, parameter_groups, set_learning_rate

PREFIX = "causal_lm."  # of parameter names in a `Policy`


class Engine(Protocol):
    """A model with its optimizer.

    Attributes:
        name: the kind of engine and its number of ranks. Only an engine of the same name can read a checkpoint.
        policy: the model.
    """

    name: str
    policy: Policy

    def logps(self, batch: Batch) -> Float[Tensor, " N"]:
        """Returns the log-probability of every target of this rank's batch, float32."""

    def backward(self, loss: Float[Tensor, ""], *, last: bool) -> None:
        """Adds this rank's part of the step's gradients; `last` is True for the step's last micro-batch."""

    def gradients(self) -> dict[str, Tensor]:
        """Returns the step's gradients by Hugging Face name. Call it between the last `backward` and `update`."""

    def gradient_norm(self) -> float:
        """Returns the L2 norm of the step's gradients before clipping, over all ranks. It is finite if all of them are.

        Call it between the last `backward` and `update`.
        """

    def update(self, learning_rate: float, norm: float) -> None:
        """Clips the gradients and makes one optimizer step.

        Args:
            learning_rate: the learning rate of the step.
            norm: what `gradient_norm` returned.
        """

    def discard(self) -> None:
        """Drops the step's gradients, in place of `update`."""

    def is_finite(self) -> bool:
        """Returns True if every trained weight of every rank is finite."""

    def weights(self, dtype: torch.dtype, *, trained_only: bool = False) -> dict[str, Tensor]:
        """Returns the weights by Hugging Face name, on the first rank's host; an empty dict on other ranks."""

    def save(self, folder: Path) -> None:
        """Writes the state from which training can be resumed."""

    def load(self, folder: Path) -> None:
        """Restores the state that `save` wrote.

        Raises:
            CheckpointError: it cannot be restored.
        """


def hugging_face_names(policy: Policy) -> dict[str, nn.Parameter]:
    """Returns the model's parameters by their names in its checkpoints. A shared parameter has its first name only."""
    # The head of a `Policy` shares its weight and comes last, so its name is left out.
    return {name.removeprefix(PREFIX): parameter for name, parameter in policy.named_parameters()}


def total_norm(gradients: Iterable[Tensor]) -> Float[Tensor, ""]:
    """Returns the L2 norm of all gradients as one vector, float64.

    (PyTorch's own, in float32, is up to 1e-5 too small on CPUs.)
    """
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
    return torch.linalg.vector_norm(torch.stack(norms))


def round_parameters(policy: Policy, dtype: torch.dtype) -> None:
    """Rounds a model's weights to `dtype`. Buffers, such as RoPE frequencies, stay as they are."""
    for parameter in policy.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


class PlainEngine:
    """An engine of one process without DeepSpeed.

    In bfloat16 the model's weights are rounded copies of float32 masters. The optimizer updates the masters, and
    gradients are added up in float32.
    """

    def __init__(self, policy: Policy, config: TrainConfig) -> None:
        """Takes a policy with float32 weights and, for bfloat16, rounds them."""
        self.name = "a single process"
        self.policy = policy
        self._max_norm = config.max_grad_norm
        self._trained = {n: p for n, p in hugging_face_names(policy).items() if p.requires_grad}
        self._rounded = config.dtype != "float32"
        self._masters: dict[nn.Parameter, Tensor] = {p: p for p in self._trained.values()}
        if self._rounded:
            self._round(DTYPES[config.dtype])
        groups = parameter_groups(policy, config.weight_decay, self._masters.__getitem__)
        self._optimizer = make_adamw(groups, config)

    def _round(self, dtype: torch.dtype) -> None:
        """Makes the float32 masters, and rounds the model's weights."""
        for parameter in self._trained.values():
            self._masters[parameter] = parameter.detach().float().clone()
            parameter.register_post_accumulate_grad_hook(self._take_gradient)
        round_parameters(self.policy, dtype)

    def _take_gradient(self, parameter: nn.Parameter) -> None:
        """Adds a parameter's gradient to its master's."""
        master, gradient = self._masters[parameter], parameter.grad
        assert gradient is not None
        master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)
        parameter.grad = None

    def logps(self, batch: Batch) -> Float[Tensor, " N"]:
        return self.policy(batch)

    def backward(self, loss: Float[Tensor, ""], *, last: bool) -> None:
        loss.backward()

    def gradients(self) -> dict[str, Tensor]:
        gradients = {name: self._masters[p].grad for name, p in self._trained.items()}
        return {name: gradient.clone() for name, gradient in gradients.items() if gradient is not None}

    def gradient_norm(self) -> float:
        return float(total_norm(m.grad for m in self._masters.values() if m.grad is not None).float())

    def update(self, learning_rate: float, norm: float) -> None:
        if self._max_norm:
            nn.utils.clip_grads_with_norm_(list(self._masters.values()), self._max_norm, torch.tensor(norm))
        set_learning_rate(self._optimizer, learning_rate)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._rounded:
            with torch.no_grad():
                for parameter, master in self._masters.items():
                    parameter.copy_(master)

    def discard(self) -> None:
        self._optimizer.zero_grad()

    def is_finite(self) -> bool:
        return all(bool(torch.isfinite(master).all()) for master in self._masters.values())

    def weights(self, dtype: torch.dtype, *, trained_only: bool = False) -> dict[str, Tensor]:
        parameters = self._trained if trained_only else hugging_face_names(self.policy)
        return {name: self._masters.get(p, p).detach().to("cpu", dtype) for name, p in parameters.items()}

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        masters = {name: self._masters[p].detach() for name, p in self._trained.items()}
        torch.save({"weights": masters, "optimizer": self._optimizer.state_dict()}, folder / "state.pt")

    def load(self, folder: Path) -> None:
        try:
            state = torch.load(folder / "state.pt", map_location=self.policy.head.weight.device, weights_only=True)
            with torch.no_grad():
                for name, parameter in self._trained.items():
                    self._masters[parameter].copy_(state["weights"][name])
                    parameter.copy_(self._masters[parameter])
            self._optimizer.load_state_dict(state["optimizer"])
        except (OSError, RuntimeError, KeyError, ValueError, EOFError) as error:
            raise CheckpointError(
                f"{folder}: cannot be restored ({error}). It is damaged, or belongs to another model; remove it, or "
                "train into another `output_dir`"
            ) from error
