"""Reads a config file and `--key=value` overrides into a checked `TrainConfig`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from jax_simpo.config import foreign, help, yaml_files
from jax_simpo.config.overrides import Values, apply
from jax_simpo.config.schema import TrainConfig, torch_only
from jax_simpo.errors import ConfigError


def load_config(path: str | Path, overrides: Sequence[str] = (), *, torch: bool = False) -> TrainConfig:
    """Reads a config file and `--key=value` overrides.

    Args:
        path: the YAML file.
        overrides: arguments of the form `--key=value`. Dots lead into nested keys (`--mesh.fsdp=8`), values are YAML
            and may contain `=`. `--dataset_mixer.SOURCE=FRACTION` adds a source or changes its fraction (`null`
            removes it), `--dataset_mixer={SOURCE: FRACTION}` replaces them all. The last of two equal keys counts.
        torch: for the PyTorch reference, which can do more (`TORCH_ONLY`).

    Raises:
        ConfigError: with every mistake that was found, each with its file and line or its override.
    """
    written, lines = yaml_files.read_file(path)
    places = {key: f"{path}, line {line}" for key, line in lines.items()}
    values, notices, origin = foreign.translate(written, lambda key: places.get(key, str(path)))
    places |= {ours: places[theirs] for ours, theirs in origin.items()}
    gathered = Values(values, notices, places, names=dict(origin))
    apply(overrides, gathered, TrainConfig)
    if "gamma" in values:
        beta = values.get("beta", TrainConfig.model_fields["beta"].default)
        notices.append(foreign.read_gamma(values, beta, places["gamma"]))
    values.setdefault("run_name", Path(path).stem)
    try:
        config = TrainConfig(**values)
    except ValidationError as error:
        messages = [
            help.explain(detail, TrainConfig, values, places, gathered.names, str(path)) for detail in error.errors()
        ]
        # A key that may be one of two types complains once for each.
        raise ConfigError("\n".join(dict.fromkeys(messages))) from None
    for key, why in ({} if torch else torch_only(config)).items():
        raise ConfigError(f"{places.get(key, path)}: {why}")
    if not config.use_peft:
        default = TrainConfig.model_fields
        adapter = [k for k in values if k.startswith("lora_") and getattr(config, k) != default[k].default]
        notices += [f"{places.get(key, path)}: `{key}` has no effect without `use_peft`" for key in adapter]
    return config._with_notices(notices)
