"""Makes AdamW and the learning-rate schedules of the Hugging Face Trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from jax_simpo.config import TrainConfig

Schedule = Callable[[int], float]


def learning_rate_schedule(config: TrainConfig, total_steps: int) -> Schedule:
    """Returns a function from the number of a step k, counted from 0, to its learning rate.

    Warm-up rises linearly from 0: `peak * k / warmup`. After it, with `p` the share of the remaining steps that is
    done, cosine is `peak * (1 + cos(pi p)) / 2`, linear is `peak * (1 - p)`, and the constant schedules stay at the
    peak.
    """
    warmup = config.warmup_steps or math.ceil(total_steps * config.warmup_ratio)
    peak, kind = config.learning_rate, config.lr_scheduler_type

    def learning_rate(step: int) -> float:
        if kind == "constant":
            return peak  # as in transformers, which ignores warm-up for this schedule
        if step < warmup:
            return peak * step / warmup
        done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        if kind == "cosine":
            return peak * 0.5 * (1.0 + math.cos(math.pi * done))
        if kind == "linear":
            return peak * (1.0 - done)
        return peak

    return learning_rate


def parameter_groups(
    model: nn.Module, weight_decay: float, replace: Callable[[nn.Parameter], torch.Tensor] = lambda p: p
) -> list[dict]:
    """Returns the trainable parameters in two groups: those that decay, and norms and biases, which do not.

    They are told apart by module and name, not by shape: under ZeRO-3 a partitioned parameter has lost its shape.

    Args:
        model: the model; a parameter that several modules share is listed once.
        weight_decay: the weight decay of the first group.
        replace: returns the tensor that the optimizer gets for a parameter, such as its float32 master copy.
    """
    decayed: list[torch.Tensor] = []
    undecayed: list[torch.Tensor] = []
    seen: set[int] = set()
    for module in model.modules():
        is_norm = "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                (undecayed if is_norm or name == "bias" else decayed).append(replace(parameter))
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_adamw(groups: Iterable[dict], config: TrainConfig) -> torch.optim.AdamW:
    """Returns AdamW with the config's settings. Call `set_learning_rate` before every step."""
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(list(groups), lr=config.learning_rate, betas=betas, eps=config.adam_epsilon)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Sets the learning rate of all groups. (DeepSpeed's wrappers have `param_groups` too.)"""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
