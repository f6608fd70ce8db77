"""Reads a config file and `--key=value` overrides into a checked `TrainConfig`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_simpo.config import effects, foreign, help, objectives, yaml_files
from jax_simpo.config.builtin import find_config
from jax_simpo.config.convert.trainers import recognise
from jax_simpo.config.overrides import Values, apply
from jax_simpo.config.schema import TrainConfig, checked_config, with_notices
from jax_simpo.errors import ConfigError

ALLOW_CODE = "--allow_code"


def load_config(path: str | Path, overrides: Sequence[str] = (), *, torch: bool = False) -> TrainConfig:
    """Reads a config file and `--key=value` overrides.

    Args:
        path: the YAML file, or `builtin:NAME` for one that comes with the program.
        overrides: arguments of the form `--key=value`. Dots lead into nested keys (`--mesh.fsdp=8`), values are YAML
            and may contain `=`. `--dataset_mixer.SOURCE=FRACTION` adds a source or changes its fraction (`null`
            removes it), `--dataset_mixer={SOURCE: FRACTION}` replaces them all. The last of two equal keys counts.
            `--allow_code` lets the config name an objective in a file of Python code.
        torch: for the PyTorch reference, which can do more (`effects.torch_only`).

    Raises:
        ConfigError: with every mistake that was found, each with its file and line or its override.
    """
    path = find_config(path)
    written, lines = yaml_files.read_file(path)
    _check_whose(written, path)
    places = {key: f"{path}, line {line}" for key, line in lines.items()}
    values, notices, origin = foreign.translate(written, lambda key: places.get(key, str(path)))
    places |= {ours: places[theirs] for ours, theirs in origin.items()}
    gathered = Values(values, notices, places, names=dict(origin))
    apply([override for override in overrides if override != ALLOW_CODE], gathered, TrainConfig)
    if objectives.code_of(values.get("objective")) and ALLOW_CODE not in overrides:
        raise ConfigError(
            f"{places.get('objective', path)}: `objective: {values['objective']}` runs the code of that file. If you "
            f"trust it, add `{ALLOW_CODE}` to the command line"
        )
    if "gamma" in values:
        beta = values.get("beta", objectives.default_beta(values.get("objective", "simpo")))
        notices.append(foreign.read_gamma(values, beta, places["gamma"]))
    values.setdefault("run_name", Path(path).stem)
    no_data = _check_data_is_named(values, places, path)
    try:
        config = checked_config(values, notices, places, gathered.names, str(path))
    except ConfigError as error:
        raise ConfigError("\n".join(filter(None, [no_data, str(error)]))) from None
    if no_data:
        raise ConfigError(no_data)
    for key, why in ({} if torch else effects.torch_only(config)).items():
        raise ConfigError(f"{places.get(key, path)}: {why}")
    unused = effects.unused(config)
    notices = [f"{places.get(key, path)}: `{key}` has no effect {unused[key]}" for key in values if key in unused]
    if torch:
        notices += [f"{places.get(key, path)}: {why}" for key, why in effects.done_afterwards(config).items()]
    return with_notices(config, [*notices, *_notice_of_other_objective(values, config, places, path)])


def _check_whose(values: Mapping[str, Any], path: Path) -> None:
    """Raises for a file that is another trainer's. A single key of one in a file of ours is told by itself."""
    strange = [key for key in values if key not in help.keys_of(TrainConfig) and key not in foreign.KEYS]
    found = recognise({key: values[key] for key in strange})
    if found is not None and (len(strange) > 1 or "dataset_mixer" not in values):
        trainer, keys = found
        known_by = ", ".join(f"`{key}`" for key in keys[:4])
        raise ConfigError(
            f"{path}: this is a {trainer.title} file (it has {known_by}). Run `jax-simpo convert {path} --output "
            f"OURS.yaml`, which says what becomes of each key, and use OURS.yaml"
        )


def _notice_of_other_objective(
    values: Mapping[str, Any], config: TrainConfig, places: Mapping[str, str], path: Path
) -> list[str]:
    """Returns a notice where a file looks like one for DPO or ORPO: the handbook's have no key that says so."""
    said = {"objective", "gamma_beta_ratio", "gamma"} & values.keys()
    if said or config.objective != "simpo" or config.beta is None or config.beta >= 0.5:
        return []
    return [
        f"{places.get('beta', path)}: `beta: {config.beta:g}` is small for `objective: simpo`, the file's default; "
        "published SimPO runs have 2 to 10. If the file is for DPO or ORPO, set `objective`, or run "
        "`jax-simpo convert FILE --from trl-dpo` (or trl-orpo)"
    ]


def _check_data_is_named(values: Mapping[str, Any], places: Mapping[str, str], path: Path) -> str:
    """Returns the mistake of a file that names no data, or an empty text. Only Python can do without."""
    if "dataset_mixer" not in values:
        return f"{path}: the key `dataset_mixer` is required, such as `dataset_mixer: {{pairs.jsonl: 1.0}}`"
    if values["dataset_mixer"] == {}:
        return f"{places.get('dataset_mixer', path)}: `dataset_mixer` is empty; name at least one source"
    return ""


def read_overrides(overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Reads `--key=value` overrides by themselves; returns the values by our keys, and notices for the user.

    Raises:
        ConfigError: an override is not of the form `--key=value`, or its dotted key leads nowhere.
    """
    gathered = Values({}, [])
    apply(overrides, gathered, TrainConfig)
    return gathered.values, gathered.notices
