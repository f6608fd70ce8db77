"""Makes AdamW and the learning-rate schedules of the Hugging Face Trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from jax_simpo.config import TrainConfig
from jax_simpo.config.schedules import DECAY_SHARE, settings_of

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class _Decay:
    """The course of the learning rate after warm-up: it stays at the peak, and then falls to its lowest value.

    Attributes:
        left: returns the share of the way from the lowest value to the peak that is left, given the share of the
            decay that is done.
        steps: the length of the decay, which is the last part of the run.
        lowest: the lowest learning rate.
        start: the learning rate that warm-up begins with.
    """

    left: Callable[[float], float]
    steps: int
    lowest: float = 0.0
    start: float = 0.0


# By the name of a schedule or of its `decay_type`: the formula of `_Decay.left`.
_LEFT: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    "1-sqrt": lambda done: 1.0 - math.sqrt(done),
}


def learning_rate_schedule(config: TrainConfig, total_steps: int) -> Schedule:
    """Returns a function from the number of a step k, counted from 0, to its learning rate.

    The formulas are those of `transformers.get_scheduler`. Warm-up rises linearly, so step 0 of a run with warm-up has
    the learning rate at which warm-up begins.
    """
    peak = config.learning_rate
    if config.lr_scheduler_type == "constant":
        return lambda step: peak  # as in transformers, which ignores warm-up for this schedule
    warmup = config.warmup_steps or math.ceil(total_steps * config.warmup_ratio)
    decay = _decay(config, total_steps, warmup)

    def learning_rate(step: int) -> float:
        if step < warmup:
            return decay.start + (peak - decay.start) * step / warmup
        done = min(1.0, max(0.0, 1.0 - (total_steps - step) / decay.steps))
        return decay.lowest + (peak - decay.lowest) * decay.left(done)

    return learning_rate


def _decay(config: TrainConfig, total_steps: int, warmup: int) -> _Decay:
    """Returns the decay of a config's schedule."""
    peak, kind = config.learning_rate, config.lr_scheduler_type
    settings, steps = settings_of(kind, config.lr_scheduler_kwargs), max(1, total_steps - warmup)
    if kind == "constant_with_warmup":
        return _Decay(lambda done: 1.0, steps)
    if kind == "cosine_with_min_lr":
        share, lowest = settings["min_lr_rate"], settings["min_lr"]
        return _Decay(_LEFT["cosine"], steps, peak * share if lowest is None else lowest)
    if kind == "polynomial":
        return _Decay(lambda done: (1.0 - done) ** settings["power"], steps, settings["lr_end"])
    if kind == "warmup_stable_decay":
        wanted = settings["num_decay_steps"] or math.ceil(DECAY_SHARE * total_steps)
        lowest = peak * settings["min_lr_ratio"]
        return _Decay(_LEFT[settings["decay_type"]], min(int(wanted), steps), lowest, start=lowest)
    return _Decay(_LEFT[kind], steps)


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
