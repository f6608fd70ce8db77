"""Decides after which steps a run evaluates and saves, and how many steps it takes."""

from __future__ import annotations

import math
from typing import Literal

from jax_simpo.config import TrainConfig
from jax_simpo.errors import ConfigError


def count_steps(config: TrainConfig, steps_per_epoch: int) -> int:
    """Returns the number of optimizer steps of the whole run: `max_steps`, or those of `num_train_epochs`.

    Raises:
        ConfigError: so many epochs take more steps than the 32 bits of an optimizer's counter hold.
    """
    if config.max_steps > 0:
        return config.max_steps
    if config.num_train_epochs * steps_per_epoch >= 2**31:
        raise ConfigError(
            f"`num_train_epochs` is {config.num_train_epochs:g}: at {steps_per_epoch} steps an epoch that is more than "
            "the 2,147,483,647 steps that a run can count. Lower it, or set `max_steps`"
        )
    return math.ceil(config.num_train_epochs * steps_per_epoch)


def is_due(
    config: TrainConfig, action: Literal["eval", "save"], step: int, *, total_steps: int, steps_per_epoch: int
) -> bool:
    """Returns True if the run evaluates or saves after a step, by `eval_strategy` or `save_strategy`.

    The last step is always due, unless `save_strategy` is "no".

    Args:
        config: the settings of the run.
        action: which of the two strategies to ask.
        step: optimizer steps done.
        total_steps: optimizer steps of the whole run.
        steps_per_epoch: optimizer steps of an epoch.
    """
    strategy = getattr(config, f"{action}_strategy")
    if action == "save" and strategy == "no":
        return False
    if step == total_steps:
        return True
    if strategy == "epoch":
        return step % steps_per_epoch == 0
    return bool(strategy == "steps" and step % getattr(config, f"{action}_steps") == 0)
