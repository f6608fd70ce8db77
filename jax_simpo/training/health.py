"""Gathers what the rules of `jax_simpo.run.health` know of a run besides its records."""

from __future__ import annotations

import jax.numpy as jnp

from jax_simpo.data.token_signs import count_signs
from jax_simpo.data.tokenize import GroupDataset
from jax_simpo.objectives import Objective, Responses
from jax_simpo.run.health import RunTraits
from jax_simpo.run.health.published import Trainee
from jax_simpo.training.setup import Setup


def traits_of(setup: Setup, training: GroupDataset, total_steps: int) -> RunTraits:
    """Returns the traits of a run.

    Args:
        setup: the objects built from its config.
        training: the pairs, or groups, that are trained on.
        total_steps: optimizer steps of the whole run.
    """
    config, lengths, tokenizer = setup.config, training.lengths, setup.tokenizer
    return RunTraits(
        total_steps=total_steps,
        learning_rate=config.learning_rate,
        trainee=Trainee(
            parameters=setup.model.parameter_count,
            new_model=config.new_model_config is not None and config.model_name_or_path is None,
            adapter=setup.model.lora is not None,
            with_sft=bool(setup.objective.sft_weight),
            optim=config.optim,
        ),
        gamma_beta_ratio=config.gamma_beta_ratio,
        starts_as_reference=setup.objective.needs_reference and config.ref_model_name_or_path is None,
        logps_are_sums=_logs_sums(setup.objective),
        chosen_tokens=float(lengths.targets[lengths.starts].mean()),
        signs=count_signs(training, tokenizer.bos_token_id, tokenizer.eos_token_id),
        noun=lengths.noun,
    )


def _logs_sums(objective: Objective) -> bool:
    """Returns True if what an objective logs of a response is a sum over its tokens, and not their mean."""
    response = Responses(sum=jnp.float32(-6.0), length=jnp.float32(3.0), reference_sum=jnp.float32(0.0))
    return float(objective.logps(response)) < -4.0
