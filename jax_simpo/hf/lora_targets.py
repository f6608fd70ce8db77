"""Maps Hugging Face's names of the linear layers that can have an adapter to the paths of their parameters."""

from __future__ import annotations

from collections.abc import Sequence

from jax_simpo.errors import ConfigError
from jax_simpo.hf.families import FAMILIES


def linear_layers(model_type: str) -> dict[str, str]:
    """Returns a family's linear layers: path in a decoder layer -> Hugging Face's module name.

    `{}` in a module name stands for the layer's number: "attention/q" -> "model.layers.{}.self_attn.q_proj".
    """
    kernels = {path: name for path, name in FAMILIES[model_type].names.items() if path.endswith("/kernel")}
    return {
        path.removeprefix("layers/").removesuffix("/kernel"): name.removesuffix(".weight")
        for path, name in kernels.items()
    }


def choose_targets(names: Sequence[str] | None, model_type: str) -> tuple[str, ...]:
    """Returns the paths of the linear layers that `lora_target_modules` names, in the order of `linear_layers`.

    Args:
        names: Hugging Face's names, as peft reads them: `q_proj` or `self_attn.q_proj`. None takes all linear layers
            but the head.
        model_type: the model's family.

    Raises:
        ConfigError: a name belongs to no linear layer, or there is no name.
    """
    layers = linear_layers(model_type)
    if names is None:
        return tuple(layers)
    # The layer's number is left out: an adapter is on every layer or on none.
    modules = {path: module.partition(".{}.")[2] for path, module in layers.items()}
    chosen: dict[str, None] = {}
    for name in names:
        matching = [path for path, module in modules.items() if f".{module}".endswith(f".{name}")]
        if not matching:
            choices = ", ".join(module.rpartition(".")[2] for module in modules.values())
            raise ConfigError(
                f"`lora_target_modules`: {name!r} is no linear layer of a {model_type} model that can have an adapter; "
                f"those are {choices} (for all of them leave the key out)"
            )
        chosen |= dict.fromkeys(matching)
    if not chosen:
        raise ConfigError("`lora_target_modules` names nothing to train; for all linear layers leave the key out")
    return tuple(path for path in layers if path in chosen)
