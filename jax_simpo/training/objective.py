"""Makes the objective that a config asks for: one that comes with the program, or one of the user's own."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jax_simpo.config import TrainConfig, objective_weights
from jax_simpo.config.objectives import ALL_KEYS, GROUP_KEYS, REFERENCE_KEY, code_of
from jax_simpo.errors import ConfigError
from jax_simpo.objectives import Objective, Responses, make_objective


def objective_of(config: TrainConfig) -> Objective:
    """Returns the objective of a config.

    Raises:
        ConfigError: an objective of the user's own cannot be loaded, or does not return one loss for each pair.
    """
    if code := code_of(config.objective):
        objective = _make(_load_class(*code), str(config.objective), config)
    elif isinstance(config.objective, str | dict):
        return make_objective(objective_weights(config.objective), vars(config))
    elif isinstance(config.objective, Objective):
        objective = config.objective
        if ignored := [*(key for key in ALL_KEYS if getattr(config, key) is not None), *_of_groups(config)]:
            raise ConfigError(
                f"`{ignored[0]}` has no effect beside an `objective` made in Python; set it on the object"
            )
    else:
        raise ConfigError(f"`objective` {config.objective!r} does not derive from jax_simpo.objectives.Objective")
    if config.ref_model_name_or_path is not None and not objective.needs_reference:
        name = type(objective).__name__
        raise ConfigError(
            f"`{REFERENCE_KEY}` has no effect with `objective` {name}, which needs no reference; remove it"
        )
    _check_losses(objective)
    if objective.group_loss == "plackett_luce" and type(objective).difference is Objective.difference:
        raise ConfigError(
            f"`group_loss: plackett_luce` needs an objective that defines `difference`, the difference of rewards; "
            f"{type(objective).__name__} does not"
        )
    return objective


def _load_class(file: str, name: str) -> type[Objective]:
    path = Path(file).expanduser().absolute()
    if not path.is_file():
        raise ConfigError(f"`objective: {file}:{name}`: there is no file {path}")
    module_name = f"jax_simpo_user_objective_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's code raises
        raise ConfigError(
            f"`objective: {file}:{name}`: {path} cannot be run: {type(error).__name__}: {error}"
        ) from error
    kind = getattr(module, name, None)
    if not (isinstance(kind, type) and issubclass(kind, Objective) and is_dataclass(kind)):
        raise ConfigError(
            f"`objective: {file}:{name}`: {path} has no such class; it needs a frozen dataclass `{name}` that derives "
            "from jax_simpo.objectives.Objective"
        )
    return kind


def _make(kind: type[Objective], shown: str, config: TrainConfig) -> Objective:
    given = {key: value for key in ALL_KEYS if (value := getattr(config, key)) is not None} | _of_groups(config)
    own = {field.name for field in fields(kind)}
    if unknown := [key for key in given if key not in own]:
        raise ConfigError(f"`{unknown[0]}` has no effect with `objective: {shown}`, which has no such field; remove it")
    try:
        return kind(**given)
    except TypeError as error:  # a field without a default that no key gives
        raise ConfigError(f"`objective: {shown}` cannot be made from the keys of the config: {error}") from error


def _of_groups(config: TrainConfig) -> dict[str, Any]:
    """Returns the keys of group losses that differ from their defaults."""
    defaults = {field.name: field.default for field in fields(Objective)}
    return {key: value for key in GROUP_KEYS if (value := getattr(config, key)) != defaults[key]}


def _check_losses(objective: Objective) -> None:
    """Raises ConfigError if an objective does not return a loss for each pair."""
    numbers = jnp.full(3, -1.0)
    responses = Responses(numbers, -numbers, numbers)
    try:
        losses = jax.eval_shape(objective.losses, responses, responses)
    except Exception as error:  # whatever the user's code raises
        name = type(objective).__name__
        raise ConfigError(f"`objective`: {name}.losses raises {type(error).__name__}: {error}") from error
    if getattr(losses, "shape", None) != (3,):
        raise ConfigError(
            f"`objective`: {type(objective).__name__}.losses returns {losses}; expected one loss for each pair, an "
            "array of the shape of `chosen.sum`"
        )
