"""Preference training with prefix sharing and packing, in JAX.

    import jax_simpo as js

    run = js.train(js.TrainConfig(model_name_or_path="...", output_dir="..."), pairs=pairs)
    model = js.load_model(run.model_path)
    js.score(model, [{"prompt": "...", "chosen": "...", "rejected": "..."}])
    js.generate(model, ["..."])

The names in `__all__` are the stable surface of the package, described in docs/api.md. Everything else is private and
may change in any release. Importing the package is cheap: a name brings JAX along only when it is first used.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from jax_simpo import objectives
    from jax_simpo.api import LoadedModel, evaluate, generate, load_model, score, train
    from jax_simpo.config import TrainConfig, builtin_configs, load_config
    from jax_simpo.data.rows import build_rows
    from jax_simpo.errors import UserError
    from jax_simpo.training.trainer import TrainRun

__all__ = [
    "LoadedModel",
    "TrainConfig",
    "TrainRun",
    "UserError",
    "build_rows",
    "builtin_configs",
    "evaluate",
    "generate",
    "load_config",
    "load_model",
    "objectives",
    "score",
    "train",
]

_MODULES = {
    "jax_simpo.api": ("LoadedModel", "TrainRun", "evaluate", "generate", "load_model", "score", "train"),
    "jax_simpo.config": ("TrainConfig", "builtin_configs", "load_config"),
    "jax_simpo.data.rows": ("build_rows",),
    "jax_simpo.errors": ("UserError",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used."""
    if name == "objectives":
        return import_module("jax_simpo.objectives")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'jax_simpo' has no attribute {name!r}; its public names are {', '.join(__all__)}")
    with warnings.catch_warnings():
        # transformers imports tqdm, which in a notebook asks for ipywidgets; the bars of this package need none.
        warnings.filterwarnings("ignore", message="IProgress not found")
        value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
