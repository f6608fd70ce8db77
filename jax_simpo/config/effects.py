"""Which keys of a valid config do nothing beside the others, and which one of the two trainers cannot honour."""

from __future__ import annotations

from jax_simpo.config.schema import TrainConfig

# Optimizer -> the keys that it does not read.
_UNREAD = {
    "adafactor": ("adam_beta1", "adam_beta2", "adam_epsilon"),
    "lion": ("adam_epsilon",),
}


def unused(config: TrainConfig) -> dict[str, str]:
    """Returns the keys without effect beside the others that are not at their defaults, each with the reason."""
    reasons = {key: f"with `optim: {config.optim}`" for key in _UNREAD.get(config.optim, ())}
    if not config.use_peft:
        reasons |= dict.fromkeys((k for k in TrainConfig.model_fields if k.startswith("lora_")), "without `use_peft`")
    if config.on_bad_step == "error":
        reasons["max_bad_steps"] = "without `on_bad_step: skip`"
    if config.early_stopping_patience is None:
        reasons["early_stopping_threshold"] = "without `early_stopping_patience`"
        if not config.load_best_model_at_end:
            neither = "without `load_best_model_at_end` or `early_stopping_patience`"
            reasons |= dict.fromkeys(("metric_for_best_model", "greater_is_better"), neither)
    if not config.push_to_hub:
        reasons["hub_strategy"] = "without `push_to_hub`"
    default = TrainConfig.model_fields
    return {key: why for key, why in reasons.items() if getattr(config, key) != default[key].default}


# Keys with values that the PyTorch reference does not have, with the reason and the remedy.
_JAX_ONLY = {
    "optim": "it trains with AdamW only; remove the key",
    "generate_during_eval": "it generates no answers; remove the key",
    "adam_mu_dtype": "it keeps AdamW's moments in float32; remove the key",
}

# Keys that the PyTorch reference does not act on, and what does so afterwards.
_AFTERWARDS = {"report_to": "track", "push_to_hub": "push"}


def done_afterwards(config: TrainConfig) -> dict[str, str]:
    """Returns the keys that the PyTorch reference leaves for later, each with a sentence that says how it is done."""
    return {
        key: f"`{key}` has no effect in `python -m torch_ref`; `jax-simpo {command}` with this config does it later"
        for key, command in _AFTERWARDS.items()
        if getattr(config, key)
    }


def jax_only(config: TrainConfig) -> dict[str, str]:
    """Returns the settings that the PyTorch reference cannot honour: each key with a sentence that says why."""
    fields = TrainConfig.model_fields
    asked = {key: value for key in _JAX_ONLY if (value := getattr(config, key)) != fields[key].default}
    shown = {key: str(value).lower() for key, value in asked.items()}
    return {
        key: f"`{key}: {value}` cannot be honoured by `python -m torch_ref`: {_JAX_ONLY[key]}, or use `jax-simpo train`"
        for key, value in shown.items()
    }


# Keys that only the PyTorch reference can honour, with the reason and the remedy.
_TORCH_ONLY = {
    "load_in_4bit": "weights are not quantised; use `mesh.fsdp` and `remat` to save memory, or `python -m torch_ref`",
    "load_in_8bit": "weights are not quantised; use `mesh.fsdp` and `remat` to save memory, or `python -m torch_ref`",
    "lora_dropout": "adapters have no dropout, with which layouts would give different numbers; set it to 0, or use "
    "`python -m torch_ref`",
}


def torch_only(config: TrainConfig) -> dict[str, str]:
    """Returns the settings that only the PyTorch reference can honour: each key with a sentence that says why."""
    asked = {key: getattr(config, key) for key in _TORCH_ONLY if key != "lora_dropout" or config.use_peft}
    shown = {key: str(value).lower() for key, value in asked.items() if value}
    return {key: f"`{key}: {value}` cannot be honoured: {_TORCH_ONLY[key]}" for key, value in shown.items()}
